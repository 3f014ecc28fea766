"""The hooks that are put on layers of a host: plain functions that call a child module of the layer by its name.

So deepcopy and pickle take them along, and each copy's hooks call the copy's own modules.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import SymInt, Tensor, nn

TAP_NAME = "quac_tap"
AFTER_NAME = "quac_last"
PRIOR_NAME = "quac_prior"
PRIOR_TAP_NAME = "quac_prior_tap"


def tap_pre_hook(layer: Any, args: tuple, kwargs: dict) -> None:
    """Show the tap the images, the layer's first argument, before its layer runs."""
    layer.quac_tap(args[0] if args else next(iter(kwargs.values()), None))


def tap_hook(layer: Any, args: tuple, output: Any) -> None:
    """Show the tap the output of its layer."""
    layer.quac_tap.mark(output)


def prior_tap_pre_hook(layer: Any, args: tuple, kwargs: dict) -> None:
    """The same for a prior whose quality function is another one."""
    layer.quac_prior_tap(args[0] if args else next(iter(kwargs.values()), None))


def prior_tap_hook(layer: Any, args: tuple, output: Any) -> None:
    """The same for a prior whose quality function is another one."""
    layer.quac_prior_tap.mark(output)


def prior_hook(layer: Any, args: tuple, kwargs: dict, output: Any) -> Any:
    """Repair the output of a layer, whose call may tell the grid that its tokens stand on."""
    return layer.quac_prior(output, grid=_grid_of(layer, args, kwargs, output))


def _grid_of(layer: Any, args: tuple, kwargs: dict, output: Any) -> tuple[int, int] | None:
    """(h, w) of tokens (B, N, C): OpenMMLab's blocks and timm's PVTs are called with it, detectron2's Swin notes it."""
    if not isinstance(output, Tensor) or output.ndim != 3:
        return None
    for value in (*args[1:], *kwargs.values(), (getattr(layer, "H", None), getattr(layer, "W", None))):
        if isinstance(value, (tuple, list)) and len(value) == 2 and all(map(_is_number, value)):
            height, width = (int(n) if isinstance(n, Tensor) else n for n in value)
            if 1 < height * width <= output.shape[1]:
                return height, width
    return None


def _is_number(value: Any) -> bool:
    """Sizes are tensors while torch.jit.trace runs."""
    return isinstance(value, (int, SymInt)) or (isinstance(value, Tensor) and torch.jit.is_tracing())


def after_hook(layer: Any, args: tuple, output: Any) -> Any:
    """Activate the output of a layer."""
    return layer.quac_last(output)


TAP_HOOKS = {TAP_NAME: (tap_pre_hook, tap_hook), PRIOR_TAP_NAME: (prior_tap_pre_hook, prior_tap_hook)}


def add_prior_hook(layer: nn.Module) -> None:
    """Repair the output of a layer before anybody else's hook sees it, and behind the taps, which mark it."""
    layer.register_forward_hook(prior_hook, prepend=True, with_kwargs=True)
    taps = [key for key, hook in layer._forward_hooks.items() if hook in (tap_hook, prior_tap_hook)]
    for key in reversed(taps):
        layer._forward_hooks.move_to_end(key, last=False)  # type: ignore[attr-defined]


def remove_hooks(layer: nn.Module, *functions: Any) -> None:
    """Take these hooks off a layer; by function, so that it works on deep copies too."""
    for hooks in (layer._forward_pre_hooks, layer._forward_hooks):
        for key in [key for key, hook in hooks.items() if hook in functions]:
            del hooks[key]
            for table in (layer._forward_pre_hooks_with_kwargs, layer._forward_hooks_with_kwargs):
                table.pop(key, None)
