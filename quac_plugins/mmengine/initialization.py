"""MMEngine initializes a whole model when training begins, by the classes of its layers: what was put in keeps its own.

A driver's layers and a prior's are convolutions too; drawn anew, a preserved network would be preserved no longer.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn

from quac_plugins.core.inject import injection_of
from quac_plugins.core.inject.adapter import adapter_state

_MARK = "_quac_keeps_what_was_put_in"
_running = threading.local()


def keep_what_was_put_in() -> None:
    """Let ``init_weights`` leave alone what was put into a model."""
    if getattr(BaseModule.init_weights, _MARK, False):
        return
    original = BaseModule.init_weights

    @functools.wraps(original)
    def init_weights(self: BaseModule) -> Any:
        if getattr(_running, "inside", False):
            return original(self)
        _running.inside, before = True, put_in(self)
        try:
            return original(self)
        finally:
            _running.inside = False
            with torch.no_grad():
                for tensor, value in before:
                    tensor.copy_(value)

    setattr(init_weights, _MARK, True)
    BaseModule.init_weights = init_weights


def put_in(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Every tensor that was put into a model, with a copy of its values."""
    holders = [module for module in model.modules() if "_quac_injection" in module.__dict__]
    tensors = [t for holder in holders if injection_of(holder) for t in adapter_state(holder).values()]
    return [(tensor, tensor.detach().clone()) for tensor in tensors]
