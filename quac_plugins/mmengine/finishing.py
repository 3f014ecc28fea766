"""The finish of a built model: planned activations get their channels, and taps their normalization."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

from mmengine.model import BaseModule
from torch import nn

from quac_plugins.core.activations import ChannelActivation
from quac_plugins.core.hooks import TAP_HOOKS, TAP_NAME, WHOLE, remove_hooks
from quac_plugins.core.host.facts import add_reader
from quac_plugins.core.inject import QuACConfig
from quac_plugins.core.inject.sites import find_sites
from quac_plugins.core.inject.surgery import _swap, place
from quac_plugins.core.inject.tapping import listen, tap_for, unlisten
from quac_plugins.core.inject.trace import Trace, trace
from quac_plugins.core.quality.registry import QualityFunction, resolve_quality
from quac_plugins.core.quality.tap import QualityTap
from quac_plugins.mmengine.activations import PlannedActivation, plan_of
from quac_plugins.mmengine.preprocessing import listen_to, normalization_of, prepares_images

GIVEN_ORDER = "_quac_given_order"  # attribute of a tap, or of what holds it, whose config says the order of channels
_FINISHED = "_quac_finished"  # attribute of an activation out of tracing's reach that has its tap


def finish(model: nn.Module) -> nn.Module:
    """Give planned activations their channels and one tap, and every tap the normalization of the data preprocessor.

    MMEngine calls this function for every model that it builds from a config. Call it yourself, before the optimizer is
    built, on a model that you put together by hand. A second call changes nothing.

    Args:
        model: the model, changed in place. A model without plans or QuAC inside stays unchanged.

    Returns:
        The model.

    Raises:
        ValueError: two plans differ, or a plan's quality function is not the existing tap's.
    """
    for module in model.modules():
        remove_hooks(module, tell_unfinished)
    for module in reversed(list(model.modules())):  # the innermost first: a model inside a wrapper for augmentations
        preprocessor = getattr(module, "data_preprocessor", None)
        if module is model or prepares_images(preprocessor):
            plans = {name: plan for name, part in module.named_modules() if (plan := plan_of(part)) is not None}
            waiting = any(not hasattr(module.get_submodule(name), _FINISHED) for name in plans)
            if waiting and not isinstance(module, PlannedActivation):
                _carry_out(module, plans)
            if isinstance(preprocessor, nn.Module) and prepares_images(preprocessor):
                _adopt(module, preprocessor)
    return model


def tell_unfinished(backbone: nn.Module, args: Any) -> None:
    """Warn once that a backbone, built without a model, does not know its images; a hook of its first call."""
    remove_hooks(backbone, tell_unfinished)
    if any(isinstance(module, QualityTap) and module.mean is None for module in backbone.modules()):
        warnings.warn(
            "quac_plugins.mmengine is imported by the config of a model that is being built already, or this "
            f"{type(backbone).__name__} was built by hand, so what is built is not finished: import "
            "quac_plugins.mmengine before MODELS.build, or call quac_plugins.mmengine.finish(model) before the model "
            "is used",
            stacklevel=2,
        )


def _carry_out(model: nn.Module, plans: dict[str, PlannedActivation]) -> None:
    first = next(iter(plans.values()))
    for name, plan in plans.items():
        if plan.config != first.config:
            raise ValueError(
                f"{name!r} has act_cfg {plan.config}, but {next(iter(plans))!r} has {first.config}: one model takes "
                "one kind; put the other in with quac_plugins.inject"
            )
    before = {id(module): module for module in (model.get_submodule(name) for name in plans)}
    hosts = {id(model.get_submodule(name)): plan.build_host() for name, plan in plans.items()}
    for key, module in before.items():
        hosts[key].train(module.training)
        _swap(model, module, hosts[key])
    try:
        inside, seen = _traced(model)
    except RuntimeError:
        for key, module in before.items():
            _swap(model, hosts[key], module)
        if all(not isinstance(module, PlannedActivation) for module in before.values()):
            return  # a part of a network, whose activations have their channels
        raise
    names = {key: _name_of(inside, host) for key, host in hosts.items()}
    called = {key: name for key, name in names.items() if name is not None and name in seen.calls}
    others = [before[key] for key in before.keys() - called.keys()]  # never called, or out of tracing's reach
    for key in before.keys() - called.keys():
        _swap(model, hosts[key], before[key])
    sized = [module for module in others if isinstance(module, ChannelActivation)]
    if not called and not sized:
        return
    config, quality = replace(first.config, where=list(called.values()) or "all"), None
    if config.activation_class.needs_quality:
        quality = resolve_quality(config.quality, config.quality_channels, config.quality_grad)
        config = _like_the_tap(model, inside, seen, config, quality, next(iter(plans)))
    if called:
        place(inside, config, find_sites(inside, seen, config.patterns)[0], seen, quality)
    context, attach = tap_for(inside, config, quality, seen)
    attach()
    outside = sized or inside is model
    if context is not None and outside and context not in model.__dict__.get(WHOLE, ()):
        # a tap that the backbone had already: the end of the backbone's call is not that of the pass
        unlisten(model, context)
        listen(model, context)
    for module in sized:
        module.context = context
        setattr(module, _FINISHED, True)
    order = next((plan.channel_order for plan in plans.values() if plan.channel_order is not None), None)
    if context is not None and order is not None:
        note_order(inside, order)


def _like_the_tap(
    model: nn.Module, inside: nn.Module, seen: Trace, config: QuACConfig, quality: QualityFunction, name: str
) -> QuACConfig:
    """Return the config with the normalization of the existing tap, so that one tap serves both."""
    if seen.tap is None:
        raise RuntimeError(f"no layer of {type(inside).__name__} is called with the image itself")
    layer = inside.get_submodule(seen.tap)
    tap = layer._modules.get(TAP_NAME)
    if not isinstance(tap, QualityTap):
        return config
    if tap.quality != quality:
        raise ValueError(
            f"{name!r} has act_cfg with quality {quality.name!r}, but {_name_of(model, layer)!r}, which sees the "
            f"images, is tapped for quality {tap.quality.name!r}: one model takes one quality function. Give act_cfg "
            f"and the backbone's quac the same"
        )
    return replace(config, mean=tap.mean, std=tap.std, channel_order=tap.channel_order)


def _name_of(model: nn.Module, module: nn.Module) -> str | None:
    return next((name for name, other in model.named_modules() if other is module), None)


def _traced(model: nn.Module) -> tuple[nn.Module, Trace]:
    """Return the model, or its backbone if the model takes more than images, and the trace."""
    backbone = getattr(model, "backbone", None)
    candidates = [model, *([backbone] if isinstance(backbone, nn.Module) else [])]
    for inside in candidates:
        try:
            return inside, trace(inside)
        except RuntimeError:
            if inside is candidates[-1]:
                raise
    raise AssertionError("there is a last candidate")


@add_reader
def read_facts(model: nn.Module) -> dict[str, Any]:
    """Return the image size of a network that takes one size, and its data preprocessor's mean and std."""
    known: dict[str, Any] = {}
    if not isinstance(model, BaseModule):
        return known
    for module in (model, getattr(model, "backbone", None)):
        size = getattr(module, "img_size", None)
        if isinstance(size, (int, tuple, list)):
            sides, chans = (size, size) if isinstance(size, int) else size, getattr(module, "in_channels", 3)
            known = {"input_size": (chans, *sides), "in_chans": chans}
            break
    preprocessor = getattr(model, "data_preprocessor", None)
    if prepares_images(preprocessor):
        values = normalization_of(preprocessor)  # type: ignore[arg-type]
        known["inner_normalization"] = (values["mean"], values["std"])
    return known


