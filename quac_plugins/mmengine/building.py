"""What is done once to every model that MMEngine builds from a config, before an optimizer is built.

Options of ours are checked before anything is built, and an error begins with their path in the config. Afterwards
plans of activations get their channels, and taps the normalization of the model's data preprocessor.
"""

from __future__ import annotations

import functools
import threading
from dataclasses import replace
from typing import Any

import torch
from mmengine.registry import Registry
from torch import Tensor, nn

from quac_plugins.core.hooks import TAP_HOOKS
from quac_plugins.core.inject import injection_of
from quac_plugins.core.inject.sites import find_sites
from quac_plugins.core.inject.surgery import _swap, place
from quac_plugins.core.inject.trace import Trace, trace
from quac_plugins.core.quality.table import resolve_quality
from quac_plugins.core.quality.tap import QualityTap
from quac_plugins.mmengine.activations import PlannedActivation, plan_of
from quac_plugins.mmengine.checking import check_config
from quac_plugins.mmengine.preprocessing import listen_to, normalization_of

_MARK = "_quac_looks_over"


class _Depth(threading.local):
    """How deep in building this thread is: a model is looked over when all of it is there."""

    value = 0


_depth = _Depth()


def look_over_models() -> None:
    """Let registries of models check and :func:`finish` what they build. MMEngine has no place to hook into there."""
    if getattr(Registry.build, _MARK, False):
        return
    original = Registry.build

    @functools.wraps(original)
    def build(self: Registry, cfg: Any, *args: Any, **kwargs: Any) -> Any:
        if self.name != "model":
            return original(self, cfg, *args, **kwargs)
        if _depth.value == 0:
            check_config(cfg, "model")
        _depth.value += 1
        try:
            built = original(self, cfg, *args, **kwargs)
        finally:
            _depth.value -= 1
        return finish(built) if _depth.value == 0 and isinstance(built, nn.Module) else built

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
        ValueError: two plans differ, or an activation is never called.
    """
    plans = {name: plan for name, module in model.named_modules() if (plan := plan_of(module)) is not None}
    if plans and not isinstance(model, PlannedActivation):
        _carry_out(model, plans)
    preprocessor = getattr(model, "data_preprocessor", None)
    if isinstance(preprocessor, nn.Module):
        _adopt(model, preprocessor)
    return model


def _carry_out(model: nn.Module, plans: dict[str, PlannedActivation]) -> None:
    first = next(iter(plans.values()))
    for name, plan in plans.items():
        if plan.config != first.config:
            raise ValueError(
                f"{name!r} has act_cfg {plan.config}, but {next(iter(plans))!r} has {first.config}: one model takes "
                "one kind; put the other in with quac_plugins.inject"
            )
    before = {name: model.get_submodule(name) for name in plans}
    hosts: dict[int, nn.Module] = {id(module): plans[name].build_host() for name, module in before.items()}
    for module in {id(m): m for m in before.values()}.values():
        _swap(model, module, hosts[id(module)].train(module.training))
    try:
        inside, seen = _traced(model, list(plans))
    except RuntimeError:
        for module in {id(m): m for m in before.values()}.values():
            _swap(model, hosts[id(module)], module)
        if all(not isinstance(module, PlannedActivation) for module in before.values()):
            return  # a part of a network, whose activations have their channels
        raise
    names = list(dict.fromkeys(_name_of(inside, hosts[id(module)]) for module in before.values()))
    sites, _ = find_sites(inside, seen, names)
    config, quality = replace(first.config, where=names), None
    if config.activation_class.needs_quality:
        quality = resolve_quality(config.quality, config.quality_channels, config.quality_grad)
        if seen.tap is None:
            raise RuntimeError(f"no layer of {type(inside).__name__} is called with the image itself")
    place(inside, config, sites, seen, quality)


def _name_of(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, other in model.named_modules() if other is module)


def _traced(model: nn.Module, names: list[str]) -> tuple[nn.Module, Trace]:
    """The model, or its backbone where the model itself takes more than images, and its trace."""
    backbone = getattr(model, "backbone", None)
    candidates = [model]
    if isinstance(backbone, nn.Module) and all(name.startswith("backbone.") for name in names):
        candidates.append(backbone)
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
    taps = [layer._modules[name] for layer in model.modules() for name in TAP_HOOKS if name in layer._modules]
    taps = [tap for tap in taps if isinstance(tap, QualityTap)]
    values = normalization_of(preprocessor)
    for tap in taps:
        if isinstance(tap, QualityTap) and tap.mean is None:
            tap.mean, tap.std, tap.channel_order = values["mean"], values["std"], values["channel_order"]
            tap._range_checked = True
    for module in model.modules():
        record = injection_of(module) if "_quac_injection" in module.__dict__ else None
        if record is not None and record.config is not None and record.config.mean is None:
            record.config = replace(record.config, **values)
        if record is not None and record.prior is not None and record.prior.config.mean is None:
            record.prior.config = replace(record.prior.config, **values)
    if taps:
        listen_to(preprocessor)
