"""MMEngine's initialization of a whole model at the start of a training: injected modules keep their own values.

Layers of drivers and priors are convolutions too; with new values, a preserved network would no longer be preserved.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

import torch
from mmengine.model import BaseModule, PretrainedInit
from torch import Tensor, nn

from quac_plugins.core.inject.adapter import adapter_state
from quac_plugins.mmengine.activations import plan_of

_MARK = "_quac_keeps_what_was_put_in"


class _Running(threading.local):
    """The tensors, with their values, that this thread's initialization has to restore."""

    kept: list[list[Tensor]] | None = None


_running = _Running()


def keep_what_was_put_in() -> None:
    """Let ``init_weights`` leave injected tensors unchanged, unless a checkpoint brings them."""
    if getattr(BaseModule.init_weights, _MARK, False):
        return
    initialize, load = BaseModule.init_weights, PretrainedInit.__call__

    @functools.wraps(initialize)
    def init_weights(self: BaseModule) -> Any:
        if _running.kept is not None:
            return initialize(self)
        _running.kept = [[tensor, tensor.detach().clone()] for tensor in put_in(self)]
        try:
            return initialize(self)
        finally:
            with torch.no_grad():
                for tensor, value in _running.kept:
                    tensor.copy_(value)
            _running.kept = None

    @functools.wraps(load)
    def call(self: PretrainedInit, module: nn.Module) -> Any:
        pairs = _running.kept or []
        before = [tensor.detach().clone() for tensor, _ in pairs]
        result = load(self, module)
        for pair, was in zip(pairs, before, strict=True):
            if not torch.equal(pair[0], was):
                pair[1] = pair[0].detach().clone()
        return result

    setattr(init_weights, _MARK, True)
    BaseModule.init_weights, PretrainedInit.__call__ = init_weights, call


def put_in(model: nn.Module) -> list[Tensor]:
    """Return every tensor that an injection or an ``act_cfg`` put into a model."""
    holders = [module for module in model.modules() if "_quac_injection" in module.__dict__]
    planned = [module for module in model.modules() if plan_of(module) is not None]
    injected = [tensor for holder in holders for tensor in adapter_state(holder).values()]
    return injected + [
        tensor for module in planned for name, tensor in module.state_dict().items() if not name.startswith("host.")
    ]
