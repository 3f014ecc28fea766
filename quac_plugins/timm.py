"""The timm door: `NAME_qacon` for every architecture of timm.

``import quac_plugins`` registers the names; ``timm.create_model("resnet50_qacon")`` builds timm's own ``resnet50`` and
puts QuAC into it. Everything that timm's factory takes passes through.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any

import timm
from timm.models import DefaultCfg, PretrainedCfg, load_pretrained, register_model, register_notrace_module
from torch import nn

from quac_plugins.core.activations import ACTIVATIONS
from quac_plugins.core.inject import QuACConfig, inject, injection_of
from quac_plugins.core.inject.surgery import WidthSwitch
from quac_plugins.core.quality.tap import QualityTap
from quac_plugins.hub import load_adapter
from quac_plugins.registry import published

SUFFIX = "_qacon"
OPTIONS = ("activation", "where", "quality", "init", "norm", "reduction")

# timm's register_model reads the pretrained configs of a name from this module-level table
default_cfgs: dict[str, Any] = {}
__all__: list[str] = []


def _entrypoint(base: str) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return create_qacon(base, pretrained, **kwargs)

    create.__name__ = create.__qualname__ = base + SUFFIX
    create.__module__ = __name__
    create.__doc__ = f"{base} with quality-adaptive activations; see :func:`quac_plugins.timm.create_qacon`."
    return create


def create_qacon(
    base: str,
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: Any = None,
    pretrained_model_args: dict[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build a timm model and put QuAC into it.

    Args:
        base: name of timm's architecture, such as ``"resnet50"``.
        pretrained: timm's weights for the base in a preserved host; where ``registry/timm.toml`` knows the name and
            tag, its published adapter over them.
        pretrained_cfg, pretrained_cfg_overlay, cache_dir, pretrained_model_args: as in ``timm.create_model``.
        **kwargs: ``activation``, ``where``, ``quality``, ``init``, ``norm``, ``reduction`` (see
            :class:`quac_plugins.QuACConfig`); everything else goes to the base.

    Raises:
        ValueError: an option is not known, or a pattern of ``where`` matches nothing.
        RuntimeError: pretrained weights are neither in the cache nor to be had.

    Example:
        >>> import timm, torch, quac_plugins
        >>> model = timm.create_model("test_resnet_qacon", num_classes=10, in_chans=1).eval()
        >>> model(torch.rand(2, 1, 64, 64)).shape
        torch.Size([2, 10])
    """
    given = {key: kwargs.pop(key) for key in OPTIONS if key in kwargs}
    config = QuACConfig(**given)
    source = _field(pretrained_cfg, "source")
    whole = source in ("hf-hub", "local-dir")  # a model that was saved with QuAC inside
    if pretrained and config.init == "paper" and not whole:
        raise ValueError(
            f"{base}{SUFFIX}: pretrained=True with init='paper' would put random activations into trained weights; "
            "use init='preserve', or pretrained=False"
        )
    entry = _published(base, pretrained_cfg) if pretrained and not whole else None
    if entry is not None:
        pretrained_cfg = entry.get("base", pretrained_cfg)
    if pretrained_model_args is not None:
        kwargs["pretrained_model_args"] = {k: v for k, v in pretrained_model_args.items() if k not in OPTIONS}
    try:
        model = timm.create_model(
            base,
            pretrained=pretrained and not whole,
            pretrained_cfg=pretrained_cfg,
            pretrained_cfg_overlay=pretrained_cfg_overlay,
            cache_dir=cache_dir,
            **kwargs,
        )
    except Exception as error:
        if pretrained and not whole and _is_network(error):
            raise RuntimeError(_not_found(base, pretrained_cfg)) from error
        raise
    if entry is None or given:
        inject(model, config)
    if entry is not None:  # alone, it also says what to put in; with options given, they must be its own
        load_adapter(model, entry["adapter"], revision=entry.get("revision"))
    _describe(model, base + SUFFIX)
    if pretrained and whole:
        in_chans = _field(model.pretrained_cfg, "input_size")[0]
        load_pretrained(
            model,
            pretrained_cfg=model.pretrained_cfg,  # type: ignore[arg-type]
            num_classes=getattr(model, "num_classes", 0),
            in_chans=kwargs.get("in_chans", in_chans),
            cache_dir=cache_dir,
        )
    return model


