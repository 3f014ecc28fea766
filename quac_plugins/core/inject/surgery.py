"""Putting activations into a built host and taking them out again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quac_plugins.core.activations import ChannelActivation
from quac_plugins.core.hooks import (
    AFTER_NAME,
    BEHIND,
    PRIOR_NAME,
    PRIOR_TAP_NAME,
    SIZE_NAME,
    TAP_NAME,
    add_hook,
    move_all,
    remove_hooks,
)
from quac_plugins.core.host.facts import facts_of
from quac_plugins.core.inject.config import QuACConfig
from quac_plugins.core.inject.containers import check_tapped, leave_out, let_chains_run, note_chain, runs_children
from quac_plugins.core.inject.example import Example
from quac_plugins.core.inject.images import Images, normalization_of
from quac_plugins.core.inject.record import (
    RECORD,
    Injection,
    PriorInjection,
    injection_of,
    names_in_host,
    nothing_inside,
    unwrap,
)
from quac_plugins.core.inject.sites import Site, find_sites
from quac_plugins.core.inject.tapping import listen, tap_for, unlisten, untap
from quac_plugins.core.inject.trace import Trace, trace
from quac_plugins.core.module_names import module_at
from quac_plugins.core.options import QualityOptions
from quac_plugins.core.prior.config import PriorConfig
from quac_plugins.core.prior.fdm import FDM, resolve_fdm
from quac_plugins.core.prior.grid import ImageSize, SizeNote
from quac_plugins.core.prior.margins import Margin, Mixture, put_inside
from quac_plugins.core.prior.routed import RoutedFDM
from quac_plugins.core.prior.sites import PriorSite, find_prior_sites, returns_new_memory
from quac_plugins.core.quality.context import QualityContext
from quac_plugins.core.quality.registry import QualityFunction, resolve_quality
from quac_plugins.core.quality.tap import QualityTap


class WidthSwitch(nn.Module):
    """An activation for each width, in the place of a host's module that is called with several widths.

    Args:
        sites: width → activation.
    """

    def __init__(self, sites: dict[int, ChannelActivation]):
        super().__init__()
        self.widths = nn.ModuleDict({str(width): site for width, site in sites.items()})
        self.channel_dim = next(iter(sites.values())).channel_dim

    def forward(self, x: Tensor, q: Tensor | None = None) -> Tensor:
        """Activate x (B, C, …) by the activation of its width; ValueError if there is none for C."""
        width = str(x.shape[self.channel_dim])
        if width not in self.widths:
            raise ValueError(f"no activation for {width} channels; there are: {', '.join(self.widths)}")
        return self.widths[width](x, q)


def inject(
    model: nn.Module,
    config: QuACConfig | PriorConfig | None = None,
    example: Example | None = None,
    **options: Any,
) -> nn.Module:
    """Put quality-adaptive activations, or a degradation prior, into a host, in place.

    A host may hold one of each; put the one in after the other.

    Args:
        model: any network on images (B, C, H, W).
        config: what and where; see :class:`QuACConfig` and :class:`PriorConfig`.
        example: images (B, C, H, W), used for their shape alone; needed when the host takes another size than its own
            facts tell (`HostFacts.input_size`), or than (B, 3, 224, 224). For a host with more arguments give all,
            the images first: a tuple ``(images, timestep)``, or a dict by name. Tokens (B, N, C) may take the place of
            images with ``tap="given"`` only.
        **options: not accepted; options belong into the config, as the error says.

    Returns:
        The model.

    Raises:
        TypeError: the config has another type, or an option was given without a config.
        ValueError: the model already holds activations, or a prior; a pattern of ``where`` or ``site`` matches nothing;
            a name is unknown; the example does not begin with images.
        RuntimeError: the host does not run on such images, or no layer of it sees the image.

    Example:
        >>> import timm, torch, quac_plugins as quac
        >>> host = timm.create_model("test_resnet").eval()
        >>> images = torch.rand(2, 3, 64, 64)
        >>> before = host(images)
        >>> _ = quac.inject(host, quac.QuACConfig(activation="qacon", where="spatial"))
        >>> _ = quac.inject(host, quac.PriorConfig(site="auto"))
        >>> torch.allclose(host(images), before)
        True
    """
    if options:
        kinds = [kind for kind in (QuACConfig, PriorConfig) if set(options) & set(kind.__dataclass_fields__)]
        kind = type(config) if config is not None else kinds[0] if kinds else QuACConfig
        told = ", ".join(f"{key}={value!r}" for key, value in options.items())
        raise TypeError(f"inject takes its options in a config: inject(model, {kind.__name__}({told}))")
    config = config if config is not None else QuACConfig()
    if not isinstance(config, (QuACConfig, PriorConfig)):
        raise TypeError(
            f"config must be a QuACConfig or a PriorConfig, got {type(config).__name__}: inject(model, "
            "QuACConfig(where=…))"
        )
    return inject_at(model, config, find_places, example)


@contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Make several injections into a plain host one step: after an error, everything is removed again."""
    plain = injection_of(model) is None
    try:
        yield
    except Exception:
        if plain and injection_of(model) is not None:
            remove(model)
        raise


