"""The keys of a yacs config and their meaning: checked before anything is built; an error names its key."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from detectron2.config import CfgNode
from torch import Tensor, nn

from quac_plugins.core.host.facts import add_reader
from quac_plugins.core.inject import PriorConfig, QuACConfig
from quac_plugins.core.options import named, numbers, pattern_list, read_options

KEY, PRIOR_KEY, TIMM_KEY = "MODEL.QUAC", "MODEL.QUAC.PRIOR", "MODEL.QUAC.TIMM"
_QUAC = ("ACTIVATION", "WHERE", "QUALITY", "INIT", "NORM", "REDUCTION")
_PRIOR = ("SITE", "FDM", "FDM_WIDTH", "FDM_ACT", "EXPERTS", "MARGINS", "TOP_K", "QUALITY", "FREEZE")


def add_quac_config(cfg: CfgNode) -> None:
    """Add the keys below ``MODEL.QUAC``, with their defaults, to a config.

    The keys are the options of :class:`quac_plugins.QuACConfig` and, below ``PRIOR``, of
    :class:`quac_plugins.PriorConfig`. Commas separate several patterns; an ``FDM_WIDTH`` of 0 and an empty ``SITE``
    leave the choice to the FDM.

    Example:
        >>> from detectron2.config import get_cfg
        >>> cfg = get_cfg()
        >>> add_quac_config(cfg)
        >>> cfg.MODEL.QUAC.QUALITY
        'brisque'
    """
    if "QUAC" in cfg.MODEL:
        return
    quac, prior = QuACConfig(norm="layer"), PriorConfig()
    cfg.MODEL.QUAC = CfgNode(
        {
            "ENABLED": True,
            **{name: getattr(quac, name.lower()) for name in _QUAC},
            # activations of the ROI heads: "all", "spatial", patterns of names below roi_heads, such as "box_head.*"
            "HEADS": "",
            "PRIOR": {"ENABLED": False, **{name: getattr(prior, name.lower()) for name in _PRIOR}},
            # of build_quac_timm_fpn_backbone
            "TIMM": {"NAME": "resnet50", "PRETRAINED": True},
        }
    )
    cfg.MODEL.QUAC.PRIOR.FDM_WIDTH, cfg.MODEL.QUAC.PRIOR.SITE = 0, ""


def configs_of(cfg: CfgNode) -> list[QuACConfig | PriorConfig]:
    """Return the checked configs of the modules that go into the backbone.

    Raises:
        KeyError: ``add_quac_config`` was not called.
        ValueError: a value is wrong; the message begins with its key.
    """
    if "QUAC" not in cfg.MODEL:
        raise KeyError(
            "the config has no MODEL.QUAC: call quac_plugins.detectron2.add_quac_config(cfg) after get_cfg(), before "
            "merging files"
        )
    quac, configs = cfg.MODEL.QUAC, []
    if quac.ENABLED:
        configs.append(_of_keys(QuACConfig, KEY, {name: quac[name] for name in _QUAC}))
    if quac.PRIOR.ENABLED:
        values = {name: quac.PRIOR[name] for name in _PRIOR}
        values["FDM_WIDTH"], values["SITE"] = values["FDM_WIDTH"] or None, values["SITE"] or None
        configs.append(_of_keys(PriorConfig, PRIOR_KEY, values))
    images = images_of(cfg, any(reads_quality(config) for config in configs))
    configs = [replace(config, **images) for config in configs]
    with named(f"{KEY}.HEADS"):
        if quac.HEADS and cfg.MODEL.META_ARCHITECTURE != "QuACGeneralizedRCNN":
            raise ValueError(
                "activations of the ROI heads need MODEL.META_ARCHITECTURE 'QuACGeneralizedRCNN', got "
                f"{cfg.MODEL.META_ARCHITECTURE!r}"
            )
        if quac.HEADS and not quac.ENABLED:
            raise ValueError("needs MODEL.QUAC.ENABLED: q comes from the backbone's first layer")
        if quac.HEADS:
            head_patterns(patterns(quac.HEADS))
    return configs


def reads_quality(config: QuACConfig | PriorConfig) -> bool:
    """Return whether the modules of a config read q, so that q is computed."""
    return config.activation_class.needs_quality if isinstance(config, QuACConfig) else config.needs_quality


def images_of(cfg: CfgNode, read: bool = True) -> dict[str, Any]:
    """Return mean, std and channel_order of the backbone's images, as options of :class:`QuACConfig`.

    Args:
        cfg: the config of a model.
        read: whether a quality function reads the images.
    """
    order = cfg.INPUT.FORMAT.lower()
    if read and order not in ("rgb", "bgr") and len(cfg.MODEL.PIXEL_MEAN) > 1:
        raise ValueError(
            f"INPUT.FORMAT {cfg.INPUT.FORMAT!r}: quality is a matter of RGB; known: RGB, BGR, and L with one channel"
        )
    keys = ("MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD")
    return in_unit_range(cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD, order if order in ("rgb", "bgr") else "rgb", keys)


def in_unit_range(pixel_mean: Any, pixel_std: Any, order: str, keys: tuple[str, str]) -> dict[str, Any]:
    """Convert detectron2's mean and std, for pixels up to 255, to pixels up to 1; errors begin with ``keys``."""
    with named(keys[0]):
        mean = numbers("it", pixel_mean)
    with named(keys[1]):
        std = numbers("it", pixel_std)
        if len(std) != len(mean) or min(std) <= 0:
            raise ValueError(f"must be {len(mean)} numbers above 0, as many as {keys[0]} has, got {std}")
    return {"mean": tuple(v / 255 for v in mean), "std": tuple(v / 255 for v in std), "channel_order": order}


@add_reader
def read_facts(model: nn.Module) -> dict[str, Any]:
    """Return mean and std with which a detector normalizes its backbone's images."""
    mean, std = (getattr(model, name, None) for name in ("pixel_mean", "pixel_std"))
    if not isinstance(mean, Tensor) or not isinstance(std, Tensor):
        return {}
    return {"inner_normalization": tuple(tuple(v / 255 for v in values.flatten().tolist()) for values in (mean, std))}


def patterns(value: Any) -> str | list[str]:
    """Split patterns at commas, or take a list; a regular expression keeps its commas."""
    if not isinstance(value, str):
        return value
    parts = [value] if value.startswith("re:") else [part.strip() for part in value.split(",")]
    return parts[0] if len(parts) == 1 else parts


def head_patterns(where: Any) -> list[str]:
    """Return checked patterns of activations in ROI heads."""
    wanted = pattern_list("where", where)
    for pattern in wanted:
        if pattern in ("auto", "last"):
            raise ValueError(
                f"{pattern!r} is a place in a backbone; ROI heads take 'all', 'spatial' or patterns of names"
            )
    return wanted


def _of_keys(cls: Any, key: str, values: dict[str, Any]) -> Any:
    arguments = {name.lower(): value for name, value in values.items()}
    for name in ("where", "site"):
        if name in arguments:
            with named(f"{key}.{name.upper()}"):
                arguments[name] = patterns(arguments[name])
    return read_options(cls, arguments, key, lambda name: f"{key}.{name.upper()}")
