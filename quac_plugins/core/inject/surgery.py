"""Putting activations into a built host and taking them out again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quac_plugins.core.activations import ChannelActivation
from quac_plugins.core.hooks import AFTER_NAME, TAP_NAME, after_hook, remove_hooks
from quac_plugins.core.inject.config import QuACConfig
from quac_plugins.core.inject.sites import Site, find_sites
from quac_plugins.core.inject.trace import Trace, trace
from quac_plugins.core.quality.context import QualityContext
from quac_plugins.core.quality.table import QualityFunction, resolve_quality
from quac_plugins.core.quality.tap import QualityTap

_RECORD = "_quac_injection"


class WidthSwitch(nn.Module):
    """One module of the host that is called with several widths: one activation for each width.

    Args:
        sites: width → activation.
    """

    def __init__(self, sites: dict[int, ChannelActivation]):
        super().__init__()
        self.widths = nn.ModuleDict({str(width): site for width, site in sites.items()})
        self.channel_dim = next(iter(sites.values())).channel_dim

    def forward(self, x: Tensor, q: Tensor | None = None) -> Tensor:
        """Activate x (B, C, …) by the activation of its width; ValueError if there is none for C."""
        width = str(x.shape[self.channel_dim])
        if width not in self.widths:
            raise ValueError(f"no activation for {width} channels; there are: {', '.join(self.widths)}")
        return self.widths[width](x, q)


@dataclass
class Injection:
    """What was put into a host: enough to save it, take it out and describe it.

    Attributes:
        config: as given to :func:`inject`.
        sites: where, in module order.
        tap: name of the layer that is tapped, None if the activation needs no quality.
        quality: the quality function, None likewise.
        replaced: site name → the host's own module (in a tuple, so that it is no parameter of the host).
        attributes: attributes of the host that a door has rewritten, as they were; :func:`remove` restores them.
        added: attributes that a door has added; :func:`remove` deletes them.
    """

    config: QuACConfig
    sites: list[Site]
    tap: str | None
    quality: QualityFunction | None
    replaced: dict[str, tuple[nn.Module, ...]]
    attributes: dict[str, Any] = field(default_factory=dict)
    added: list[str] = field(default_factory=list)

    def prefixes(self) -> tuple[str, ...]:
        """State-dict prefixes of what was put in."""
        return tuple(f"{s.name}.{AFTER_NAME}." if s.after else f"{s.name}." for s in self.sites)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile``, DistributedDataParallel, DataParallel or an averaged copy."""
    while _RECORD not in model.__dict__:
        inner = model._modules.get("_orig_mod", model._modules.get("module"))
        if inner is None:
            break
        model = inner
    return model


def injection_of(model: nn.Module) -> Injection | None:
    """What was put into a model (also a wrapped one, see :func:`unwrap`), or None."""
    return unwrap(model).__dict__.get(_RECORD)


def inject(model: nn.Module, config: QuACConfig | None = None, example: Tensor | None = None) -> nn.Module:
    """Put quality-adaptive activations into a host, in place.

    Args:
        model: any network on images (B, C, H, W).
        config: what and where; see :class:`QuACConfig`.
        example: images as the host gets them, used for their shape alone; needed when the host takes other sizes than
            its ``pretrained_cfg`` says, or than (B, 3, 224, 224).

    Returns:
        The model.

    Raises:
        ValueError: the model already holds QuAC; a pattern of ``where`` matches nothing; an unknown name.
        RuntimeError: the host does not run on such images, or no layer of it sees the image.

    Example:
        >>> import timm, torch, quac_plugins as quac
        >>> host = timm.create_model("test_resnet").eval()
        >>> images = torch.rand(2, 3, 64, 64)
        >>> before = host(images)
        >>> _ = quac.inject(host, quac.QuACConfig(activation="qacon", where="spatial"))
        >>> torch.allclose(host(images), before)
        True
    """
    config = config if config is not None else QuACConfig()
    if not isinstance(config, QuACConfig):
        raise TypeError(f"config must be a QuACConfig, got {type(config).__name__}")
    if example is not None and (not isinstance(example, Tensor) or example.ndim != 4):
        got = tuple(example.shape) if isinstance(example, Tensor) else type(example).__name__
        raise ValueError(f"example must be a tensor of images (B, C, H, W), got {got}")
    if injection_of(model) is not None:
        raise ValueError(f"{type(model).__name__} already holds QuAC; call quac_plugins.remove(model) first")
    quality = None
    if config.activation_class.needs_quality:
        quality = resolve_quality(config.quality, config.quality_channels, config.quality_grad)
    seen = trace(model, example)
    sites, _ = find_sites(model, seen, config.patterns)
    if quality is not None and seen.tap is None:
        raise RuntimeError(
            f"no layer of {type(model).__name__} is called with the image itself as its first argument, so there is no "
            "place to compute its quality"
        )
    return place(model, config, sites, seen, quality)


