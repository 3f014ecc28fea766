"""The activations as functions of x and per-channel parameters; the modules' functional twins.

>>> import torch
>>> from quac_plugins import functional
>>> x, p1, p2 = torch.randn(2, 8, 4, 4), torch.ones(1, 8, 1, 1), torch.zeros(1, 8, 1, 1)
>>> functional.acon(x, p1, p2, beta=torch.rand(2, 8, 1, 1)).shape
torch.Size([2, 8, 4, 4])
"""

from quac_plugins.core.kernels.plain import acon, gelu, prelu, swish

__all__ = ["acon", "gelu", "prelu", "swish"]