def inject_at(
    model: nn.Module,
    config: QuACConfig | PriorConfig,
    find: Callable[[nn.Module, Any, Trace], list[Any]],
    example: Example | None = None,
) -> nn.Module:
    """Inject as :func:`inject` does, at the sites that ``find(model, config, seen)`` returns."""
    whole, model = model, unwrap(model)
    earlier = injection_of(model)
    holds = earlier is not None and (earlier.config if isinstance(config, QuACConfig) else earlier.prior)
    if holds:
        what = "QuAC" if isinstance(config, QuACConfig) else "a prior"
        raise ValueError(f"{type(model).__name__} already holds {what}; call quac_plugins.remove(model) first")
    _check_parts(model, config)
    quality = None
    if config.activation_class.needs_quality if isinstance(config, QuACConfig) else config.needs_quality:
        quality = resolve_quality(config.quality, config.quality_channels, config.quality_grad)
    # the quality of tokens cannot be computed, and they are no picture that a prior could repair
    tokens = isinstance(config, QuACConfig) and (quality is None or config.tap == "given")
    seen = trace(model, example, tokens=tokens)
    if quality is not None and seen.tap is None:
        raise RuntimeError(
            f"no layer of {type(model).__name__} is called with the image itself as its first argument, so there is no "
            "place to compute its quality"
        )
    if quality is not None:
        check_tapped(model, seen, example, tokens)
    sites = find(model, config, seen)
    if isinstance(config, QuACConfig):
        place(model, config, sites, seen, quality)
        return whole
    place_prior(model, config, sites, seen, quality)
    try:
        let_chains_run(model, [site.name for site in sites], example)
    except Exception:
        take_prior(model)
        if earlier is None:
            delattr(model, RECORD)
        raise
    return whole


def find_places(model: nn.Module, config: QuACConfig | PriorConfig, seen: Trace) -> list[Any]:
    """Return the sites that a config means in a traced host."""
    if isinstance(config, QuACConfig):
        return find_sites(model, seen, config.patterns)[0]
    leave_out(model, seen)
    return find_prior_sites(model, seen, config.patterns, config.margins)


def _check_parts(model: nn.Module, config: QuACConfig | PriorConfig) -> None:
    """Refuse what a part of the model, or a model around it, holds already: one would undo the other."""
    quac = isinstance(config, QuACConfig)
    what, names = ("QuAC", (TAP_NAME,)) if quac else ("a prior", (PRIOR_NAME, PRIOR_TAP_NAME))
    for name, module in model.named_modules():
        record = module.__dict__.get(RECORD)
        if record is not None and name and (record.config if quac else record.prior) is not None:
            raise ValueError(f"the part {name!r} of {type(model).__name__} already holds {what}: give that module")
    if injection_of(model) is None and any(child in part._modules for part in model.modules() for child in names):
        raise ValueError(
            f"{type(model).__name__} is a part of a model that already holds {what}: give that model, or call "
            "quac_plugins.remove of it first"
        )


def place(
    model: nn.Module, config: QuACConfig, sites: list[Site], seen: Trace, quality: QualityFunction | None
) -> nn.Module:
    """Carry out an injection of activations whose sites are known: build all first, then put them in."""
    context, attach = tap_for(model, config, quality, seen)
    device, dtype = _placement(model)
    built = []
    with torch.device(device):
        for site in sites:
            host = None if site.after else module_at(model, site.name)
            built.append(_build(site, config, host, context).to(dtype=dtype))
    record = injection_of(model) or Injection(host_parameters=_count(model))
    for site, module in zip(sites, built, strict=True):
        host = module_at(model, site.name)
        module.train(host.training)
        record.inside[f"{site.name}.{AFTER_NAME}" if site.after else site.name] = (module,)
        if site.after:
            _put_behind(host, AFTER_NAME, module)
        else:
            record.replaced[site.name] = (host,)
            _swap(model, host, module)
    record.config, record.sites, record.quality = config, sites, quality
    record.tap = seen.tap if quality is not None else None
    record.images = _images(model, config, seen, record)
    setattr(model, RECORD, record)
    attach()
    return model


