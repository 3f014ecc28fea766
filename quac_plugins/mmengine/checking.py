"""Checks of this package's options in a config, before anything is built; an error begins with the option's path."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmengine.registry import MODELS
from torch import nn

from quac_plugins.core.inject import PriorConfig, QuACConfig
from quac_plugins.core.options import named, read_options, whole_number
from quac_plugins.core.quality.registry import resolve_quality
from quac_plugins.mmengine.activations import PLANNED, planned_config

HOLDERS = ("QuACBackbone", "QuACResNet", "DegradationPrior")
OWN = ("backbone", "pretrained", "input_size")  # what a holder takes besides options of QuACConfig and PriorConfig
_FUNCTIONS = ("build_quac_backbone", "build_quac_resnet", "build_prior_backbone")  # as new configs name them


class SiteError(ValueError):
    """A backbone cannot do what ``options`` ask for; ``key`` is the option's place below the backbone."""

    def __init__(self, key: str, options: Any, message: str):
        super().__init__(f"{key}: {message}")
        self.options = options


def walk(cfg: Any, path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield every dict in a config with its path, outer dicts first."""
    if isinstance(cfg, Mapping):
        yield path, cfg
        parts = [(f"{path}.{key}", value) for key, value in cfg.items()]
    elif isinstance(cfg, Sequence) and not isinstance(cfg, str):
        parts = [(f"{path}[{index}]", value) for index, value in enumerate(cfg)]
    else:
        return
    for at, value in parts:
        yield from walk(value, at)


def path_of(cfg: Any, options: Any, path: str) -> str | None:
    """Return the path in a config of the QuAC backbone that has these options; None if there is none."""
    holders = [(at, part) for at, part in walk(cfg, path) if name_of(part) in HOLDERS]
    parts_of = [(at, [part.get("quac") or {}, part.get("prior"), _options_of_prior(part)]) for at, part in holders]
    same = [at for at, parts in parts_of if any(part is options for part in parts)]
    alike = [at for at, parts in parts_of if options in parts]
    return next(iter([*same, *alike]), None)  # of two with equal options the very one, unless the config was copied


def name_of(cfg: Mapping[str, Any]) -> str:
    """Return the registry's name of a config's ``type``, without its scope; "" without a type."""
    kind = cfg.get("type")
    name = kind.rpartition(".")[2] if isinstance(kind, str) else getattr(kind, "__name__", "")
    return dict(zip(_FUNCTIONS, HOLDERS, strict=True)).get(name, name)


def options_in(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments in a config, without ``type``."""
    return {key: value for key, value in cfg.items() if key not in ("type", "_scope_")}


def _options_of_prior(cfg: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options_in(cfg).items() if key not in OWN}


def check_config(cfg: Any, path: str) -> None:
    """Check every option of this package in a config.

    Raises:
        ValueError: an option is unknown, or its type or value is wrong; the message begins with its path.
    """
    for at, part in walk(cfg, path):
        name = name_of(part)
        if name in HOLDERS:
            _check_holder(name, part, at)
        elif name in PLANNED and "activation" not in part:
            _check_plan(part, at)


def check_input_size(value: Any) -> None:
    """Raise a ValueError unless the value is None or (C, H, W)."""
    if value is None:
        return
    if not isinstance(value, (tuple, list)) or len(value) != 3:
        raise ValueError(f"must be (C, H, W) of the pictures that the backbone takes, got {value!r}")
    for what, number in zip("CHW", value, strict=True):
        whole_number(what, number)


def _check_holder(name: str, cfg: Mapping[str, Any], path: str) -> None:
    if name == "DegradationPrior":
        read_options(PriorConfig, _options_of_prior(cfg), path)
    else:
        for key, cls in (("quac", QuACConfig), ("prior", PriorConfig)):
            if cfg.get(key) is not None:
                read_options(cls, cfg[key], f"{path}.{key}")
        unknown = set(options_in(cfg)) - {"quac", "prior", *OWN}
        if name == "QuACBackbone" and unknown:
            raise ValueError(f"{path}.{sorted(unknown)[0]}: QuACBackbone takes quac, prior, {', '.join(OWN)}")
    with named(f"{path}.input_size"):
        check_input_size(cfg.get("input_size"))
    if name != "QuACResNet" and not isinstance(cfg.get("backbone"), (Mapping, nn.Module)):
        raise ValueError(f"{path}.backbone: must be the config of a backbone, got {cfg.get('backbone')!r}")


def _check_plan(cfg: Mapping[str, Any], path: str) -> None:
    options = {key: value for key, value in options_in(cfg).items() if key not in ("inplace", "host")}
    known = list(inspect.signature(QuACConfig).parameters)
    for key, value in options.items():
        where = f"{path}.{key}" if key in known else path
        with named(where):
            planned_config("acon", {key: value})
            if key == "quality":
                resolve_quality(value)
    host = cfg.get("host")
    if host is None:
        return
    if not isinstance(host, Mapping) or "type" not in host or name_of(host) in PLANNED:
        raise ValueError(
            f"{path}.host: must be a dict with the type of the activation that is preserved, such as "
            f"dict(type='GELU'), got {host!r}"
        )
    try:
        MODELS.build(dict(host))
    except Exception as error:
        raise ValueError(f"{path}.host: {error.args[0] if error.args else error}") from error
