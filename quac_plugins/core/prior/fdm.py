"""Feature de-drifting modules (FDM), which turn the features of a degraded image back into the clean image's.

Source: Wang et al., "Deep Degradation Prior for Low-Quality Image Classification", CVPR 2020. An FDM is one class:
``name`` and ``build``. Defining it puts it into the table.

FDMs work on features standardized per channel, z = (x − mean) / std with the clean features' statistics, and are
residual, y = x + std · r(z). The last layer of r starts at zero, so a fresh module changes nothing.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quac_plugins.core.activations import ACTIVATIONS, ChannelActivation, DrivenActivation
from quac_plugins.core.graphs import called_whole, exporting
from quac_plugins.core.naming import unknown
from quac_plugins.core.prior.sites import Grid, PriorSite

FDMS: dict[str, type[FDM]] = {}

PLAIN_ACTS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
    "leaky_relu": nn.LeakyReLU,
}

LAYOUTS = {"nchw": "(B, {}, H, W)", "nhwc": "(B, H, W, {})", "tokens": "(B, N, {})"}

_FOLDS = {1: 4, 2: 2, 4: 2}  # stride of the site → side of the squares of pixels that a folding FDM works on


def act_names() -> list[str]:
    """Return the names that ``fdm_act`` may have."""
    return [*PLAIN_ACTS, *ACTIVATIONS]


def needs_quality(act: str) -> bool:
    """Return whether an activation reads q."""
    return act in ACTIVATIONS and ACTIVATIONS[act].needs_quality


def make_act(act: str, channels: int, quality_channels: int) -> nn.Module:
    """Build an activation of an FDM: a plain one, or one of ACTIVATIONS that starts as a ReLU."""
    if act in PLAIN_ACTS:
        return PLAIN_ACTS[act]()
    arguments: dict[str, Any] = {"init": "preserve", "host": nn.ReLU()}
    cls = ACTIVATIONS[act]
    if issubclass(cls, DrivenActivation):
        arguments["norm"] = "layer"  # a handful of images is no batch
    if cls.needs_quality:
        arguments["quality_channels"] = quality_channels
    return cls(channels, **arguments)


class FDM(nn.Module):
    """The base of all feature de-drifting modules: layout, standardization and the residual.

    Args:
        site: the site: channels, layout, stride.
        width: the number of channels inside. None: the class's own rule.
        act: an activation of :func:`act_names`.
        quality_channels: Q, for activations that read q.

    Attributes:
        mean, std: (C,) statistics of the clean features; 0 and 1 before a fit sets them.
    """

    name: ClassVar[str] = ""
    places: ClassVar[str] = "stages"  # where it is meant to go
    folds: ClassVar[bool] = False  # r works on 2×2 pixels at once (4×4 at full resolution) where the site is fine
    mean: Tensor
    std: Tensor

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if not cls.__dict__.get("name"):
            return
        taken = FDMS.get(cls.name)
        if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"the FDM name {cls.name!r} is taken by {taken.__module__}.{taken.__qualname__}")
        FDMS[cls.name] = cls

    def __init__(self, site: PriorSite, width: int | None = None, act: str = "relu", quality_channels: int = 0):
        super().__init__()
        self.site = site
        self.image_size: Any = None  # an ImageSize, where tokens stand on a grid over the image
        self.fold = _FOLDS.get(site.stride, 1) if self.folds and site.grid is None else 1
        self.register_buffer("mean", torch.zeros(site.channels))
        self.register_buffer("std", torch.ones(site.channels))
        self.body = self.build(site.channels * self.fold**2, width, act, quality_channels)
        last = self.body[-1]
        for parameter in last.parameters():
            nn.init.zeros_(parameter)

    def build(self, channels: int, width: int | None, act: str, quality_channels: int) -> nn.Sequential:
        """Build r, which keeps the shape (B, channels, H, W); the constructor sets its last module to zero."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it is built of")

    def forward(
        self, x: Tensor, onto: Tensor | None = None, weight: Tensor | None = None, grid: Grid | None = None
    ) -> Tensor:
        """Repair features x of the site's layout; shape and dtype stay.

        Args:
            x: features.
            onto: the summand beside std · r. None: x.
            weight: (B,), the weight of std · r. None: 1.
            grid: (h, w) of the tokens. None: the grid of the tokens' image, or of the site.
        """
        if (node := called_whole(self, x)) is not None:
            return node
        r = self.residual(standardized(x, self, grid))
        if weight is not None:
            r = r * weight.to(r.dtype).view(-1, 1, 1, 1)
        return restored(x if onto is None else onto, r, self)

    def residual(self, z: Tensor) -> Tensor:
        """Compute r(z) of standardized features (B, C, H, W)."""
        if self.fold == 1:
            return self.body(z)
        exported = exporting()  # for all sizes
        if not exported and z.shape[0] == 0:  # which pixel_unshuffle leaves as it is
            return z
        height, width = z.shape[2:]
        # nothing below 0 is divided: compiled C++ would round it the other way
        bottom, right = ((n + self.fold - 1) // self.fold * self.fold - n for n in (height, width))
        if exported or bottom or right:
            z = F.pad(z, (0, right, 0, bottom), mode="replicate")
        z = F.pixel_shuffle(self.body(F.pixel_unshuffle(z, self.fold)), self.fold)
        if exported:  # a slice is a view, whose strides, and so whose guards, would be those of one size
            rows, columns = (torch.arange(n, device=z.device) for n in (height, width))
            return z.index_select(2, rows).index_select(3, columns)
        return z[:, :, :height, :width]

    @property
    def reads_quality(self) -> bool:
        """Return whether an activation inside needs the q of the image."""
        return any(isinstance(m, ChannelActivation) and m.needs_quality for m in self.modules())

    @property
    def is_fresh(self) -> bool:
        """Return whether the module is still as created: the identity, not standardized."""
        return all_zero(self.mean, self.std - 1, *self.body[-1].parameters())

    def extra_repr(self) -> str:
        """Return the site, for ``print(model)``."""
        return f"{self.name!r}, {self.site.channels} channels, {self.site.layout}, fold={self.fold}"


def all_zero(*values: Any) -> bool:
    """Return whether all values are tensors of zeros, or without numbers; quantized values are no tensors."""
    if not all(isinstance(value, Tensor) for value in values):
        return False
    return not any(bool(tensor.any()) for tensor in values if not tensor.is_meta)


def standardized(x: Tensor, module: Any, grid: Grid | None = None) -> Tensor:
    """Compute z (B, C, H, W) of features in the layout of ``module.site``, by the module's mean and std."""
    z = _as_image(x, module.site, grid, module.image_size)
    return (z - _column(module.mean, z)) / _column(module.std, z)


def restored(x: Tensor, r: Tensor, module: Any) -> Tensor:
    """Compute x + std · r, in the layout and dtype of x."""
    r = (r * _column(module.std, r)).to(x.dtype)
    site = module.site
    if site.layout == "nchw":
        return x + r
    if site.layout == "nhwc":
        return x + r.permute(0, 2, 3, 1)
    r = r.flatten(2).transpose(1, 2)
    return torch.cat((x[:, : site.prefix], x[:, site.prefix :] + r), dim=1) if site.prefix else x + r


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.dtype).view(1, -1, 1, 1)


