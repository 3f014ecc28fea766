"""Backbones with QuAC and the degradation prior inside, for yacs (BACKBONE_REGISTRY) and lazy configs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import BACKBONE_REGISTRY, FPN, Backbone, build_resnet_backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from omegaconf import OmegaConf
from torch import Tensor, nn

from quac_plugins.core.colours import CHANNEL_ORDERS
from quac_plugins.core.deprecated import renamed
from quac_plugins.core.inject import PriorConfig, QuACConfig, inject, injection_of
from quac_plugins.core.inject.surgery import all_or_nothing
from quac_plugins.core.naming import split_name
from quac_plugins.core.options import named, one_of, read_options
from quac_plugins.core.quality.registry import in_use
from quac_plugins.detectron2.blocks import with_activations
from quac_plugins.detectron2.config import KEY, PRIOR_KEY, TIMM_KEY, configs_of, in_unit_range

_EXAMPLE = 224  # side of the images on which sites are found


@BACKBONE_REGISTRY.register()
def build_quac_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Build ``build_resnet_backbone``'s network with the modules of ``MODEL.QUAC`` inside; its checkpoints load.

    Raises:
        KeyError, ValueError: see :func:`quac_plugins.detectron2.config.configs_of`.
    """
    return _build(cfg, input_shape, lambda: _resnet(cfg, input_shape))


@BACKBONE_REGISTRY.register()
def build_quac_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Build ``build_resnet_fpn_backbone``'s network with the modules of ``MODEL.QUAC`` inside."""
    return _build(cfg, input_shape, lambda: _fpn(cfg, _resnet(cfg, input_shape), LastLevelMaxPool()))


@BACKBONE_REGISTRY.register()
def build_quac_retinanet_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Build ``build_retinanet_resnet_fpn_backbone``'s network with the modules of ``MODEL.QUAC`` inside."""

    def make() -> Backbone:
        bottom_up = _resnet(cfg, input_shape)
        top = LastLevelP6P7(bottom_up.output_shape()["res5"].channels, cfg.MODEL.FPN.OUT_CHANNELS)
        return _fpn(cfg, bottom_up, top)

    return _build(cfg, input_shape, make)


