"""Backbones with QuAC and the degradation prior inside: any that is registered."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from quac_plugins.core.inject import PriorConfig, QuACConfig, inject
from quac_plugins.core.inject.surgery import all_or_nothing
from quac_plugins.core.inject.trace import DoesNotRun
from quac_plugins.core.options import read_options
from quac_plugins.mmengine.building import is_building
from quac_plugins.mmengine.checking import SiteError, check_input_size
from quac_plugins.mmengine.finishing import note_order, tell_unfinished


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
    full = {"norm": "layer", **quac} if isinstance(quac, Mapping) else quac
    options = [(QuACConfig, full, quac, "quac"), (PriorConfig, prior, prior, "prior")]
    return _built(backbone, options, pretrained, input_size)


def _built(backbone: Any, options: list[tuple[Any, Any, Any, str]], pretrained: Any, input_size: Any) -> nn.Module:
    """A backbone with what options of these classes, as they are and as they were given below a key, say inside."""
    check_input_size(input_size)
    configs = [(read_options(cls, full, key), raw, key) for cls, full, raw, key in options if raw is not None]
    if pretrained is not None and not isinstance(backbone, nn.Module):
        backbone = {**backbone, "pretrained": pretrained}
    model = backbone if isinstance(backbone, nn.Module) else MODELS.build(backbone)
    example = torch.empty(1, *input_size) if input_size is not None else None
    with all_or_nothing(model):
        for config, raw, key in configs:
            try:
                inject(model, config, example)
            except DoesNotRun as error:  # it tells what to do in other words than a config's
                reason = str(error).partition(" Give images")[0]
                hint = "say the size of the pictures that the backbone takes, input_size=(C, H, W)"
                raise SiteError("input_size", raw, f"{hint}: {reason}") from error
            except ValueError as error:
                place = "where" if isinstance(config, QuACConfig) else "site"
                raise SiteError(f"{key}.{place}".lstrip("."), raw, str(error)) from error
            order = raw.get("channel_order") if isinstance(raw, Mapping) else None
            if order is not None:
                note_order(model, order)
    model.train(model.training)  # stages that the backbone freezes in train() are frozen before an optimizer is built
    if not is_building():
        model.register_forward_pre_hook(tell_unfinished)
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
    return build_quac_backbone({"type": name, **kwargs}, quac, prior, input_size=input_size)


def build_prior_backbone(backbone: Any, pretrained: Any = None, input_size: Any = None, **options: Any) -> nn.Module:
    """``dict(type="DegradationPrior", backbone=dict(…), site="auto", …)``: a frozen backbone with a degradation prior.

    Args:
        backbone, pretrained, input_size: as of :func:`build_quac_backbone`.
        **options: of :class:`quac_plugins.PriorConfig`.
    """
    return _built(backbone, [(PriorConfig, options, options, "")], pretrained, input_size)


MODELS.register_module(name="QuACBackbone", module=build_quac_backbone, force=True)
MODELS.register_module(name="QuACResNet", module=build_quac_resnet, force=True)
MODELS.register_module(name="DegradationPrior", module=build_prior_backbone, force=True)