def _as_image(x: Tensor, site: PriorSite, grid: Grid | None, image_size: Any) -> Tensor:
    axis = 1 if site.layout == "nchw" else -1
    if not isinstance(x, Tensor) or x.ndim != (3 if site.layout == "tokens" else 4) or x.shape[axis] != site.channels:
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        shape = LAYOUTS[site.layout].format(site.channels)
        raise ValueError(f"the prior after {site.name!r} expects features {shape}, got {got}")
    if site.layout == "nchw":
        return x
    if site.layout == "nhwc":
        return x.permute(0, 3, 1, 2)
    told = grid is not None and site.prefix + grid[0] * grid[1] == x.shape[1]  # else it is of something else
    if not told and image_size is not None:
        grid = image_size.grid(site, x.shape[1])
        told = grid is not None
    height, width = (grid if told else site.grid) or (0, 0)
    if x.shape[1] != site.prefix + height * width:
        raise ValueError(
            f"the prior after {site.name!r} was put in for {height}×{width} tokens and {site.prefix} in front, got "
            f"{x.shape[1]} tokens, which are no grid of stride {site.stride} over the image. For images of another "
            "size inject it with example=torch.empty(1, C, H, W)"
        )
    return x[:, site.prefix :].transpose(1, 2).unflatten(2, (height, width))