def note_order(model: nn.Module, order: str) -> None:
    """Note a config's order of channels, which counts before the data preprocessor's."""
    setattr(model, GIVEN_ORDER, order)
    for tap in (module for module in model.modules() if isinstance(module, QualityTap)):
        setattr(tap, GIVEN_ORDER, order)


def _adopt(model: nn.Module, preprocessor: nn.Module) -> None:
    """Give the preprocessor's normalization to taps without one, and write it into their record."""
    values = normalization_of(preprocessor)
    layers = [(layer, name) for layer in model.modules() for name in TAP_HOOKS if name in layer._modules]
    for layer, name in layers:
        tap = layer._modules[name]
        if isinstance(tap, QualityTap) and tap.mean is None:
            tap.mean, tap.std, tap._range_checked = values["mean"], values["std"], True
            tap.channel_order = getattr(tap, GIVEN_ORDER, values["channel_order"])
    for module in model.modules():
        record = module.__dict__.get("_quac_injection")
        for holder in (record, record.prior) if record is not None else ():
            if holder is not None and holder.config is not None and holder.config.mean is None:
                order = {"channel_order": getattr(module, GIVEN_ORDER, values["channel_order"])}
                holder.config = replace(holder.config, **{**values, **order})
    if layers:
        listen_to(preprocessor)
