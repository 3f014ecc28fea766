"""Backbones with QuAC and the degradation prior inside: any that is registered."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from mmengine.registry import MODELS, DefaultScope
from torch import nn

from quac_plugins.core.inject import PriorConfig, QuACConfig, inject
from quac_plugins.core.inject.rehearsal import rehearse
from quac_plugins.core.quality.tap import QualityTap
from quac_plugins.mmengine.building import GIVEN_ORDER, example_of
from quac_plugins.mmengine.checking import SiteError, name_of, options_in, options_of


def build_quac_backbone(backbone: Any, quac: Any = None, prior: Any = None) -> nn.Module:
    """``dict(type="QuACBackbone", backbone=dict(type="mmpretrain.ResNet", …), quac=dict(…), prior=dict(…))``.

    Args:
        backbone: config of a registered backbone (or the backbone).
        quac: options of :class:`quac_plugins.QuACConfig`, with ``norm="layer"`` unless they say otherwise: batches are
            small in detection, and many hosts hold batch norms in eval mode. None puts no activations in. For pictures
            that are read as RGB (CIFAR) say ``channel_order="rgb"``: MMCV's are BGR.
        prior: options of :class:`quac_plugins.PriorConfig`; None puts no prior in.

    Returns:
        The backbone itself, so that names of parameters, and with them checkpoints, stay what they are.

    Raises:
        ValueError: an option is not known, or a site is not there. In a model that is built from a config the message
            begins with its path.
    """
    return _put_into(backbone if isinstance(backbone, nn.Module) else MODELS.build(backbone), quac, prior)


def _put_into(model: nn.Module, quac: Any, prior: Any) -> nn.Module:
    configs = [
        options_of(cls, {"norm": "layer", **given} if cls is QuACConfig and isinstance(given, Mapping) else given, path)
        for cls, given, path in ((QuACConfig, quac, "quac"), (PriorConfig, prior, "prior"))
        if given is not None
    ]
    for config in configs:
        of_quac = isinstance(config, QuACConfig)
        given, key = (quac, "where") if of_quac else (prior, "site")
        try:
            inject(model, config, example_of(model))
        except ValueError as error:
            raise SiteError(key, given, str(error)) from error
        _note_order(model, given)
    model.train(model.training)  # stages that the backbone freezes in train() are frozen before an optimizer is built
    return model


def _note_order(model: nn.Module, given: Any) -> None:
    """An order of channels that the config names goes before what the data preprocessor lets guess."""
    order = given.get("channel_order") if isinstance(given, Mapping) else None
    if order is not None:
        setattr(model, GIVEN_ORDER, order)
        for tap in (module for module in model.modules() if isinstance(module, QualityTap)):
            setattr(tap, GIVEN_ORDER, order)


def build_quac_resnet(quac: Any = None, prior: Any = None, **kwargs: Any) -> nn.Module:
    """``dict(type="QuACResNet", depth=50, quac=dict(…))``: the ResNet of the config's scope, with QuAC inside.

    Args:
        quac, prior: as of :func:`build_quac_backbone`. With neither, QuAC with its defaults.
        **kwargs: of the ResNet.

    Raises:
        ImportError: there is no default scope, and neither mmpretrain, mmseg nor mmdet is installed.
    """
    return build_quac_backbone(*_parts_of_resnet(quac, prior, **kwargs))


def _parts_of_resnet(quac: Any = None, prior: Any = None, **kwargs: Any) -> tuple[dict[str, Any], Any, Any]:
    scope = DefaultScope.get_current_instance()
    name = "ResNet"
    if scope is None or scope.scope_name == "mmengine":
        installed = next((p for p in ("mmpretrain", "mmdet", "mmseg") if find_spec(p)), None)
        if installed is None:
            raise ImportError("QuACResNet needs mmpretrain, mmdet or mmseg: python -m pip install mmpretrain")
        name = f"{installed}.{name}"
    return {"type": name, **kwargs}, {} if quac is None and prior is None else quac, prior


def build_prior_backbone(backbone: Any, **options: Any) -> nn.Module:
    """``dict(type="DegradationPrior", backbone=dict(…), site="auto", …)``: a frozen backbone with a degradation prior.

    Args:
        backbone: config of a registered backbone.
        **options: of :class:`quac_plugins.PriorConfig`.
    """
    return build_quac_backbone(*_parts_of_prior(backbone, **options))


def _parts_of_prior(backbone: Any, **options: Any) -> tuple[Any, None, dict[str, Any]]:
    return backbone, None, options


def check_sites(cfg: Any) -> None:
    """Look through a config for backbones of ours that lack the sites they are asked for; nothing real is built.

    Raises:
        SiteError: of the first one.
    """
    if isinstance(cfg, Mapping):
        parts = _PARTS.get(name_of(cfg))
        if parts is not None:
            with MODELS.switch_scope_and_registry(cfg.get("_scope_")):
                _rehearse(*parts(**options_in(cfg)))
        for value in cfg.values():
            check_sites(value)
    elif isinstance(cfg, Sequence) and not isinstance(cfg, str):
        for value in cfg:
            check_sites(value)


def _rehearse(backbone: Any, quac: Any, prior: Any) -> None:
    if isinstance(backbone, Mapping):
        without_weights = dict(backbone)
        if "pretrained" in backbone:  # a path, or whether
            without_weights["pretrained"] = False if isinstance(backbone["pretrained"], bool) else None
        rehearse(lambda: MODELS.build(without_weights), lambda model: _put_into(model, quac, prior))


_PARTS: dict[str, Callable[..., tuple[Any, Any, Any]]] = {
    "QuACBackbone": lambda backbone, quac=None, prior=None: (backbone, quac, prior),
    "QuACResNet": _parts_of_resnet,
    "DegradationPrior": _parts_of_prior,
}


MODELS.register_module(name="QuACBackbone", module=build_quac_backbone, force=True)
MODELS.register_module(name="QuACResNet", module=build_quac_resnet, force=True)
MODELS.register_module(name="DegradationPrior", module=build_prior_backbone, force=True)