def _published(base: str, pretrained_cfg: Any) -> dict[str, Any] | None:
    """The registry's entry for a name and its tag; without a tag, for the base's default one."""
    name = base + SUFFIX
    tag = pretrained_cfg if isinstance(pretrained_cfg, str) else _field(pretrained_cfg, "tag")
    if pretrained_cfg is None:
        tag = _field(timm.get_pretrained_cfg(base), "tag")
    return published().get(f"{name}.{tag}" if tag else name)


def _field(cfg: Any, name: str) -> Any:
    return cfg.get(name) if isinstance(cfg, dict) else getattr(cfg, name, None)


def _describe(model: nn.Module, name: str) -> None:
    """Let timm's savers write the name and options with which ``create_model`` builds this model again."""
    record = injection_of(model)
    assert record is not None
    options = {key: value for key, value in record.config.to_dict().items() if key in OPTIONS}
    for attribute in ("pretrained_cfg", "default_cfg"):
        cfg = getattr(model, attribute, None)
        if isinstance(cfg, dict):
            record.attributes[attribute] = cfg
            setattr(model, attribute, {**cfg, "architecture": name})
    skipped = {f"{prefix}{leaf}" for prefix in record.prefixes() for leaf in ("p1", "p2", "beta")}
    own = getattr(model, "no_weight_decay", None)
    names = {*(own() if callable(own) else ()), *(name for name, _ in model.named_parameters() if name in skipped)}
    model.no_weight_decay = partial(_names, frozenset(names))  # type: ignore[assignment]
    record.added.append("no_weight_decay")
    record.attributes["_model_args"] = args = getattr(model, "_model_args", {})
    model._model_args = {**args, **options}  # type: ignore[assignment]


def _names(names: frozenset[str]) -> set[str]:
    """What timm's optimizers ask a model for: parameters without weight decay. It would pull p1 and p2 to 0."""
    return set(names)


def _is_network(error: BaseException) -> bool:
    """Whether weights could not be fetched, as huggingface_hub, urllib and requests say it."""
    seen: BaseException | None = error
    while seen is not None:
        module = type(seen).__module__.split(".")[0]
        if isinstance(seen, ConnectionError) or module in ("huggingface_hub", "urllib", "requests", "httpx", "httpx2"):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _not_found(base: str, pretrained_cfg: Any) -> str:
    tag = pretrained_cfg if isinstance(pretrained_cfg, str) else None
    name = f"{base}.{tag}" if tag else base
    cfg = timm.get_pretrained_cfg(name) if pretrained_cfg is None or tag else pretrained_cfg
    sources = [f"{key}={_field(cfg, key)!r}" for key in ("hf_hub_id", "url", "file") if _field(cfg, key)]
    return (
        f"no pretrained weights for {name}: looked for {' and '.join(sources) or 'a source, and found none'}, neither "
        "in the cache nor reachable. Without a network give a local file of the base's weights: "
        f"timm.create_model('{base}{SUFFIX}', pretrained=True, pretrained_cfg_overlay=dict(file='weights.safetensors'))"
    )


def _configs(base: str) -> DefaultCfg:
    """The base's pretrained configs, pointing where the base's weights are."""
    configs = getattr(sys.modules[timm.model_entrypoint(base).__module__], "default_cfgs", {}).get(base)
    if not isinstance(configs, DefaultCfg):
        return DefaultCfg(deque([""]), {"": PretrainedCfg()})
    cfgs = {}
    for tag, cfg in configs.cfgs.items():
        if cfg.hf_hub_id == "timm/":  # timm completes this with the name it registers, which here is not the base's
            cfg = copy(cfg)
            cfg.hf_hub_id = f"timm/{base}.{tag}" if tag else f"timm/{base}"
        cfgs[tag] = cfg
    return DefaultCfg(configs.tags, cfgs, configs.is_pretrained)


def register() -> list[str]:
    """Register ``NAME_qacon`` for every name of ``timm.list_models()`` that has none yet; returns the new names."""
    module = sys.modules[__name__]
    existing = set(timm.list_models())
    names = [name for name in sorted(existing) if not name.endswith(SUFFIX) and name + SUFFIX not in existing]
    for base in names:
        name = base + SUFFIX
        entry = _entrypoint(base)
        default_cfgs[name] = _configs(base)
        setattr(module, name, entry)
        vars(module)["__all__"] = [
            name
        ]  # timm looks every name up in this list: a long one would cost more than the rest
        register_model(entry)
    for cls in (*ACTIVATIONS.values(), WidthSwitch, QualityTap):
        register_notrace_module(cls)  # torch.fx feature extraction takes them whole
    vars(module)["__all__"] = sorted(default_cfgs)
    return [base + SUFFIX for base in names]