def place_prior(
    model: nn.Module, config: PriorConfig, sites: list[PriorSite], seen: Trace, quality: QualityFunction | None
) -> nn.Module:
    """Carry out the injection of a prior whose sites are known."""
    context, attach = tap_for(model, config, quality, seen)
    device, dtype = _placement(model)
    with torch.device(device):
        built = [module.to(dtype=dtype) for module in build_priors(sites, config, context, quality)]
    record = injection_of(model) or Injection(host_parameters=_count(model))
    frozen, in_host = [], names_in_host(model)
    for name, parameter in model.named_parameters():
        host_name = in_host(name)
        if config.freeze and parameter.requires_grad and host_name is not None:
            parameter.requires_grad_(False)
            frozen.append(host_name)
    attach()
    if seen.tap is not None and any(site.layout == "tokens" for site in sites):
        size = ImageSize()
        SizeNote(size).attach(module_at(model, seen.tap))
        for fdm in (inner for module in built for inner in module.modules() if isinstance(inner, FDM)):
            fdm.image_size = size
    for site, module in zip(sites, built, strict=True):
        host = module_at(model, site.name)
        if isinstance(module, Margin):
            module.over = returns_new_memory(model, site.name)
        _put_behind(host, PRIOR_NAME, module.train(host.training))
        record.inside[f"{site.name}.{PRIOR_NAME}"] = (module,)
    tap = seen.tap if quality is not None else None
    record.prior = PriorInjection(config, sites, tap, quality, frozen)
    record.images = _images(model, config, seen, record)
    setattr(model, RECORD, record)
    return model


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _images(model: nn.Module, config: QualityOptions, seen: Trace, record: Injection) -> Images:
    """Return the form of the images after an injection; the first injection noted the host's own normalization."""
    before = record.images
    normalization = normalization_of(model, config, seen.in_chans) if config.tap != "given" else None
    return Images(
        normalization=normalization if before is None or config.mean is not None else before.normalization,
        host=facts_of(model).normalization if before is None else before.host,
        shape=(seen.in_chans, *seen.image_size) if seen.alone and seen.image_size[0] else None,
        settings=before.settings if before is not None else {},
    )


def build_priors(
    sites: list[PriorSite], config: PriorConfig, context: QualityContext | None, quality: QualityFunction | None
) -> list[nn.Module]:
    """Build the module of a config for each site."""
    channels = context.channels if context is not None else 0
    kinds = quality.kinds if quality is not None else ()
    told = [config.experts.index(kind) + 1 if kind in config.experts else 0 for kind in kinds]
    experts, cls = len(config.experts), resolve_fdm(config.fdm)
    mixture: Mixture | None = None
    built: list[nn.Module] = []
    if experts and (config.margins or issubclass(cls, Margin)):
        # a number behind the probabilities is the severity
        mixture = Mixture(channels, experts, told, len(kinds) if 0 < len(kinds) < channels else None)
    for site in sites:
        module: nn.Module
        if site.margin or issubclass(cls, Margin):
            owns = not any(isinstance(other, Margin) for other in built)
            module = Margin(site, experts, mixture, owns)
        elif experts and not config.margins:
            shape = (experts, channels, config.top_k, config.fdm_width, config.fdm_act, told)
            module = RoutedFDM(site, config.fdm, *shape)
        else:
            module = fdm = cls(site, config.fdm_width, config.fdm_act, channels)
            if config.margins:
                put_inside(fdm, experts, mixture)
        for name, inner in module.named_modules():
            if isinstance(inner, (RoutedFDM, Margin)):
                inner.context = context
            elif isinstance(inner, ChannelActivation):
                inner.context, inner.layer = context, f"{site.name}.{PRIOR_NAME}.{name}"
        built.append(module)
    return built


def _put_behind(host: nn.Module, name: str, module: nn.Module) -> None:
    """Let a module follow a layer: first the prior, then an activation. Chains run a new child by themselves."""
    last = host._modules.pop(AFTER_NAME, None)
    host.add_module(name, module)
    if last is not None:
        host.add_module(AFTER_NAME, last)
    if not runs_children(host):
        add_hook(host, name)


def _take_off(host: nn.Module, name: str) -> nn.Module:
    """Undo :func:`_put_behind` and return the module."""
    if BEHIND[name] not in host._forward_hooks.values():
        note_chain(host)  # which a copy of another process has seen, if not this one
    remove_hooks(host, BEHIND[name])
    module = host.get_submodule(name)
    delattr(host, name)
    return module


