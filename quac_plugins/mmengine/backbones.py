"""Backbones with QuAC and the degradation prior inside: any that is registered."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from quac_plugins.core.inject import PriorConfig, QuACConfig, inject
from quac_plugins.core.inject.rehearsal import rehearse
from quac_plugins.core.inject.trace import DoesNotRun
from quac_plugins.mmengine.checking import SiteError, check_input_size, name_of, options_in, options_of, walk
from quac_plugins.mmengine.finishing import example_of, note_order


def build_quac_backbone(
    backbone: Any, quac: Any = None, prior: Any = None, pretrained: Any = None, input_size: Any = None
) -> nn.Module:
    """``dict(type="QuACBackbone", backbone=dict(type="mmpretrain.ResNet", …), quac=dict(…), prior=dict(…))``.

    Args:
        backbone: config of a registered backbone (or the backbone).
        quac: options of :class:`quac_plugins.QuACConfig`, with ``norm="layer"`` unless they say otherwise: batches are
            small in detection, and many hosts hold batch norms in eval mode. None puts no activations in. For pictures
            that are read as RGB (CIFAR) say ``channel_order="rgb"``: MMCV's are BGR.
        prior: options of :class:`quac_plugins.PriorConfig`; None puts no prior in.
        pretrained: handed on to the backbone: networks of mmseg give theirs to whatever backbone they hold.
        input_size: (C, H, W) of the pictures, for a backbone that takes one size and does not say which (LeNet5: 1, 32,
            32).

    Returns:
        The backbone itself, so that names of parameters, and with them checkpoints, stay what they are.

    Raises:
        ValueError: an option is not known, a site is not there, or the backbone does not run on pictures of this size.
            In a model that is built from a config the message begins with its path.
    """
    if pretrained is not None and not isinstance(backbone, nn.Module):
        backbone = {**backbone, "pretrained": pretrained}
    model = backbone if isinstance(backbone, nn.Module) else MODELS.build(backbone)
    try:
        return _put_into(model, quac, prior, input_size)
    except DoesNotRun as error:  # it tells what to do in other words than a config's
        reason = str(error).partition(" Give images")[0]
        hint = "say the size of the pictures that the backbone takes, input_size=(C, H, W)"
        raise SiteError("input_size", quac if quac is not None else prior, f"{hint}: {reason}") from error


def _put_into(model: nn.Module, quac: Any, prior: Any, input_size: Any) -> nn.Module:
    check_input_size(input_size)
    given = [
        (QuACConfig, {"norm": "layer", **quac} if isinstance(quac, Mapping) else quac, quac, "quac", "where"),
        (PriorConfig, prior, prior, "prior", "site"),
    ]
    configs = [(options_of(cls, full, name), own, name, key) for cls, full, own, name, key in given if own is not None]
    example = torch.empty(1, *input_size) if input_size is not None else example_of(model)
    for config, own, name, key in configs:
        try:
            inject(model, config, example)
        except ValueError as error:
            raise SiteError(f"{name}.{key}", own, str(error)) from error
        order = own.get("channel_order") if isinstance(own, Mapping) else None
        if order is not None:
            note_order(model, order)
    model.train(model.training)  # stages that the backbone freezes in train() are frozen before an optimizer is built
    return model


def build_quac_resnet(quac: Any = None, prior: Any = None, input_size: Any = None, **kwargs: Any) -> nn.Module:
    """``dict(type="QuACResNet", depth=50, quac=dict(…))``: the ResNet of the config's scope, with QuAC inside.

    Args:
        quac, prior, input_size: as of :func:`build_quac_backbone`. With neither of the first, QuAC with its defaults.
        **kwargs: of the ResNet.

    Raises:
        ImportError: there is no default scope, and neither mmpretrain, mmseg nor mmdet is installed, or the first of
            them that is cannot be imported (mmpretrain without mmcv or mmcv-lite).
    """
    return build_quac_backbone(**_parts_of_resnet(quac, prior, input_size, **kwargs))


def _parts_of_resnet(quac: Any = None, prior: Any = None, input_size: Any = None, **kwargs: Any) -> dict[str, Any]:
    scope = DefaultScope.get_current_instance()
    name = "ResNet"
    if scope is None or scope.scope_name == "mmengine":
        installed = next((p for p in ("mmpretrain", "mmdet", "mmseg") if find_spec(p)), None)
        if installed is None:
            raise ImportError("QuACResNet needs mmpretrain, mmdet or mmseg: python -m pip install mmpretrain")
        try:
            import_module(f"{installed}.registry")  # MMEngine would only say that it knows no such name
        except ImportError as error:
            raise ImportError(
                f"QuACResNet takes the ResNet of {installed}, which cannot be imported: {error}"
            ) from error
        name = f"{installed}.{name}"
    quac = {} if quac is None and prior is None else quac
    return {"backbone": {"type": name, **kwargs}, "quac": quac, "prior": prior, "input_size": input_size}


def build_prior_backbone(backbone: Any, pretrained: Any = None, input_size: Any = None, **options: Any) -> nn.Module:
    """``dict(type="DegradationPrior", backbone=dict(…), site="auto", …)``: a frozen backbone with a degradation prior.

    Args:
        backbone, pretrained, input_size: as of :func:`build_quac_backbone`.
        **options: of :class:`quac_plugins.PriorConfig`.
    """
    try:
        return build_quac_backbone(backbone, prior=options, pretrained=pretrained, input_size=input_size)
    except SiteError as error:  # whose options are this backbone's own
        error.key = error.key.removeprefix("prior.")
        raise


def check_sites(cfg: Any, path: str) -> None:
    """Look through a config for backbones of ours that lack the sites they are asked for; nothing real is built.

    Raises:
        ValueError: of the first one; the message begins with its path.
    """
    for at, part in walk(cfg, path):
        parts = _PARTS.get(name_of(part))
        if parts is not None:
            with MODELS.switch_scope_and_registry(part.get("_scope_")):
                try:
                    _rehearse(**parts(**options_in(part)))
                except SiteError as error:
                    key = error.key.removeprefix("prior.") if name_of(part) == "DegradationPrior" else error.key
                    raise ValueError(f"{at}.{key}: {error}") from error


def _rehearse(
    backbone: Any, quac: Any = None, prior: Any = None, pretrained: Any = None, input_size: Any = None
) -> None:
    if isinstance(backbone, Mapping):
        without_weights = dict(backbone)
        if "pretrained" in backbone:  # a path, or whether
            without_weights["pretrained"] = False if isinstance(backbone["pretrained"], bool) else None
        rehearse(lambda: MODELS.build(without_weights), lambda model: _put_into(model, quac, prior, input_size))


def _parts_of_prior(backbone: Any, input_size: Any = None, pretrained: Any = None, **options: Any) -> dict[str, Any]:
    return {"backbone": backbone, "prior": options, "input_size": input_size}


_PARTS: dict[str, Callable[..., dict[str, Any]]] = {
    "QuACBackbone": lambda **parts: parts,
    "QuACResNet": _parts_of_resnet,
    "DegradationPrior": _parts_of_prior,
}


MODELS.register_module(name="QuACBackbone", module=build_quac_backbone, force=True)
MODELS.register_module(name="QuACResNet", module=build_quac_resnet, force=True)
MODELS.register_module(name="DegradationPrior", module=build_prior_backbone, force=True)
