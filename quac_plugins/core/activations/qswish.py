"""QSwish: Swish whose slope β is driven by the features and the image's quality."""

from __future__ import annotations

from torch import nn

from quac_plugins.core.activations import reference
from quac_plugins.core.activations.driver import QualityDriven
from quac_plugins.core.activations.hosts import is_silu


class QSwish(QualityDriven):
    """y = x·σ(β x) with β from the quality driver; see :class:`DrivenActivation` for the arguments.

    Example:
        >>> import torch
        >>> QSwish(8)(torch.randn(2, 8, 4, 4), torch.randn(2, 36)).shape
        torch.Size([2, 8, 4, 4])
    """

    name = "qswish"
    neutral = (1.0,)
    equation = staticmethod(reference.swish)

    def stands_for(self, host: nn.Module | None) -> tuple[float, ...] | None:
        """SiLU is Swish at β = 1."""
        return self.neutral if is_silu(host) else None
