"""The ACON family: AconC (β learned), MetaACON (β from the features), QACON (β from the features and the quality)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quac_plugins.core.activations.base import ChannelActivation
from quac_plugins.core.activations.driver import DrivenActivation
from quac_plugins.core.kernels import plain


def _slopes(module: ChannelActivation) -> tuple[nn.Parameter, nn.Parameter]:
    """Make p1, p2 of shape (1, C, 1, 1): N(0, 1) as in the paper, 1 and 0 (the SiLU of the family) under preserve."""
    shape = (1, module.channels, 1, 1)
    if module.init == "preserve":
        return nn.Parameter(torch.ones(shape)), nn.Parameter(torch.zeros(shape))
    return nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(shape))


class AconC(ChannelActivation):
    """ACON-C: y = d·σ(β d) + p2·x, d = (p1 − p2)·x, with p1, p2, β learned for every channel.

    Source: Ma et al., CVPR 2021, eq. (6); state dicts of nmaac/acon's ``AconC`` load.

    Args:
        channels: C.
        channel_dim, init, host: see :class:`ChannelActivation`.

    Example:
        >>> import torch
        >>> AconC(8)(torch.randn(2, 8, 4, 4)).shape
        torch.Size([2, 8, 4, 4])
    """

    name = "acon"
    neutral = (1.0, 0.0, 1.0)
    equation = staticmethod(plain.acon)

    def __init__(self, channels: int, channel_dim: int = 1, init: str = "paper", host: nn.Module | None = None):
        super().__init__(channels, channel_dim, init, host)
        self.p1, self.p2 = _slopes(self)
        self.beta = nn.Parameter(torch.ones(1, channels, 1, 1))

    def values(self, x: Tensor, q: Tensor | None) -> tuple[Tensor, ...]:
        """Return p1, p2 and β, (1, C, 1, 1) each, shaped to broadcast against x."""
        return self.shaped(self.p1, x), self.shaped(self.p2, x), self.shaped(self.beta, x)


class QACON(DrivenActivation):
    """Q-ACON: ACON whose β comes from the features and the image's quality, β = W3 σ(BN2(W2 BN1(W1 [GAP(x); q]))).

    Source: IIP-Lab-XDU/QuAC; state dicts of its ``QualityAcon`` load.

    Args:
        channels: C.
        quality_channels: Q, 36 for BRISQUE.
        reduction, norm, channel_dim, init, host, expand_q: see :class:`DrivenActivation`.

    Raises:
        QualityError: no q was given and no image has passed the tap, or q has another batch than x.
        ValueError: another number of channels; ``norm="batch"`` training on one image.

    Example:
        >>> import torch
        >>> QACON(8)(torch.randn(2, 8, 4, 4), torch.randn(2, 36)).shape
        torch.Size([2, 8, 4, 4])
        >>> QACON(8, channel_dim=-1, norm="layer")(torch.randn(1, 49, 8), torch.randn(1, 36)).shape
        torch.Size([1, 49, 8])
    """

    name = "qacon"
    learned = ("p1", "p2")
    numbers = 1
    neutral = (1.0, 0.0, 1.0)
    needs_quality = True
    equation = staticmethod(plain.acon)

    def __init__(
        self,
        channels: int,
        quality_channels: int = 36,
        reduction: int = 16,
        norm: str = "batch",
        channel_dim: int = 1,
        init: str = "paper",
        host: nn.Module | None = None,
        expand_q: str = "error",
    ):
        super().__init__(channels, quality_channels, reduction, norm, channel_dim, init, host, expand_q)
        self.p1, self.p2 = _slopes(self)


class MetaACON(DrivenActivation):
    """Meta-ACON: ACON whose β comes from the features, β = σ(BN2(W2 BN1(W1 GAP(x)))).

    Source: Ma et al., CVPR 2021, section 4.2; state dicts of nmaac/acon's ``MetaAconC`` load.

    Args:
        channels: C.
        reduction, norm, channel_dim, init, host: see :class:`DrivenActivation`.

    Example:
        >>> import torch
        >>> MetaACON(8)(torch.randn(2, 8, 4, 4)).shape
        torch.Size([2, 8, 4, 4])
    """

    name = "meta_acon"
    learned = ("p1", "p2")
    numbers = 1
    neutral = (1.0, 0.0, 0.5)
    equation = staticmethod(plain.acon)

    def __init__(
        self,
        channels: int,
        reduction: int = 16,
        norm: str = "batch",
        channel_dim: int = 1,
        init: str = "paper",
        host: nn.Module | None = None,
    ):
        super().__init__(channels, 0, reduction, norm, channel_dim, init, host)
        self.p1, self.p2 = _slopes(self)

    def _build_head(self, width: int) -> None:
        return None  # β is h itself

    def _preserve_head(self) -> None:
        """Make β = σ(0) = 0.5 exactly, by a last affine of zeros, which has a gradient at once."""
        last = self.fc2 if isinstance(self.bn2, nn.Identity) else self.bn2
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
