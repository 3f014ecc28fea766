"""Finding out that a host lacks the sites which a config asks for before the host is built: on one of shapes alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode


def rehearse(make: Callable[[], Any], put_in: Callable[[Any], Any]) -> None:
    """Build a host on the meta device, put into it what will be put into the real one, and forget it.

    Hosts that cannot be built so (they look at the values of their tensors, or ask for weights) are left to the real
    build, which tells the same later.

    Args:
        make: builds the host, without weights.
        put_in: what is done to it afterwards.

    Raises:
        ValueError: ``put_in`` raised it: a site is not there.

    Example:
        >>> from quac_plugins.core.inject import QuACConfig, inject
        >>> def make():
        ...     return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        >>> try:
        ...     rehearse(make, lambda host: inject(host, QuACConfig(where="2")))
        ... except ValueError as error:
        ...     print(str(error).split(".")[0])
        where='2' matches no activation of Sequential
    """
    generator, numpys = torch.get_rng_state(), np.random.get_state()
    try:
        with torch.device("meta"), _Numbers():
            host = make()
    except Exception:
        return
    finally:  # the real build draws what it would have drawn
        torch.set_rng_state(generator)
        np.random.set_state(numpys)
    if isinstance(host, nn.Module):
        with contextlib.suppress(RuntimeError, NotImplementedError):
            put_in(host)


class _Numbers(TorchFunctionMode):
    """Leaves ``linspace`` its numbers, which most hosts with stochastic depth read while they are built."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return func(*args, **({"device": "cpu", **kwargs} if func is torch.linspace else kwargs))


def rehearsing() -> bool:
    """Whether what is being built now is built for its shapes alone."""
    return torch.empty(0).is_meta  # torch 2.6 does not tell the device of a context otherwise
