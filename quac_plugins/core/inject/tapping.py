"""Giving a host the tap that an injection needs: a new one, or an earlier one that serves both."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from quac_plugins.core.hooks import (
    CALL_HOOKS,
    CONTEXTS,
    OUR_CHILDREN,
    PRIOR_TAP_NAME,
    TAP_HOOKS,
    TAP_NAME,
    WHOLE,
    remove_hooks,
)
from quac_plugins.core.inject.images import normalization_of
from quac_plugins.core.inject.trace import Trace
from quac_plugins.core.module_names import module_at
from quac_plugins.core.options import QualityOptions
from quac_plugins.core.prior.config import PriorConfig
from quac_plugins.core.quality.context import QualityContext
from quac_plugins.core.quality.passes import parts_of
from quac_plugins.core.quality.registry import QualityFunction
from quac_plugins.core.quality.tap import QualityTap


def tap_for(
    model: nn.Module, config: QualityOptions, quality: QualityFunction | None, seen: Trace
) -> tuple[QualityContext | None, Callable[[], None]]:
    """Return the context from which injected modules read q, and the function that attaches its tap at the end.

    An earlier tap on the same layer with the same quality function serves both injections.
    """
    if quality is None or seen.tap is None:
        return None, _nothing
    expansion = getattr(config, "expand_q", "error") if config.tap == "given" else None
    mean, std = (normalization_of(model, config, seen.in_chans) if expansion is None else None) or (None, None)
    at = seen.tap
    layer = module_at(model, at)
    for name in TAP_HOOKS:
        present = layer._modules.get(name)
        if isinstance(present, QualityTap) and (
            present.quality,
            present.given,
            present.mean,
            present.std,
            present.channel_order,
        ) == (
            quality,
            expansion,
            tuple(mean) if mean is not None else None,
            tuple(std) if std is not None else None,
            config.channel_order,
        ):
            return present.context, _nothing
    context = QualityContext(quality.channels, at)
    device = next((p.device for p in model.parameters() if p.is_floating_point()), torch.device("cpu"))
    with torch.device(device):
        tap = QualityTap(quality, context, at, seen.in_chans, mean, std, config.channel_order, expansion)
    own_name = PRIOR_TAP_NAME if isinstance(config, PriorConfig) else TAP_NAME

    def attach() -> None:
        tap.attach(module_at(model, at), own_name)  # the layer of today: an activation may have taken its place
        listen(model, context)

    return context, attach


def _nothing() -> None:
    """Attach nothing."""


def listen(model: nn.Module, context: QualityContext) -> None:
    """Let a context know when the model and its parts are called; see :mod:`quac_plugins.core.quality.passes`."""
    parts = {id(part): part for part in parts_of(model)}
    ours = {id(child) for part in model.modules() for name, child in part._modules.items() if name in OUR_CHILDREN}
    for part in (model, *(part for key, part in parts.items() if key not in ours)):
        key = WHOLE if part is model else CONTEXTS
        enter, leave = CALL_HOOKS[key]
        contexts = part.__dict__.get(key, ())  # not by getattr: a compiled part answers for what is inside of it
        if not contexts:
            part.register_forward_pre_hook(enter, prepend=True)
            part.register_forward_hook(leave, always_call=True)
        part.__dict__[key] = (*contexts, context)


def unlisten(model: nn.Module, context: QualityContext | None = None) -> None:
    """Undo :func:`listen` for one context, or for all with None."""
    for part in model.modules():
        for key in CALL_HOOKS.keys() & part.__dict__.keys():
            left = tuple(other for other in part.__dict__[key] if context is not None and other is not context)
            part.__dict__[key] = left
            if not left:
                remove_hooks(part, *CALL_HOOKS[key])
                del part.__dict__[key]


def untap(model: nn.Module) -> None:
    """Detach all taps of a host."""
    unlisten(model)
    for layer in list(model.modules()):
        for name in TAP_HOOKS:
            if name in layer._modules:
                QualityTap.detach(layer, name)
