"""Our options in a config, checked before anything is built; an error begins with the path of what is wrong."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from torch import nn

from quac_plugins.core.inject import PriorConfig, QuACConfig
from quac_plugins.core.options import named, one_of
from quac_plugins.core.quality.table import resolve_quality
from quac_plugins.mmengine.activations import PLANNED, planned_config

HOLDERS = ("QuACBackbone", "QuACResNet", "DegradationPrior")
_FUNCTIONS = ("build_quac_backbone", "build_quac_resnet", "build_prior_backbone")  # as new configs name them


class SiteError(ValueError):
    """A site that the backbone does not have; ``given`` are the options that ask for it, ``key`` says which of them."""

    def __init__(self, key: str, given: Any, message: str):
        super().__init__(message)
        self.key, self.given = key, given


def path_of(cfg: Any, given: Any, path: str) -> str | None:
    """Where in a config the options ``given`` are; None if nowhere."""
    if isinstance(cfg, Mapping):
        options = {key: value for key, value in cfg.items() if key not in ("type", "backbone", "_scope_")}
        if isinstance(given, Mapping) and given in (cfg, options):
            return path
        parts = [(f"{path}.{key}", value) for key, value in cfg.items()]
    elif isinstance(cfg, Sequence) and not isinstance(cfg, str):
        parts = [(f"{path}[{index}]", value) for index, value in enumerate(cfg)]
    else:
        return None
    return next((found for at, value in parts if (found := path_of(value, given, at)) is not None), None)


def name_of(cfg: Mapping[str, Any]) -> str:
    """The name in the registry of what a config builds, without its scope; "" if it names nothing."""
    kind = cfg.get("type")
    name = kind.rpartition(".")[2] if isinstance(kind, str) else getattr(kind, "__name__", "")
    return dict(zip(_FUNCTIONS, HOLDERS, strict=True)).get(name, name)


def options_in(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that a config gives to what it builds."""
    return {key: value for key, value in cfg.items() if key not in ("type", "_scope_")}


def check_config(cfg: Any, path: str) -> None:
    """Look through a config for what is ours.

    Raises:
        ValueError: an option is not known, of another type, or cannot be; the message begins with its path.
    """
    if isinstance(cfg, Mapping):
        name = name_of(cfg)
        if name in HOLDERS:
            _check_holder(name, cfg, path)
        elif name in PLANNED and "activation" not in cfg:
            _check_plan(name, cfg, path)
        for key, value in cfg.items():
            check_config(value, f"{path}.{key}")
    elif isinstance(cfg, Sequence) and not isinstance(cfg, str):
        for index, value in enumerate(cfg):
            check_config(value, f"{path}[{index}]")


def options_of(cls: Any, given: Any, path: str) -> Any:
    """A QuACConfig or PriorConfig of what a config says; the errors of :func:`check_config`."""
    if isinstance(given, cls):
        return given
    if not isinstance(given, Mapping):
        raise ValueError(f"{path}: must be a dict of options of {cls.__name__}, got {given!r}")
    known = [field.name for field in fields(cls)]
    for key in given:
        with named(f"{path}.{key}"):
            one_of("option", key, known)
    for key, value in given.items():
        with named(f"{path}.{key}"):
            if key not in ("mean", "std"):  # which go together
                cls(**{key: value})
            if key == "quality":
                resolve_quality(value)
    with named(path):
        return cls(**given)


def _check_holder(name: str, cfg: Mapping[str, Any], path: str) -> None:
    if name == "DegradationPrior":
        options_of(PriorConfig, {k: v for k, v in options_in(cfg).items() if k != "backbone"}, path)
    else:
        for key, cls in (("quac", QuACConfig), ("prior", PriorConfig)):
            if cfg.get(key) is not None:
                options_of(cls, cfg[key], f"{path}.{key}")
        unknown = set(options_in(cfg)) - {"backbone", "quac", "prior"}
        if name == "QuACBackbone" and unknown:
            raise ValueError(f"{path}.{sorted(unknown)[0]}: QuACBackbone takes backbone, quac and prior")
    if name != "QuACResNet" and not isinstance(cfg.get("backbone"), (Mapping, nn.Module)):
        raise ValueError(f"{path}.backbone: must be the config of a backbone, got {cfg.get('backbone')!r}")


def _check_plan(name: str, cfg: Mapping[str, Any], path: str) -> None:
    given = {key: value for key, value in cfg.items() if key not in ("type", "inplace", "host", "_scope_")}
    known = list(inspect.signature(QuACConfig).parameters)
    for key, value in given.items():
        where = f"{path}.{key}" if key in known else path
        with named(where):
            planned_config("acon", {key: value})
            if key == "quality":
                resolve_quality(value)
