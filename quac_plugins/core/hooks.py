"""The hooks that are put on layers of a host: plain functions that call a child module of the layer by its name.

So deepcopy and pickle take them along, and each copy's hooks call the copy's own modules.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import SymInt, Tensor, nn

TAP_NAME = "quac_tap"
AFTER_NAME = "quac_last"
PRIOR_NAME = "quac_prior"
PRIOR_TAP_NAME = "quac_prior_tap"
SIZE_NAME = "quac_size"
OUR_CHILDREN = (SIZE_NAME, TAP_NAME, PRIOR_TAP_NAME, PRIOR_NAME, AFTER_NAME)


def tap_pre_hook(layer: Any, args: tuple, kwargs: dict) -> None:
    """Show the tap the images, the layer's first argument, before its layer runs."""
    layer.quac_tap(args[0] if args else next(iter(kwargs.values()), None), True)


def tap_hook(layer: Any, args: tuple, output: Any) -> None:
    """Show the tap the output of its layer."""
    layer.quac_tap.mark(output)


def prior_tap_pre_hook(layer: Any, args: tuple, kwargs: dict) -> None:
    """Show the images to the second tap, of a prior with its own quality function."""
    layer.quac_prior_tap(args[0] if args else next(iter(kwargs.values()), None), True)


def prior_tap_hook(layer: Any, args: tuple, output: Any) -> None:
    """Show the output of the layer to the second tap, of a prior with its own quality function."""
    layer.quac_prior_tap.mark(output)


def size_pre_hook(layer: Any, args: tuple, kwargs: dict) -> None:
    """Note the size of the images, the layer's first argument."""
    layer.quac_size(args[0] if args else next(iter(kwargs.values()), None), True)


def prior_hook(layer: Any, args: tuple, kwargs: dict, output: Any) -> Any:
    """Repair the output of a layer by its prior; the call may tell the grid of the layer's tokens."""
    prior = layer.quac_prior
    first = next(iter(layer._forward_hooks.values()), None) is prior_hook  # or another hook has seen the output
    if first and getattr(prior, "over", False) and not layer._forward_pre_hooks:  # of an identity they see it as well
        return prior(output, over=True)
    return prior(output, grid=_grid_of(layer, args, kwargs, output))


def _grid_of(layer: Any, args: tuple, kwargs: dict, output: Any) -> tuple[int, int] | None:
    """Return (h, w) of tokens: an argument in OpenMMLab and timm's PVTs, an attribute in detectron2's Swin."""
    if not isinstance(output, Tensor) or output.ndim != 3:
        return None
    for value in (*args[1:], *kwargs.values(), (getattr(layer, "H", None), getattr(layer, "W", None))):
        if isinstance(value, (tuple, list)) and len(value) == 2 and all(map(_is_number, value)):
            height, width = (int(n) if isinstance(n, Tensor) else n for n in value)
            if 1 < height * width <= output.shape[1]:
                return height, width
    return None


def _is_number(value: Any) -> bool:
    """Return whether a size is a number; torch.jit.trace makes tensors of sizes."""
    return isinstance(value, (int, SymInt)) or (isinstance(value, Tensor) and torch.jit.is_tracing())


def after_hook(layer: Any, args: tuple, output: Any) -> Any:
    """Activate the output of a layer."""
    return layer.quac_last(output)


CONTEXTS = "_quac_contexts"  # attribute of the model's parts
WHOLE = "_quac_whole"  # attribute of the model itself, which may be a part of another


def enter_hook(part: Any, args: tuple) -> None:
    """Tell contexts that a part of the model is called."""
    for context in part.__dict__.get(CONTEXTS, ()):
        context.enter(part, args, False)


def leave_hook(part: Any, args: tuple, output: Any) -> None:
    """Tell contexts that a part of the model has returned ``output``."""
    for context in part.__dict__.get(CONTEXTS, ()):
        context.leave(part, output)


def enter_model_hook(model: Any, args: tuple) -> None:
    """Tell contexts that the model itself is called."""
    for context in model.__dict__.get(WHOLE, ()):
        context.enter(model, args, True)


def leave_model_hook(model: Any, args: tuple, output: Any) -> None:
    """Tell contexts that the model itself has returned ``output``."""
    for context in model.__dict__.get(WHOLE, ()):
        context.leave(model, output)


