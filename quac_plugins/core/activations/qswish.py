"""QSwish: Swish whose slope β is driven by the features and the image's quality."""

from __future__ import annotations

from quac_plugins.core.activations.driver import QualityDriven
from quac_plugins.core.kernels import plain


class QSwish(QualityDriven):
    """y = x·σ(β x) with β from the quality driver; see :class:`DrivenActivation` for the arguments.

    Example:
        >>> import torch
        >>> QSwish(8)(torch.randn(2, 8, 4, 4), torch.randn(2, 36)).shape
        torch.Size([2, 8, 4, 4])
    """

    name = "qswish"
    neutral = (1.0,)
    equation = staticmethod(plain.swish)
