"""Modules that run their children themselves, and so would run what is put behind them as one more of them.

A Sequential, or any module that does the same in its own words, runs it in the right place: after the others. Others
(a block that concatenates what its children return, a list that is told to its parent) take no further child.
"""

from __future__ import annotations

from collections import Counter
from types import FunctionType

from torch import nn

from quac_plugins.core.hooks import PRIOR_NAME, TAP_NAME, add_hook, prior_hook, remove_hooks
from quac_plugins.core.inject.example import Example
from quac_plugins.core.inject.trace import OURS, Trace, trace
from quac_plugins.core.module_names import module_at

_CHILDREN = {"children", "named_children", "_modules"}  # how a module's code names them
# classes whose code names their children, as they turned out to be
_chains: set[type[nn.Module]] = set()
_others: set[type[nn.Module]] = set()


def runs_children(module: nn.Module) -> bool:
    """Return whether a module runs its children one after the other, a new last child included.

    Example:
        >>> runs_children(nn.Sequential()), runs_children(nn.ModuleList()), runs_children(nn.ReLU())
        (True, False, False)
    """
    plain = isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
    return plain or type(module) in _chains


def note_chain(module: nn.Module) -> None:
    """Remember that the modules of this class run inserted children, if they run their children at all."""
    if _may_run_children(module):
        _chains.add(type(module))


def leave_out(model: nn.Module, seen: Trace) -> None:
    """Take out of a trace the containers that do something else with their children, which are no places."""
    for name in {feature.name for feature in seen.features}:
        module = module_at(model, name)
        if isinstance(module, (nn.Sequential, nn.ModuleDict, nn.ModuleList)) and not runs_children(module):
            seen.features = [feature for feature in seen.features if feature.name != name]
            seen.others[name] = "runs its children by itself, and would run one more"


def let_chains_run(model: nn.Module, names: list[str], example: Example | None) -> None:
    """Take the prior's hook off modules that turn out to run it already.

    Raises:
        ValueError: a module runs the prior, but not behind its other children.
    """
    doubtful = [name for name in names if _may_run_children(module_at(model, name))]
    if not doubtful:
        return
    called = Counter(feature.name for feature in trace(model, example).features)
    twice = [name for name in doubtful if called[f"{name}.{PRIOR_NAME}"] > 1]
    for name in twice:
        remove_hooks(module_at(model, name), prior_hook)
    try:
        if twice:
            _check(trace(model, example), twice)
    except Exception:
        for name in twice:
            add_hook(module_at(model, name), PRIOR_NAME)
        raise
    for name in doubtful:
        (_chains if name in twice else _others).add(type(module_at(model, name)))


def check_tapped(model: nn.Module, seen: Trace, example: Example | None, tokens: bool = False) -> None:
    """Refuse a host whose first layer would return another output with a tap, which returns its input, inside.

    Raises:
        ValueError: the layer runs its children by itself, and not one after the other.
    """
    layer = module_at(model, seen.tap or "")
    runs = isinstance(layer, (nn.Sequential, nn.ModuleList, nn.ModuleDict)) or _may_run_children(layer)
    if seen.tap is None or not runs or runs_children(layer) or not layer._modules or TAP_NAME in layer._modules:
        return
    layer.add_module(TAP_NAME, nn.Identity())
    try:
        again = trace(model, example, tokens=tokens)
        same = [feature for feature in again.features if OURS not in feature.name] == seen.features
    except RuntimeError:
        same = False
    finally:
        delattr(layer, TAP_NAME)
    if not same:
        raise ValueError(
            f"layer {seen.tap or 'the model itself'!r} ({type(layer).__name__}) sees the images first, runs its "
            "children by itself, and one more, which computes their quality, would change what it returns. Put a layer "
            "before it that can be that first layer: nn.Sequential(nn.Identity(), layer) in its place"
        )


def _check(seen: Trace, names: list[str]) -> None:
    for name in names:
        nodes = [feature.node for feature in seen.features if feature.name in (name, f"{name}.{PRIOR_NAME}")]
        if len(nodes) != 2 or nodes[0] != nodes[1]:
            raise ValueError(f"site={name!r}: it runs its children by itself, and not one after the other")


def _may_run_children(module: nn.Module) -> bool:
    """Return whether the code of a module's class names its children, with a purpose that is not known yet."""
    if runs_children(module) or type(module) in _others:
        return False
    classes = [cls for cls in type(module).__mro__ if issubclass(cls, nn.Module) and cls is not nn.Module]
    methods = [f for cls in classes for f in vars(cls).values() if isinstance(f, FunctionType)]
    return any(_CHILDREN & set(f.__code__.co_names) for f in methods if f.__name__ != "__init__")