CALL_HOOKS = {CONTEXTS: (enter_hook, leave_hook), WHOLE: (enter_model_hook, leave_model_hook)}
BEHIND: dict[str, Any] = {PRIOR_NAME: prior_hook, AFTER_NAME: after_hook}
WITH_TAP = "forward_with_tap"  # how timm's Xception calls blocks in forward_intermediates, which runs no hook
TAP_HOOKS = {TAP_NAME: (tap_pre_hook, tap_hook), PRIOR_TAP_NAME: (prior_tap_pre_hook, prior_tap_hook)}


def add_hook(layer: nn.Module, name: str) -> None:
    """Let a layer call the prior or the activation behind it, before anybody else's hook sees what the layer returns.

    The taps come first, which mark the layer's own output, then the prior, then the activation.
    """
    hook = BEHIND[name]
    layer.register_forward_hook(hook, with_kwargs=name == PRIOR_NAME)
    first = (tap_hook, prior_tap_hook, *BEHIND.values())
    ours = {key: first.index(other) for key, other in layer._forward_hooks.items() if other in first}
    for key in sorted(ours, key=lambda key: ours[key], reverse=True):
        layer._forward_hooks.move_to_end(key, last=False)  # type: ignore[attr-defined]
    if callable(getattr(type(layer), WITH_TAP, None)):
        layer.__dict__[WITH_TAP] = partial(_with_tap, layer)  # and no method: a copy of it calls the copy of the layer


def _with_tap(layer: Any, *args: Any, **kwargs: Any) -> Any:
    """Return the output of a block, after the prior and the activation behind it, and the block's inner features."""
    output, *inner = getattr(type(layer), WITH_TAP)(layer, *args, **kwargs)
    if PRIOR_NAME in layer._modules:
        output = prior_hook(layer, args, kwargs, output)
    if AFTER_NAME in layer._modules:
        output = after_hook(layer, args, output)
    return (output, *inner)


def remove_hooks(layer: nn.Module, *functions: Any) -> None:
    """Take hooks off a layer; the functions identify the hooks, so deep copies work too."""
    for hooks in (layer._forward_pre_hooks, layer._forward_hooks):
        for key in [key for key, hook in hooks.items() if hook in functions]:
            del hooks[key]
            for table in (
                layer._forward_pre_hooks_with_kwargs, layer._forward_hooks_with_kwargs,
                layer._forward_hooks_always_called,
            ):  # fmt: skip
                table.pop(key, None)
    if not any(hook in BEHIND.values() for hook in layer._forward_hooks.values()):
        layer.__dict__.pop(WITH_TAP, None)


_IS = {"training", "_parameters", "_buffers", "_non_persistent_buffers_set", "_modules"}  # what a module is


def _tables() -> dict[str, Any]:
    """Return the empty tables of hooks that a new module has."""
    return {name: value for name, value in vars(nn.Module()).items() if name not in _IS}


def without_hooks(module: nn.Module) -> nn.Module:
    """Give a shallow copy of a module its own empty tables of hooks, and return the copy."""
    module.__dict__.update(_tables())
    return module


def move_all(old: nn.Module, new: nn.Module) -> None:
    """Move hooks of every kind and foreign attributes from a module to the module that replaces it.

    The very tables move, so that the order stays and handles that others keep still remove their hooks. Our own
    children (a tap, a prior) go with the hooks that call them.

    Args:
        old: loses its hooks.
        new: has none yet.
    """
    tables = _tables()
    new.__dict__.update({name: old.__dict__.get(name, empty) for name, empty in tables.items()})
    without_hooks(old)
    new.__dict__.update(_foreign(old, new))
    for name in [name for name in old._modules if name in OUR_CHILDREN]:
        new.add_module(name, old.get_submodule(name))
        delattr(old, name)


def _foreign(module: nn.Module, other: nn.Module) -> dict[str, Any]:
    """Return the attributes of a module that neither its class nor the other module's class mentions."""
    known = set(vars(nn.Module()))
    for cls in {*type(module).__mro__, *type(other).__mro__} - set(nn.Module.__mro__):
        known |= {*vars(cls), *getattr(cls, "__annotations__", ())}
        for function in vars(cls).values():
            code = getattr(getattr(function, "fget", function), "__code__", None)
            known |= set(code.co_names) if code is not None else set()
    its_own = {name for name, value in vars(module).items() if getattr(value, "__self__", None) is module}  # methods
    return {name: value for name, value in vars(module).items() if name not in known | its_own}
