"""The facts of timm's networks, from their configs and attributes."""

from __future__ import annotations

from typing import Any

from torch import nn

from quac_plugins.core.host.facts import add_reader


@add_reader
def read_facts(model: nn.Module) -> dict[str, Any]:
    """Read the fields of :class:`HostFacts` from a network's ``pretrained_cfg`` and attributes."""
    own_cfg = getattr(model, "pretrained_cfg", None)
    cfg = own_cfg or getattr(model, "default_cfg", None)
    own_cfg, cfg = (value if isinstance(value, dict) else {} for value in (own_cfg, cfg))
    name, classifiers = own_cfg.get("architecture"), own_cfg.get("classifier") or ()
    said = cfg.get("mean") is not None and cfg.get("std") is not None
    in_chans, prefix = (getattr(model, name, None) for name in ("in_chans", "num_prefix_tokens"))
    return {
        "architecture": name if isinstance(name, str) and name else None,
        "tag": own_cfg.get("tag"),
        "normalization": (tuple(cfg["mean"]), tuple(cfg["std"])) if said else None,
        "input_size": _input_size(model, cfg.get("input_size")),
        "in_chans": in_chans if isinstance(in_chans, int) else None,
        "prefix_tokens": prefix if isinstance(prefix, int) else None,
        "stage_ends": _stage_ends(model),
        "classifiers": (classifiers,) if isinstance(classifiers, str) else tuple(filter(None, classifiers)),
        "gives_features": getattr(model, "num_classes", None) == 0 or None,
    }


def _input_size(model: nn.Module, size: Any) -> tuple[int, int, int] | None:
    """Return (C, H, W): the size of the built network counts before the size of its weights' training."""
    built = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if isinstance(built, (tuple, list)) and len(built) == 2:
        return (size[0] if size else 3), built[0], built[1]
    return tuple(size) if size else None  # type: ignore[return-value]


def _stage_ends(model: nn.Module) -> tuple[str, ...]:
    """Return the names, in this model, of the modules in ``feature_info``."""
    info: Any = getattr(model, "feature_info", ())
    entries = [info[i] for i in range(len(info))] if hasattr(info, "__len__") else []  # a list, or what acts as one
    wanted = {_flat(str(entry.get("module"))) for entry in entries if isinstance(entry, dict)}
    if not wanted:
        return ()
    # wrappers of features have the network as their only child, or those layers that they need under flat names
    inside = f"{next(iter(model._modules))}." if len(model._modules) == 1 else ""
    by_flat_name = {_flat(name.removeprefix(inside)): name for name, _ in model.named_modules()}
    if not isinstance(info, (list, tuple)):
        wanted &= by_flat_name.keys()
    return tuple(by_flat_name.get(name, name) for name in sorted(wanted))


def _flat(name: str) -> str:
    return name.replace(".", "_")
