"""Refusing to save tensors that nobody could load: without numbers, or computed by torch from other tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm


def check_savable(modules: Mapping[str, nn.Module], state: Mapping[str, Any]) -> None:
    """Refuse a state dict that a fresh network could not take.

    Args:
        modules: name → module; their children are checked too.
        state: name → tensor.

    Raises:
        ValueError: a tensor is on the meta device, holds NaN or infinity or is no tensor, or a layer is pruned or
            parametrized; the message names the tensor and the remedy.
    """
    for name, module in modules.items():
        for inner, part in module.named_modules():
            where = f"{name}.{inner}".strip(".")
            for tensor, what, undo in _computed(part):
                raise ValueError(
                    f"tensor {f'{where}.{tensor}'.strip('.')!r} is {what}, so no fresh network could load it. Make it "
                    f"a plain one first: {undo}"
                )
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            if not name.endswith("_extra_state"):
                raise ValueError(f"{name!r} is no tensor but a {type(tensor).__name__} (quantized?): save it before")
        elif tensor.is_meta:
            raise ValueError(f"tensor {name!r} is on the meta device and has no numbers; load weights into it first")
        elif tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"tensor {name!r} holds NaN or infinity; go back to an earlier state, and train with a lower rate"
            )


def _computed(module: nn.Module) -> list[tuple[str, str, str]]:
    """List what torch computes anew in each forward: tensor, kind, and how to undo it."""
    computed = []
    if parametrize.is_parametrized(module):
        for tensor in module.parametrizations:  # type: ignore[union-attr]
            undo = f"torch.nn.utils.parametrize.remove_parametrizations(layer, {tensor!r})"
            computed.append((str(tensor), "parametrized", undo))
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod):
            tensor = hook._tensor_name
            computed.append((tensor, "pruned", f"torch.nn.utils.prune.remove(layer, {tensor!r})"))
        elif isinstance(hook, (WeightNorm, SpectralNorm)):
            kind = "weight_norm" if isinstance(hook, WeightNorm) else "spectral_norm"
            computed.append((hook.name, f"under {kind}", f"torch.nn.utils.remove_{kind}(layer)"))
    return computed