@BACKBONE_REGISTRY.register()
def build_quac_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Build any network of timm with feature maps at several strides, and an FPN over them.

    ``MODEL.QUAC.TIMM.NAME`` names it, without suffix; ``MODEL.FPN.IN_FEATURES`` its maps, ``res2`` at stride 4 to
    ``res5`` at stride 32. For pretrained weights ``INPUT.FORMAT``, ``MODEL.PIXEL_MEAN`` and ``MODEL.PIXEL_STD`` must be
    the network's own (RGB; timm's mean and std times 255). The weights are fetched (``MODEL.QUAC.TIMM.PRETRAINED``)
    unless ``MODEL.WEIGHTS`` names others, which would overwrite them.

    Raises:
        ValueError: see :class:`TimmBackbone`.
        RuntimeError: the weights cannot be fetched.
    """

    def make() -> Backbone:
        names = list(cfg.MODEL.FPN.IN_FEATURES)
        pretrained = cfg.MODEL.QUAC.TIMM.PRETRAINED and not cfg.MODEL.WEIGHTS
        try:
            with named(TIMM_KEY):
                bottom_up = TimmBackbone(cfg.MODEL.QUAC.TIMM.NAME, names, input_shape.channels, pretrained=pretrained)
        except (OSError, RuntimeError) as error:
            if not pretrained:
                raise
            raise RuntimeError(
                f"{TIMM_KEY}.PRETRAINED: timm's weights of {cfg.MODEL.QUAC.TIMM.NAME!r} cannot be had ({error}); give "
                "your own as MODEL.WEIGHTS, or set it to False"
            ) from error
        return _fpn(cfg, bottom_up, LastLevelMaxPool())

    return _build(cfg, input_shape, make)


class TimmBackbone(Backbone):
    """A network of timm as a backbone of detectron2.

    Args:
        name: a name of timm, such as ``"convnext_tiny"``.
        out_features: names of feature maps, ``"res2"`` (stride 4), ``"res3"``, … in this order.
        in_chans: the number of channels of the images.
        pretrained: load timm's weights.
        **kwargs: further arguments of ``timm.create_model``.

    Raises:
        ValueError: timm does not know the name, or the network has no feature map of such a stride.
    """

    def __init__(self, name: str, out_features: list[str], in_chans: int = 3, pretrained: bool = False, **kwargs: Any):
        super().__init__()
        import timm

        host, suffix = split_name(name)
        if suffix:
            raise ValueError(
                f"NAME: {name!r} holds QuAC or a prior already; give the network itself, {host!r}: what is put in is "
                "said by MODEL.QUAC or with_quac"
            )
        if not timm.is_model(name.partition(".")[0]):
            raise ValueError(f"NAME: timm knows no {name!r}")
        kwargs = {"in_chans": in_chans, **kwargs}
        try:  # images of a detector have all sizes
            strides = _strides(name, {"strict_img_size": False, **kwargs})
            kwargs = {"strict_img_size": False, **kwargs}
        except TypeError:  # most networks take them anyway
            strides = _strides(name, kwargs)
        wanted = [2 ** int(feature[3:]) for feature in out_features]
        missing = [f for f, stride in zip(out_features, wanted, strict=True) if stride not in strides]
        if missing:
            raise ValueError(f"NAME: {name} has maps of the strides {strides}, none for {', '.join(missing)}")
        indices = [max(i for i, stride in enumerate(strides) if stride == stride_wanted) for stride_wanted in wanted]
        net: Any = timm.create_model(name, features_only=True, out_indices=indices, pretrained=pretrained, **kwargs)
        self.net, self.nhwc = net, str(getattr(net, "output_fmt", "NCHW")).endswith("NHWC")
        self._out_features = list(out_features)
        self._out_feature_channels = dict(zip(out_features, net.feature_info.channels(), strict=True))
        self._out_feature_strides = dict(zip(out_features, wanted, strict=True))

    @property
    def size_divisibility(self) -> int:
        """Return the coarsest stride, of which the sides of images must be multiples."""
        return max(self._out_feature_strides.values())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Map images (B, C, H, W) to a dict, name → feature map (B, channels, H/stride, W/stride)."""
        maps = {}
        for name, features in zip(self._out_features, self.net(x), strict=True):
            maps[name] = features.permute(0, 3, 1, 2) if self.nhwc else features
        return maps


def _strides(name: str, kwargs: dict[str, Any]) -> list[int]:
    import timm

    with torch.device("meta"):
        whole: Any = timm.create_model(name, features_only=True, **kwargs)
    return whole.feature_info.reduction()


@renamed(input_format="channel_order")
def with_quac(
    backbone: nn.Module,
    pixel_mean: Any,
    pixel_std: Any,
    channel_order: str = "bgr",
    quac: QuACConfig | dict[str, Any] | None = None,
    prior: PriorConfig | dict[str, Any] | None = None,
) -> nn.Module:
    """Put QuAC, a degradation prior or both into any backbone, in place; for lazy configs ``L(with_quac)(…)``.

    Args:
        backbone: detectron2's ResNet (whose activations become modules), Swin, ViT, MViT, an FPN over one of these, or
            your own. If a part of the backbone is frozen and others learn, activations in that part are frozen too.
        pixel_mean, pixel_std: mean and standard deviation of the model's normalization, for pixels up to 255.
        channel_order: the order of the model's images, ``"bgr"`` or ``"rgb"``; capitals, as in ``INPUT.FORMAT``, too.
        quac: a :class:`quac_plugins.QuACConfig` or a dict of its options; None puts none in. A lazy config takes the
            dict, or ``L(QuACConfig)(…)``.
        prior: a :class:`quac_plugins.PriorConfig` or a dict of its options; None puts none in.

    Returns:
        The backbone.

    Raises:
        ValueError: an option is unknown, or a pattern matches nothing.
        RuntimeError: the backbone does not run on images of its own sizes.

    Example:
        >>> from detectron2.modeling.backbone.resnet import BasicStem, ResNet
        >>> resnet = ResNet(BasicStem(), ResNet.make_default_stages(18), out_features=["res5"])
        >>> backbone = with_quac(resnet, [103.53, 116.28, 123.675], [1.0, 1.0, 1.0], quac={"where": "spatial"})
        >>> type(backbone.res2[0].act1).__name__
        'QACON'
    """
    with named("channel_order"):
        one_of("format", channel_order, [*CHANNEL_ORDERS, *map(str.upper, CHANNEL_ORDERS)])
    images = in_unit_range(pixel_mean, pixel_std, channel_order.lower(), ("pixel_mean", "pixel_std"))
    configs: list[QuACConfig | PriorConfig] = []
    for cls, key, config in ((QuACConfig, "quac", quac), (PriorConfig, "prior", prior)):
        if config is not None:
            options = {**({"norm": "layer"} if cls is QuACConfig else {}), **_options(config)}
            configs.append(replace(read_options(cls, options, key), **images))
    return put_into(
        with_activations(backbone), configs, len(images["mean"]), {"quac": "quac.where", "prior": "prior.site"}
    )


