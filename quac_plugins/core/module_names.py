"""The names of the parts of a network, without wrappers, and one for each part.

``torch.compile``, DistributedDataParallel and their like put a name of their own between a module and its parts
(``backbone._orig_mod.conv1``). A module that hangs at several places has several names. Here wrappers have none, and a
module has the first of its names, in the order in which the network registers them, whatever is put in.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.optim.swa_utils import AveragedModel

_TRANSPARENT = (
    "_orig_mod",
    "_checkpoint_wrapped_module",
    "_fsdp_wrapped_module",
)  # of torch.compile, torch's checkpoint_wrapper and FullyShardedDataParallel
_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)  # whose "module" is the network


def paths(model: nn.Module) -> dict[str, str]:
    """Return path → name for every module: paths are the state dict's, names leave wrappers out.

    Example:
        >>> paths(nn.Sequential(nn.DataParallel(nn.ReLU())))
        {'': '', '0': '0', '0.module': '0'}
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    names = {"": ""}
    for path in modules:
        if path:
            above, _, name = path.rpartition(".")
            wrapped = name in _TRANSPARENT or (name == "module" and isinstance(modules[above], _WRAPPERS))
            names[path] = names[above] if wrapped else f"{names[above]}.{name}" if names[above] else name
    return names


def tensor_names(model: nn.Module) -> Callable[[str], str]:
    """Return a function that takes the wrappers out of a name of a model's state dict."""
    known = paths(model)

    def name_of(name: str) -> str:
        above, _, leaf = name.rpartition(".")
        above = known.get(above, above)
        return f"{above}.{leaf}" if above else leaf

    return name_of


def parts(model: nn.Module) -> dict[str, nn.Module]:
    """Return name → module, in the order of ``named_modules``, without wrappers and with each module once.

    Example:
        >>> shared = nn.ReLU()
        >>> list(parts(nn.Sequential(shared, nn.DataParallel(nn.Sequential(nn.Linear(2, 2), shared)))))
        ['', '0', '1', '1.0']
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    first: dict[int, tuple[str, nn.Module]] = {}
    for path, name in paths(model).items():
        if _wrapped(modules[path]) is None:
            first.setdefault(id(modules[path]), (name, modules[path]))
    return dict(first.values())


def module_at(model: nn.Module, name: str) -> nn.Module:
    """Return the module of a name of :func:`parts`, or of another of its names; AttributeError if there is none."""
    module = model
    for step in name.split(".") if name else []:
        while (wrapped := _wrapped(module)) is not None and step not in module._modules:
            module = wrapped
        module = module.get_submodule(step)
    while (wrapped := _wrapped(module)) is not None:
        module = wrapped
    return module


def _wrapped(module: nn.Module) -> nn.Module | None:
    """Return the module inside a wrapper, or None if the module is no wrapper."""
    names = (*_TRANSPARENT, *(["module"] if isinstance(module, _WRAPPERS) else []))
    return next((child for name in names if (child := module._modules.get(name)) is not None), None)
