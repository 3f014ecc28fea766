"""QPReLU: PReLU whose negative slope is driven by the features and the image's quality."""

from __future__ import annotations

from quac_plugins.core.activations.driver import QualityDriven
from quac_plugins.core.kernels import plain


class QPReLU(QualityDriven):
    """y = x above zero, slope·x below, the slope from the quality driver; arguments as :class:`DrivenActivation`.

    Example:
        >>> import torch
        >>> QPReLU(8)(torch.randn(2, 8, 4, 4), torch.randn(2, 36)).shape
        torch.Size([2, 8, 4, 4])
    """

    name = "qprelu"
    neutral = (0.0,)
    equation = staticmethod(plain.prelu)
