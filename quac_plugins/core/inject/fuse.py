"""Folding injected modules into the layers before them: fewer operations at inference.

Batch norms of the activations' drivers go into the drivers' layers, and the margins of one degradation into the host's
norms or convolutions.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from quac_plugins.core.activations.driver import DrivenActivation, Pointwise
from quac_plugins.core.hooks import PRIOR_NAME
from quac_plugins.core.inject.record import injection_of, modules_inside, unwrap
from quac_plugins.core.inject.surgery import inject_at, remove, take_prior
from quac_plugins.core.prior.margins import Margin, spread
from quac_plugins.core.quality.degradation import MOST_SEVERE

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)


def fuse(model: nn.Module, degradation: str | None = None, severity: float = 3.0) -> nn.Module:
    """Fold the drivers' batch norms into the layers before them, in place; outputs change by rounding alone.

    With a ``degradation``, or where a prior holds a single margin for all images, the margins are folded into the
    host's norms or convolutions as well: they are then gone (FDMs beside them stay, made for that degradation alone),
    no quality is computed for them, and every image is taken for one that went through that degradation.

    For inference: from then on the drivers have no norm, as with ``norm="none"``, and adapters are saved and loaded as
    those. Norms of other kinds depend on the input and stay. The host's own layers are not touched.

    Args:
        model: with quality-adaptive activations or margins inside, in eval mode, or one of the activations itself.
        degradation: name of the expert whose margins are folded, into batch, layer and group norms with weight and bias
            and plain convolutions.
        severity: 0 to 5, of that degradation.

    Returns:
        The same model.

    Raises:
        ValueError: it is training, holds nothing to fold, or a layer is not a plain one (parametrized or quantized);
            there are no margins for the degradation; nothing was changed then.

    Example:
        >>> import timm, torch, quac_plugins as quac
        >>> model, images = timm.create_model("test_resnet_qacon").eval(), torch.rand(2, 3, 64, 64)
        >>> expected = model(images)
        >>> torch.allclose(quac.fuse(model)(images), expected, atol=1e-5)
        True
    """
    activations = {name: m for name, m in model.named_modules() if isinstance(m, DrivenActivation)}
    folded = _margins_to_fold(model, degradation, severity)
    if not activations and not folded:
        hint = "; name a degradation to fold its margins" if _margins(model) else ""
        raise ValueError(f"{type(model).__name__} holds no activations with a driver; there is nothing to fuse{hint}")
    normed = {name: module for name, module in activations.items() if module.norm == "batch"}
    for name, module in normed.items():
        what = f"{name or type(module).__name__!r}"
        if module.training:
            raise ValueError(
                f"the activation {what} is training, where batch norms follow the batch; model.eval() first"
            )
        for conv, bn in ((module.fc1, module.bn1), (module.fc2, module.bn2)):
            if type(conv) not in (Pointwise, nn.Conv2d) or not isinstance(bn, nn.modules.batchnorm._BatchNorm):
                names = f"{type(conv).__name__}, {type(bn).__name__}"
                raise ValueError(
                    f"the driver of {what} is not made of plain layers ({names}); take off what was put on"
                )
            if bn.running_mean is None:
                raise ValueError(f"a batch norm of {what} keeps no statistics; it cannot be folded")
    for module in normed.values():
        for layer, norm in (("fc1", "bn1"), ("fc2", "bn2")):
            setattr(module, layer, fuse_conv_bn_eval(getattr(module, layer), getattr(module, norm)))
            setattr(module, norm, nn.Identity())
        module.norm = "none"
    record = injection_of(unwrap(model))
    if record is not None and record.config is not None and record.config.norm == "batch":
        record.config = replace(record.config, norm="none")
        if record.changed is not None:
            record.changed(unwrap(model))
    if folded:
        for target, scale, shift in folded:
            _fold(target, scale, shift)
        _without_margins(model)
    return model


def _without_margins(model: nn.Module) -> None:
    """Take out a prior whose margins have been folded, and put its FDMs in again, which are for all images now."""
    record = injection_of(unwrap(model))
    assert record is not None
    assert record.prior is not None
    prior, images, inside = record.prior, record.images, modules_inside(model)
    fdms = {site: inside[f"{site.name}.{PRIOR_NAME}"] for site in prior.sites}
    fdms = {site: module for site, module in fdms.items() if not isinstance(module, Margin)}
    take_prior(model)
    if fdms:
        shape = images.shape if images is not None else None
        example = torch.empty(1, *shape) if shape is not None else None
        inject_at(model, replace(prior.config, margins=False, experts=[]), lambda *_: list(fdms), example)
        inside = modules_inside(model)
    elif record.config is None:
        remove(model)
    for site, module in fdms.items():
        state = {name: value for name, value in module.state_dict().items() if f"{PRIOR_NAME}." not in name}
        inside[f"{site.name}.{PRIOR_NAME}"].load_state_dict(state)


def _margins(model: nn.Module) -> dict[nn.Module, Margin]:
    """Return layer → the margin behind it."""
    behind = {m: m._modules.get(PRIOR_NAME) for m in model.modules()}
    return {layer: margin for layer, margin in behind.items() if isinstance(margin, Margin)}


def _margins_to_fold(
    model: nn.Module, degradation: str | None, severity: float
) -> list[tuple[nn.Module, Tensor, Tensor]]:
    """Return layer, scale (C,) and shift (C,) of all folded margins; ValueError where one cannot be folded."""
    record, margins = injection_of(unwrap(model)), _margins(unwrap(model))
    experts = record.prior.config.experts if record is not None and record.prior is not None else []
    if degradation is not None and (degradation not in experts or not margins):
        known = f"there are: {', '.join(experts)}" if margins and experts else "this model holds none"
        raise ValueError(f"no margins for the degradation {degradation!r}; {known}")
    if not margins or (experts and degradation is None):
        return []
    if not 0 <= severity <= MOST_SEVERE:
        raise ValueError(f"severity must be from 0 to {MOST_SEVERE:g}, got {severity!r}")
    around = {child: parent for parent in model.modules() for child in parent._modules.values()}
    owners = Counter(id(p) for m in set(model.modules()) for p in m._parameters.values() if p is not None)
    folded = []
    for layer, margin in margins.items():
        inner = type(layer) is nn.Identity  # the last step of a norm that activates afterwards
        target = around[layer] if inner else layer
        if reason := _why_not(target, inner, owners):
            raise ValueError(f"the margins after {margin.layer!r} cannot be folded: {type(target).__name__} {reason}")
        chosen = torch.zeros(1, max(1, len(experts)))
        chosen[0, experts.index(degradation) if degradation is not None else 0] = 1
        mixture = margin.shared
        if mixture is not None:
            chosen = spread(chosen, torch.tensor([float(severity)]) if mixture.severity is not None else None)
        chosen = chosen.to(margin.scale)
        folded.append((target, 1 + (chosen @ margin.scale)[0].detach(), (chosen @ margin.shift)[0].detach()))
    return folded


def _why_not(layer: nn.Module, inner: bool, owners: Counter[int]) -> str:
    """Return the reason why nothing can be folded into a layer; empty if folding is possible."""
    name = type(layer).__name__
    norm = isinstance(layer, _NORMS) and (name.startswith(("BatchNorm", "LayerNorm", "GroupNorm")))
    if not norm and type(layer) is not nn.Conv2d and name != "Conv2dSame":
        return "is neither a norm nor a convolution whose weight is used as it is"
    if layer.training:
        return "is training"
    if isinstance(getattr(layer, "act", None), nn.Module) and not inner:
        return "activates after its norm"
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    if weight is None or (norm and bias is None):
        return "has no weight and bias of its own"
    if owners[id(weight)] > 1 or (bias is not None and owners[id(bias)] > 1):
        return "shares its weight with another layer"
    return ""


@torch.no_grad()
def _fold(layer: nn.Module, scale: Tensor, shift: Tensor) -> None:
    """Let a norm or a convolution return scale · y + shift in the place of y."""
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, nn.Parameter)
    weight.mul_(scale.view(-1, *(1,) * (weight.ndim - 1)))
    if isinstance(bias, nn.Parameter):
        bias.mul_(scale).add_(shift)
    else:
        layer.bias = nn.Parameter(shift.clone(), requires_grad=weight.requires_grad)
