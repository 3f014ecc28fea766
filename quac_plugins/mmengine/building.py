"""What is done once to every model that MMEngine builds from a config, before an optimizer is built.

Options of ours, and whether the backbones have the sites that they ask for, are checked before anything is built, and
an error begins with their path in the config. Afterwards plans of activations get their channels, and taps the
normalization of the model's data preprocessor.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from mmengine.registry import Registry
from torch import Tensor, nn

from quac_plugins.core.hooks import TAP_HOOKS, TAP_NAME
from quac_plugins.core.inject.sites import find_sites
from quac_plugins.core.inject.surgery import _swap, place
from quac_plugins.core.inject.trace import Trace, trace
from quac_plugins.core.quality.table import resolve_quality
from quac_plugins.core.quality.tap import QualityTap
from quac_plugins.mmengine.activations import PlannedActivation, plan_of
from quac_plugins.mmengine.checking import SiteError, check_config, path_of
from quac_plugins.mmengine.preprocessing import listen_to, normalization_of, note_config, prepares_images

_MARK = "_quac_looks_over"
GIVEN_ORDER = "_quac_given_order"  # attribute of a tap, or of what holds it, whose config says the order of channels


class _Depth(threading.local):
    """How deep in building this thread is: a model is looked over when all of it is there."""

    value = 0


_depth = _Depth()


def look_over_models(check_sites: Callable[[Any], None]) -> None:
    """Let registries of models check and :func:`finish` what they build. MMEngine has no place to hook into there.

    Args:
        check_sites: is given every config, and raises SiteError.
    """
    if getattr(Registry.build, _MARK, False):
        return
    original = Registry.build

    @functools.wraps(original)
    def build(self: Registry, cfg: Any, *args: Any, **kwargs: Any) -> Any:
        if self.name != "model":
            return original(self, cfg, *args, **kwargs)
        outermost = _depth.value == 0
        if outermost:
            check_config(cfg, "model")
        _depth.value += 1
        try:
            if outermost:
                check_sites(cfg)
            built = original(self, cfg, *args, **kwargs)
        except SiteError as error:
            if not outermost:
                raise
            raise ValueError(f"{path_of(cfg, error.given, 'model') or 'model'}.{error.key}: {error}") from error
        finally:
            _depth.value -= 1
        note_config(built, cfg)
        return finish(built) if outermost and isinstance(built, nn.Module) else built

    setattr(build, _MARK, True)
    Registry.build = build


def finish(model: nn.Module) -> nn.Module:
    """Give planned activations their channels and one tap, and every tap the normalization of the data preprocessor.

    Called for every model that is built from a config; call it yourself, before the optimizer is built, on a model that
    you put together by hand.

    Args:
        model: in place. Without plans or QuAC inside it is left as it is.

    Returns:
        The model.

    Raises:
        ValueError: two plans differ.
    """
    for module in reversed(list(model.modules())):  # the innermost first: a model inside a wrapper for augmentations
        preprocessor = getattr(module, "data_preprocessor", None)
        if module is model or prepares_images(preprocessor):
            plans = {name: plan for name, part in module.named_modules() if (plan := plan_of(part)) is not None}
            if plans and not isinstance(module, PlannedActivation):
                _carry_out(module, plans)
            if isinstance(preprocessor, nn.Module) and prepares_images(preprocessor):
                _adopt(module, preprocessor)
    return model


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
    for key in before.keys() - called.keys():  # never called, or outside what could be traced
        _swap(model, hosts[key], before[key])
    if not called:
        return
    config, quality = replace(first.config, where=list(called.values())), None
    if config.activation_class.needs_quality:
        quality = resolve_quality(config.quality, config.quality_channels, config.quality_grad)
        if seen.tap is None:
            raise RuntimeError(f"no layer of {type(inside).__name__} is called with the image itself")
    sites, _ = find_sites(inside, seen, config.patterns)
    place(inside, config, sites, seen, quality)
    if quality is not None and seen.tap is not None:
        context = inside.get_submodule(seen.tap).get_submodule(TAP_NAME).context
        for key in before.keys() - called.keys():
            if not isinstance(before[key], PlannedActivation):
                before[key].context = context  # of the same images


def _name_of(model: nn.Module, module: nn.Module) -> str | None:
    return next((name for name, other in model.named_modules() if other is module), None)


def _traced(model: nn.Module) -> tuple[nn.Module, Trace]:
    """The model, or its backbone where the model itself takes more than images, and its trace."""
    backbone = getattr(model, "backbone", None)
    candidates = [model, *([backbone] if isinstance(backbone, nn.Module) else [])]
    for inside in candidates:
        try:
            return inside, trace(inside, example_of(inside))
        except RuntimeError:
            if inside is candidates[-1]:
                raise
    raise AssertionError("there is a last candidate")


def example_of(model: nn.Module) -> Tensor | None:
    """Images of the one size that a network says it takes, None if it says nothing."""
    for module in (model, getattr(model, "backbone", None)):
        size = getattr(module, "img_size", None)
        if isinstance(size, (int, tuple, list)):
            height, width = (size, size) if isinstance(size, int) else size
            return torch.empty(1, getattr(module, "in_channels", 3), height, width)
    return None


def _adopt(model: nn.Module, preprocessor: nn.Module) -> None:
    """Taps that know no normalization take the preprocessor's, and what holds them remembers it."""
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