def _options(config: Any) -> dict[str, Any]:
    """Return the options of a config of this package, a dict, or a node of a lazy config."""
    if isinstance(config, (QuACConfig, PriorConfig)):
        return {field.name: getattr(config, field.name) for field in fields(config)}
    return dict(OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config)  # type: ignore


def put_into(
    backbone: Backbone, configs: list[QuACConfig | PriorConfig], in_chans: int, keys: dict[str, str]
) -> Backbone:
    """Inject configs one after the other; errors begin with the key of ``quac`` or of ``prior``."""
    # detectron2's Swin says its divisibility under a misspelt name, so that asking for it is an AttributeError
    divisor, square = getattr(backbone, "size_divisibility", 0), _square_size(backbone)
    example = torch.empty(1, in_chans, *(square or -(-_EXAMPLE // max(divisor, 1)) * max(divisor, 1),) * 2)
    with all_or_nothing(backbone):
        for config in configs:
            with named(keys["quac" if isinstance(config, QuACConfig) else "prior"]):
                if isinstance(config, PriorConfig):  # which among tokens is made for a grid of them
                    inject(backbone, config, example)
                else:
                    _inject_quac(backbone, config, example if divisor or square else None, in_chans)
    return backbone


def _square_size(backbone: nn.Module) -> int:
    return getattr(backbone, "padding_constraints", {}).get("square_size", 0)


def _inject_quac(backbone: nn.Module, config: QuACConfig, example: Tensor | None, in_chans: int) -> None:
    """Inject activations; where FREEZE_AT freezes some of the stages, freeze their activations too."""
    learns = {name: [p.requires_grad for p in part.parameters()] for name, part in backbone.named_modules()}
    if example is not None:
        inject(backbone, config, example)
    else:
        try:  # a backbone that takes any size may pad inside: the tap belongs to what sees the image before that
            inject(backbone, config, torch.empty(1, in_chans, _EXAMPLE + 1, _EXAMPLE + 1))
        except RuntimeError:
            inject(backbone, config, torch.empty(1, in_chans, _EXAMPLE, _EXAMPLE))
    record = injection_of(backbone)
    for site in record.sites if record is not None else ():
        around = learns[site.name.rpartition(".")[0]]
        if any(learns[""]) and around and not any(around):
            backbone.get_submodule(site.name).requires_grad_(False)


@in_use()
def _build(cfg: CfgNode, input_shape: ShapeSpec, make: Callable[[], Backbone]) -> Backbone:
    """Build a backbone by ``make``, and inject the modules of the config."""
    configs = configs_of(cfg)  # before anything is built
    keys = {"quac": f"{KEY}.WHERE", "prior": f"{PRIOR_KEY}.SITE"}
    return put_into(make(), configs, input_shape.channels, keys)


def _resnet(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    return with_activations(build_resnet_backbone(cfg, input_shape))


def _fpn(cfg: CfgNode, bottom_up: Backbone, top_block: nn.Module) -> Backbone:
    return FPN(
        bottom_up=bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