def _build(site: Site, config: QuACConfig, host: nn.Module | None, context: QualityContext | None) -> nn.Module:
    modules = {}
    for channels in site.channels:
        arguments: dict[str, Any] = {"channel_dim": site.channel_dim, "init": config.init, "host": host}
        if config.is_driven:
            arguments.update(norm=config.norm, reduction=config.reduction)
        if config.activation_class.needs_quality:
            assert context is not None
            expand = site.expand_q if site.expand_q != "error" else config.expand_q
            arguments.update(quality_channels=context.channels, expand_q=expand)
        module = config.activation_class(channels, **arguments)
        module.context = context
        module.layer = site.name
        modules[channels] = module
    if len(modules) == 1:
        return next(iter(modules.values()))
    return WidthSwitch(modules)


def _swap(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever ``old`` is, with its hooks: a module may have several places."""
    move_all(old, new)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old and parent is not new:
                parent._modules[name] = new


def _placement(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    for parameter in model.parameters():
        if parameter.is_floating_point():
            return parameter.device, parameter.dtype
    return torch.device("cpu"), torch.get_default_dtype()


def remove(model: nn.Module) -> nn.Module:
    """Remove everything that :func:`inject` put in: the host has its own activations, parameters and names again.

    Args:
        model: a model with QuAC inside.

    Returns:
        The model.

    Raises:
        ValueError: the model holds nothing to remove.

    Example:
        >>> import timm, quac_plugins as quac
        >>> model = quac.remove(timm.create_model("test_resnet_qacon"))
        >>> any("quac" in name or "fc3" in name for name in model.state_dict())
        False
    """
    record = injection_of(model)
    if record is None:
        raise nothing_inside(model, "nothing to remove")
    whole, model = model, unwrap(model)
    if record.prior is not None:
        take_prior(model)
    untap(model)
    behind = _layers(model, AFTER_NAME)
    for name, (module,) in reversed(record.inside.items()):
        if name in record.replaced:
            _swap(model, module, record.replaced[name][0].train(module.training))
        elif id(module) in behind:
            _take_off(behind[id(module)], AFTER_NAME)
    for name, value in record.attributes.items():
        setattr(model, name, value)
    for name in record.added:
        delattr(model, name)
    model.__dict__.pop(RECORD, None)  # without activations the prior took it along
    if record.removed is not None:
        record.removed(model)
    return whole


def take_prior(model: nn.Module) -> Callable[[], None]:
    """Remove the prior alone, without the activations, and return a function that puts the same prior back."""
    record = injection_of(model)
    assert record is not None
    assert record.prior is not None
    prior = record.prior
    model = unwrap(model)
    mine = {name: record.inside.pop(name) for name in [f"{site.name}.{PRIOR_NAME}" for site in prior.sites]}
    behind = _layers(model, PRIOR_NAME)
    layers = [behind[id(module)] for (module,) in mine.values() if id(module) in behind]  # some may have been replaced
    taken = [(layer, _take_off(layer, PRIOR_NAME)) for layer in reversed(layers)]
    layer = next((module for module in model.modules() if PRIOR_TAP_NAME in module._modules), None)
    tap = QualityTap.detach(layer, PRIOR_TAP_NAME) if layer is not None else None
    shared = tap is not None and any(
        isinstance(m, ChannelActivation) and m.context is tap.context for m in model.modules()
    )
    if layer is not None and tap is not None and shared:
        tap.attach(layer, TAP_NAME)  # the activations go on reading it
    elif tap is not None:
        unlisten(model, tap.context)
    noting = next((module for module in model.modules() if SIZE_NAME in module._modules), None)
    note = SizeNote.detach(noting) if noting is not None else None
    _set_requires_grad(model, set(prior.frozen), True)
    record.prior = None

    def put_back() -> None:
        if noting is not None and note is not None:
            note.attach(noting)
        if layer is not None and tap is not None:
            if shared:
                QualityTap.detach(layer, TAP_NAME)
            else:
                listen(model, tap.context)
            tap.attach(layer, PRIOR_TAP_NAME)
        for under, module in reversed(taken):
            _put_behind(under, PRIOR_NAME, module)
        record.inside.update(mine)
        _set_requires_grad(model, set(prior.frozen), False)
        record.prior = prior

    return put_back


def _layers(model: nn.Module, name: str) -> dict[int, nn.Module]:
    """Return id of the injected module behind each layer → the layer, for one name of injected modules."""
    return {id(module._modules[name]): module for module in model.modules() if name in module._modules}


def _set_requires_grad(model: nn.Module, names: set[str], value: bool) -> None:
    in_host = names_in_host(model)
    for name, parameter in model.named_parameters():
        if in_host(name) in names:
            parameter.requires_grad_(value)