class _Surround(nn.Module):
    """Classical centre (3×3) plus dilated surround: the non-classical receptive field of the paper."""

    def __init__(self, channels: int, width: int, dilation: int):
        super().__init__()
        self.centre = nn.Conv2d(channels, width, 3, padding=1)
        self.surround = nn.Conv2d(channels, width, 3, padding=dilation, dilation=dilation)

    def forward(self, x: Tensor) -> Tensor:
        return self.centre(x) + self.surround(x)


class NCRF(FDM):
    """The paper's idea: convolutions with a classical centre and a surround that grows, 2, 4, 8 pixels.

    Example:
        >>> import torch
        >>> module = NCRF(PriorSite("layer1", 16, "nchw", stride=4))
        >>> x = torch.randn(2, 16, 20, 20)
        >>> torch.equal(module(x), x)
        True
    """

    name = "ncrf"

    def build(self, channels: int, width: int | None, act: str, quality_channels: int) -> nn.Sequential:
        """Build three centre-surround convolutions and a 1×1; the width is the site's channels, from 32 to 128."""
        width = width or min(max(channels, 64), 128)
        layers: list[nn.Module] = []
        for dilation, inputs in ((2, channels), (4, width), (8, width)):
            layers += [_Surround(inputs, width, dilation), make_act(act, width, quality_channels)]
        return nn.Sequential(*layers, nn.Conv2d(width, channels, 1))


class Dense(FDM):
    """Four dense 3×3 convolutions of dilation 1, 2, 4, 1 at the site's own resolution: the most exact, and the dearest.

    Example:
        >>> Dense(PriorSite("blocks.0", 16, "nchw", stride=2)).body[0].out_channels
        64
    """

    name = "dense"

    def build(self, channels: int, width: int | None, act: str, quality_channels: int) -> nn.Sequential:
        """Build the four convolutions; the width is the site's channels, from 64 to 128."""
        width = width or min(max(channels, 64), 128)
        layers: list[nn.Module] = []
        for dilation, inputs in ((1, channels), (2, width), (4, width)):
            layers.append(nn.Conv2d(inputs, width, 3, padding=dilation, dilation=dilation))
            layers.append(make_act(act, width, quality_channels))
        return nn.Sequential(*layers, nn.Conv2d(width, channels, 3, padding=1))


class _Separable(nn.Module):
    """Depthwise k×k with dilation, activation, 1×1, residual."""

    def __init__(self, width: int, kernel: int, dilation: int, act: str, quality_channels: int):
        super().__init__()
        self.depthwise = nn.Conv2d(
            width, width, kernel, padding=dilation * (kernel // 2), dilation=dilation, groups=width
        )
        self.act = make_act(act, width, quality_channels)
        self.pointwise = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.pointwise(self.act(self.depthwise(x)))


class Light(FDM):
    """For mobile networks: depthwise 5×5 convolutions, the surround by dilation, and 1×1 between.

    Example:
        >>> import torch
        >>> module = Light(PriorSite("blocks.0", 16, "nchw", stride=2), act="qacon", quality_channels=36)
        >>> module.fold
        2
    """

    name = "light"
    folds = True

    def build(self, channels: int, width: int | None, act: str, quality_channels: int) -> nn.Sequential:
        """Build 1×1, three separable convolutions of dilation 1, 2, 4, 1×1; width 24 at a stem's stride, else 32."""
        width = width or (24 if 0 < self.site.stride < 4 else 32)
        layers = [_Separable(width, 5, dilation, act, quality_channels) for dilation in (1, 2, 4)]
        return nn.Sequential(nn.Conv2d(channels, width, 1), *layers, nn.Conv2d(width, channels, 1))


def resolve_fdm(name: str) -> type[FDM]:
    """Return the FDM's class of a name; a ValueError lists the known names.

    Example:
        >>> resolve_fdm("light").__name__
        'Light'
    """
    if isinstance(name, str) and name in FDMS:
        return FDMS[name]
    raise unknown("unknown FDM", name, FDMS)
