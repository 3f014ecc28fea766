"""Full precision inside autocast regions, for the small computations whose rounding would show."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def full_precision(like: Tensor) -> AbstractContextManager[object]:
    """Return a context without autocast on the device of the tensor ``like`` (the meta device has no autocast).

    Example:
        >>> with torch.autocast("cpu", dtype=torch.bfloat16), full_precision(torch.ones(1)):
        ...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
        torch.float32
    """
    if like.device.type == "meta" or not torch.is_autocast_enabled(like.device.type):
        return nullcontext()
    return torch.autocast(device_type=like.device.type, enabled=False)
