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
    """Build ``dict(type="QuACBackbone", backbone=dict(type="mmpretrain.ResNet", …), quac=dict(…), prior=dict(…))``.

    Args:
        backbone: the config of a registered backbone, or the backbone.
        quac: options of :class:`quac_plugins.QuACConfig`, with ``norm="layer"`` as default: batches are small in
            detection, and many hosts hold batch norms in eval mode. None puts no activations in. MMCV reads pictures
            as BGR; for pictures in RGB (CIFAR) give ``channel_order="rgb"``.
        prior: options of :class:`quac_plugins.PriorConfig`; None puts no prior in.
        pretrained: the backbone's argument; networks of mmseg give it to any backbone.
        input_size: (C, H, W) of the pictures, for a backbone that takes one size and does not tell it (LeNet5: 1, 32,
            32).

    Returns:
        The backbone itself, so that names of parameters, and checkpoints, stay the same.

    Raises:
        ValueError: an option is unknown, a site does not exist, or the backbone does not run on pictures of this size.
            In a model that is built from a config the message begins with the option's path.
    """
    full = {"norm": "layer", **quac} if isinstance(quac, Mapping) else quac
    options = [(QuACConfig, full, quac, "quac"), (PriorConfig, prior, prior, "prior")]
    return _built(backbone, options, pretrained, input_size)


def _built(backbone: Any, options: list[tuple[Any, Any, Any, str]], pretrained: Any, input_size: Any) -> nn.Module:
    """Build a backbone and inject it; ``options`` are tuples (class, options, options as given, key)."""
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
    """Build ``dict(type="QuACResNet", depth=50, quac=dict(…))``: the ResNet of the config's scope, with QuAC inside.

    Args:
        quac, prior, input_size: as in :func:`build_quac_backbone`. Without quac and prior: QuAC with its defaults.
        **kwargs: arguments of the ResNet.

    Raises:
        ImportError: there is no default scope, and none of mmpretrain, mmseg and mmdet is installed, or the first
            installed one cannot be imported (mmpretrain without mmcv or mmcv-lite).
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
    """Build ``dict(type="DegradationPrior", backbone=dict(…), site="auto", …)``: a frozen backbone with a prior.

    Args:
        backbone, pretrained, input_size: as in :func:`build_quac_backbone`.
        **options: options of :class:`quac_plugins.PriorConfig`.
    """
    return _built(backbone, [(PriorConfig, options, options, "")], pretrained, input_size)


MODELS.register_module(name="QuACBackbone", module=build_quac_backbone, force=True)
MODELS.register_module(name="QuACResNet", module=build_quac_resnet, force=True)
MODELS.register_module(name="DegradationPrior", module=build_prior_backbone, force=True)
