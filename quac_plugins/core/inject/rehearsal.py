"""A host built for its shapes alone, where what a real one looks like has to be asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode


def of_shapes(make: Callable[[], nn.Module]) -> nn.Module | None:
    """Build a host, without weights, on the meta device.

    None for one that cannot be built so: it looks at the values of its tensors, or asks for weights.

    Example:
        >>> next(of_shapes(lambda: nn.Linear(2, 3)).parameters()).is_meta
        True
    """
    generator, numpys = torch.get_rng_state(), np.random.get_state()
    try:
        with torch.device("meta"), _Numbers():
            return make()
    except Exception:
        return None
    finally:  # a real build draws what it would have drawn
        torch.set_rng_state(generator)
        np.random.set_state(numpys)


class _Numbers(TorchFunctionMode):
    """Leaves ``linspace`` its numbers, which most hosts with stochastic depth read while they are built."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return func(*args, **({"device": "cpu", **kwargs} if func is torch.linspace else kwargs))