def place(
    model: nn.Module, config: QuACConfig, sites: list[Site], seen: Trace, quality: QualityFunction | None
) -> nn.Module:
    """Carry out an injection whose sites are known: build all modules first, then put them in."""
    context = QualityContext(quality.channels, seen.tap or "") if quality is not None else None
    device, dtype = _placement(model)
    built = []
    with torch.device(device):
        for site in sites:
            host = None if site.after else model.get_submodule(site.name)
            built.append(_build(site, config, host, context).to(dtype=dtype))
        tap = None
        if quality is not None and context is not None and seen.tap is not None:
            mean, std = _normalization(model, config, seen.in_chans)
            tap = QualityTap(quality, context, seen.tap, seen.in_chans, mean, std, config.channel_order)
    replaced: dict[str, tuple[nn.Module, ...]] = {}
    for site, module in zip(sites, built, strict=True):
        host = model.get_submodule(site.name)
        module.train(host.training)
        if site.after:
            host.add_module(AFTER_NAME, module)
            if not _runs_children(host):
                host.register_forward_hook(after_hook)
        else:
            replaced[site.name] = (host,)
            _swap(model, host, module)
    setattr(model, _RECORD, Injection(config, sites, seen.tap if tap is not None else None, quality, replaced))
    if tap is not None and seen.tap is not None:
        tap.attach(model.get_submodule(seen.tap))
    return model


def _build(site: Site, config: QuACConfig, host: nn.Module | None, context: QualityContext | None) -> nn.Module:
    modules = {}
    for channels in site.channels:
        arguments: dict[str, Any] = {"channel_dim": site.channel_dim, "init": config.init, "host": host}
        if config.is_driven:
            arguments.update(norm=config.norm, reduction=config.reduction)
        if config.activation_class.needs_quality:
            assert context is not None
            expand = site.expand_q if site.expand_q != "error" else config.expand_q
            arguments.update(quality_channels=context.channels, expand_q=expand)
        module = config.activation_class(channels, **arguments)
        module.context = context
        module.layer = site.name
        modules[channels] = module
    if len(modules) == 1:
        return next(iter(modules.values()))
    return WidthSwitch(modules)


def _runs_children(module: nn.Module) -> bool:
    """A Sequential runs a new child by itself, after the others."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _swap(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever ``old`` is: a module may hang at several places."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old and parent is not new:
                parent._modules[name] = new


def _placement(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    for parameter in model.parameters():
        if parameter.is_floating_point():
            return parameter.device, parameter.dtype
    return torch.device("cpu"), torch.get_default_dtype()


def _normalization(
    model: nn.Module, config: QuACConfig, in_chans: int
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """mean and std from the config, else from the host's pretrained_cfg, for as many channels as the tap reads."""
    cfg = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    mean, std = config.mean, config.std
    if mean is None and isinstance(cfg, dict) and "mean" in cfg and "std" in cfg:
        mean, std = tuple(cfg["mean"]), tuple(cfg["std"])
    if mean is None or std is None:
        return None, None
    wanted = min(in_chans, 3)
    if len(mean) == 1 or len(mean) == wanted:
        return mean, std
    if len(mean) == 3:  # a grey host of a colour recipe: timm normalizes by the mean of the three
        return (sum(mean) / 3,) * wanted, (sum(std) / 3,) * wanted
    raise ValueError(f"mean and std have {len(mean)} numbers, the host's images have {in_chans} channels")


def remove(model: nn.Module) -> nn.Module:
    """Take out what :func:`inject` put in: the host has its own activations, parameters and names again.

    Args:
        model: a model with QuAC inside.

    Returns:
        The model.

    Raises:
        ValueError: there is nothing to remove.

    Example:
        >>> import timm, quac_plugins as quac
        >>> model = quac.remove(timm.create_model("test_resnet_qacon"))
        >>> any("quac" in name or "fc3" in name for name in model.state_dict())
        False
    """
    record = injection_of(model)
    if record is None:
        raise ValueError(f"{type(model).__name__} holds no QuAC; nothing to remove")
    whole, model = model, unwrap(model)
    if record.tap is not None:
        layer = model.get_submodule(record.tap)
        layer.get_submodule(TAP_NAME).detach(layer)  # type: ignore[operator]
    for site in reversed(record.sites):
        module = model.get_submodule(site.name)
        if site.after:
            remove_hooks(module, after_hook)
            delattr(module, AFTER_NAME)
        else:
            _swap(model, module, record.replaced[site.name][0].train(module.training))
    for name, value in record.attributes.items():
        setattr(model, name, value)
    for name in record.added:
        delattr(model, name)
    delattr(model, _RECORD)
    return whole
