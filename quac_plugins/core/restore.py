"""Restore first, then recognize: any image restorer in front of a model, with or without QuAC inside.

The two answers to a bad image do not exclude each other: a restorer mends the image, and the activations adapt to what
is left. Which image they adapt to is a choice. With ``adapt_to="restored"`` q describes what the network sees, as it
does without a restorer; with ``adapt_to="degraded"`` q describes what came in, and so tells the network how much of
what it sees the restorer has made up.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quac_plugins.core.colours import CHANNEL_ORDERS, in_order
from quac_plugins.core.deprecated import renamed
from quac_plugins.core.host.facts import facts_of
from quac_plugins.core.inject.images import for_channels
from quac_plugins.core.inject.surgery import unwrap
from quac_plugins.core.options import numbers
from quac_plugins.core.precision import full_precision
from quac_plugins.core.private import has_numbers
from quac_plugins.core.quality.context import QualityContext
from quac_plugins.core.quality.given import quality_given
from quac_plugins.core.quality.tap import FAR, QualityTap
from quac_plugins.core.restorer_output import as_tensor

ADAPT_TO = ("restored", "degraded")
RESTORER_INPUTS = ("pt", "np", "pil")

# What timm's users ask a model for, answered by the model inside. Other names are refused: a method that takes images
# would pass the restorer by without a word.
_OF_THE_MODEL = (
    "num_classes",
    "num_features",
    "head_hidden_size",
    "feature_info",
    "pretrained_cfg",
    "default_cfg",
    "get_classifier",
    "reset_classifier",
    "set_grad_checkpointing",
)
# Those of its methods that take images, and get restored ones.
_OF_IMAGES = ("forward_features", "forward_intermediates")


@renamed(quality="adapt_to")
def restore_then(
    model: nn.Module,
    restorer: Callable[..., Any],
    adapt_to: str = "restored",
    *,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    channel_order: str | None = None,
    restorer_input: str = "pt",
    restorer_kwargs: Mapping[str, Any] | None = None,
) -> RestoreThen:
    """Put an image restorer in front of a model.

    Args:
        model: takes normalized images (B, C, H, W) with C = 3 (RGB or BGR) or 1 (grey), and holds QuAC or not.
        restorer: image → image: a restoration network, a function, a pipeline of diffusers. See :class:`RestoreThen`.
        adapt_to: which images QuAC's quality features describe: ``"restored"``, those that the model sees, or
            ``"degraded"``, those that came in.
        mean: the mean with which the model's images are normalized, one number or one for each channel.
        std: the standard deviation likewise, above 0. Give both or neither; None: the values of QuAC's tap, else of the
            model's own config, else the images are in [0, 1].
        channel_order: ``"rgb"`` or ``"bgr"``, the order of the model's images. None: the order of QuAC's tap, else RGB.
        restorer_input: the form of the restorer's input, as diffusers names it: ``"pt"``, a tensor (B, 3, H, W) in
            [0, 1]; ``"np"``, a float32 array (B, H, W, 3) in [0, 1]; ``"pil"``, a list of B pictures.
        restorer_kwargs: further arguments of every call of the restorer, such as a prompt.

    Returns:
        A module with the same inputs and outputs as the model.

    Raises:
        TypeError: the model is no module, or the restorer cannot be called.
        ValueError: an option is not known; mean and std do not fit; the model takes images of other than 1 or 3
            channels; ``adapt_to="degraded"``, and the model holds no QuAC that measures quality.

    Example:
        >>> import timm
        >>> model = timm.create_model("test_resnet").eval()
        >>> blur = torch.nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
        >>> restore_then(model, blur)(torch.rand(2, 3, 64, 64)).shape
        torch.Size([2, 1000])
    """
    return RestoreThen(
        model,
        restorer,
        adapt_to,
        mean=mean,
        std=std,
        channel_order=channel_order,
        restorer_input=restorer_input,
        restorer_kwargs=restorer_kwargs,
    )


@renamed(quality="adapt_to")
class RestoreThen(nn.Module):
    """A model behind an image restorer; :func:`restore_then` describes the arguments.

    Images come as the model takes them. Their normalization is undone, the restorer gets RGB in [0, 1] (a grey image
    three times), and what it returns is clamped, brought back to the size of the images if it has another (bicubic,
    antialiased), normalized again and given to the model, with all other arguments of the call.

    The restorer returns, for B images, a floating point tensor (B, 3, H', W') in [0, 1]; an array (B, H', W', 3),
    floating point in [0, 1] or uint8; a list of B pictures of PIL or such arrays (H', W', 3); or an object that has one
    of these as ``images``. It gets its images as the first argument, or as ``image=`` if it has a parameter of this
    name elsewhere (pipelines that take a prompt first). A restorer that is a module becomes a submodule, and gets
    images in the dtype and on the device of its parameters.

    Gradients flow through a restorer that lets them, as tensors alone can. A q given by hand with
    :func:`quac_plugins.use_q` goes before both settings of ``adapt_to``.

    Attributes:
        model: the model; state dict ``model.*``.
        restorer: the restorer; state dict ``restorer.*`` if it is a module.

    Raises:
        TypeError: the images, or the restorer's output, have none of the types and dtypes above.
        ValueError: the images, or the restorer's output, have none of the shapes above, or the output is not finite.

    Note:
        Several threads may use it as they may use the model. Only if parts of the model are compiled on their own,
        ``adapt_to="degraded"`` is for one thread at a time; compile the whole.
    """

    def __init__(
        self,
        model: nn.Module,
        restorer: Callable[..., Any],
        adapt_to: str = "restored",
        *,
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        channel_order: str | None = None,
        restorer_input: str = "pt",
        restorer_kwargs: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
        if not callable(restorer):
            raise TypeError(f"restorer must be callable, images → images, got {type(restorer).__name__}")
        for what, value, known in (
            ("adapt_to", adapt_to, ADAPT_TO),
            ("restorer_input", restorer_input, RESTORER_INPUTS),
            ("channel_order", channel_order, (None, *CHANNEL_ORDERS)),
        ):
            if value not in known:
                raise ValueError(f"{what} must be one of {', '.join(map(repr, known))}, got {value!r}")
        if (mean is None) != (std is None):
            raise ValueError("mean and std go together; give both or neither")
        self.model = model
        self.restorer = restorer
        self.adapt_to = adapt_to
        self.restorer_input = restorer_input
        self.restorer_kwargs = dict(restorer_kwargs or {})
        self._keyword = _image_keyword(restorer)
        taps = self._taps()
        if adapt_to == "degraded" and not taps:
            raise ValueError(
                f"adapt_to='degraded' needs a model that measures quality, and {type(model).__name__} does not: call "
                "quac_plugins.inject(model, …) first, with an activation that q drives, or use adapt_to='restored'"
            )
        tap = _first_of(taps, normalized=mean is not None)
        self.in_chans = tap.in_chans if tap is not None else None
        self.channel_order = channel_order or (tap.channel_order if tap is not None else "rgb")
        self.mean: tuple[float, ...] | None
        self.std: tuple[float, ...] | None
        if mean is not None and std is not None:
            self.mean, self.std = numbers("mean", mean), numbers("std", std)
        elif tap is not None:
            self.mean, self.std = tap.mean, tap.std
        else:
            said = facts_of(model).normalization or facts_of(unwrap(model)).normalization
            self.mean, self.std = map(numbers, ("mean", "std"), said) if said else (None, None)
        if self.mean is not None and self.std is not None:
            if len(self.mean) != len(self.std):
                raise ValueError(f"mean and std must have as many numbers, got {self.mean} and {self.std}")
            if min(self.std) <= 0:
                raise ValueError(f"std must be positive, got {self.std}")
        if self.in_chans is not None:
            self._normalization(self.in_chans)
        self._warned: set[str] = set()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Read a pickle; one of version 0.1.0 says ``quality`` for ``adapt_to``."""
        super().__setstate__({"adapt_to" if name == "quality" else name: value for name, value in state.items()})

    def extra_repr(self) -> str:
        """Return the restorer and the options, for ``print(model)``."""
        restorer = "" if isinstance(self.restorer, nn.Module) else f"restorer={_name(self.restorer)}, "
        return f"{restorer}adapt_to={self.adapt_to}, mean={self.mean}, std={self.std}"

    def forward(self, images: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Restore images (B, C, H, W), normalized for the model, and return the model's output for them."""
        return self._through(self.model, images, *args, **kwargs)

    def restore(self, images: Tensor) -> Tensor:
        """Return the restored images, (B, C, H, W), normalized for the model, in the dtype of ``images``."""
        if not isinstance(images, Tensor) or images.ndim != 4:
            got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(f"images must be a tensor (B, C, H, W) as the model takes them, got {got}")
        if not images.is_floating_point():
            raise TypeError(
                f"images must be of floating point, got {images.dtype}; convert with images.float() / 255 and "
                "normalize as the model expects"
            )
        if self.in_chans is not None and images.shape[1] != self.in_chans:
            raise ValueError(f"the model takes images (B, {self.in_chans}, H, W), got {tuple(images.shape)}")
        rgb = self._to_rgb(images)
        restored = self._read(self._restored(rgb), rgb)
        return self._to_host(restored, images.shape[1]).to(images.dtype)

    def _through(self, call: Callable[..., Any], images: Tensor, *args: Any, **kwargs: Any) -> Any:
        restored = self.restore(images)
        if self.adapt_to == "restored":
            return call(restored, *args, **kwargs)
        with quality_given(self._quality_of(images)):
            return call(restored, *args, **kwargs)

    # -- quality

    def _taps(self) -> list[QualityTap]:
        return [module for module in self.model.modules() if isinstance(module, QualityTap)]

    def _quality_of(self, images: Tensor) -> list[tuple[QualityContext, Tensor]]:
        """Compute each tap's q of the incoming images, except where the caller gave a q by hand."""
        pairs = []
        for tap in self._taps():
            if tap.context.given_q() is None:
                with full_precision(images):
                    pairs.append((tap.context, tap.quality(tap.to_rgb(images))))
        return pairs

    # -- between the model's images and the restorer's

    def _normalization(self, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Return mean and std for each of the model's channels; None: the images are in [0, 1]."""
        if channels not in (1, 3):
            raise ValueError(
                f"the model takes images of {channels} channels; restorers work on colour images, so it must be 3, or "
                "1 (grey)"
            )
        if self.mean is None or self.std is None:
            return None
        mean, std = for_channels((self.mean, self.std), channels)
        return (mean, std) if len(mean) == channels else (mean * channels, std * channels)

    def _to_rgb(self, images: Tensor) -> Tensor:
        """Convert the model's images to RGB (B, 3, H, W) in [0, 1], at least float32."""
        channels = images.shape[1]
        normalization = self._normalization(channels)
        images = images if images.dtype in (torch.float32, torch.float64) else images.float()
        if normalization is not None:
            mean, std = normalization
            images = torch.stack([images[:, i] * std[i] + mean[i] for i in range(channels)], dim=1)
        if "images" not in self._warned and _can_look(images):
            low, high = _range(images)
            if normalization is None and (low < -0.05 or high > 1.05):
                self._warn(
                    "images",
                    f"images lie in [{low:.2f}, {high:.2f}], but no normalization is known, so they are taken to be in "
                    "[0, 1] and clamped. Give the mean and std that normalize them: restore_then(…, mean=…, std=…)",
                )
            elif normalization is not None and (low < FAR[0] or high > FAR[1]):
                self._warn(
                    "images",
                    f"images lie in [{low:.2f}, {high:.2f}] once mean={self.mean} and std={self.std} are undone, far "
                    "from [0, 1], and are clamped. Divide pictures in 0..255 by 255 and normalize them, or give the "
                    "mean and std that they come with: restore_then(…, mean=…, std=…)",
                )
        if channels == 1:
            images = images.expand(-1, 3, -1, -1)
        return in_order(images, "rgb" if channels == 1 else self.channel_order).clamp(0, 1)

    def _to_host(self, images: Tensor, channels: int) -> Tensor:
        """Convert RGB in [0, 1] to the model's images, the reverse of :meth:`_to_rgb`."""
        if channels == 1:
            images = images.mean(dim=1, keepdim=True)
        else:
            images = in_order(images, self.channel_order)
        normalization = self._normalization(channels)
        if normalization is None:
            return images
        mean, std = normalization
        return torch.stack([(images[:, i] - mean[i]) / std[i] for i in range(channels)], dim=1)

    # -- the restorer

    def _restored(self, rgb: Tensor) -> Any:
        """Return the restorer's output for images (B, 3, H, W) in [0, 1]."""
        images: Any = rgb
        if self.restorer_input != "pt":
            images = np.ascontiguousarray(rgb.detach().float().permute(0, 2, 3, 1).cpu().numpy())
        elif isinstance(self.restorer, nn.Module):
            # a loop, since torch 2.6 cannot trace next() with a default
            for parameter in self.restorer.parameters():
                if parameter.is_floating_point():
                    images = rgb.to(parameter.device, parameter.dtype)
                    break
        if self.restorer_input == "pil":
            from PIL import Image

            if not np.isfinite(images).all():
                raise ValueError("the images hold NaN or infinite values, which no PIL image can hold")
            images = [Image.fromarray(picture) for picture in (images * 255).round().astype(np.uint8)]
        if self._keyword is not None:
            return self.restorer(**{self._keyword: images}, **self.restorer_kwargs)
        return self.restorer(images, **self.restorer_kwargs)

    def _read(self, output: Any, rgb: Tensor) -> Tensor:
        """Convert the restorer's output to (B, 3, H, W) in [0, 1], with the size, dtype and device of ``rgb``."""
        restorer = f"the restorer {_name(self.restorer)!r}"
        restored = as_tensor(output, restorer, rgb.shape[0])
        if restored.ndim != 4 or restored.shape[0] != rgb.shape[0] or restored.shape[1] != 3 or 0 in restored.shape[2:]:
            raise ValueError(
                f"{restorer} returned images of shape {tuple(restored.shape)} (batch, channels, height, width) for "
                f"{tuple(rgb.shape)}; expected ({rgb.shape[0]}, 3, H, W) of any size"
            )
        restored = restored.to(rgb.device, rgb.dtype)
        if _can_look(restored):
            low, high = _range(restored)
            if not (math.isfinite(low) and math.isfinite(high)):
                reason = "" if bool(rgb.isfinite().all()) else ", for images that are not finite themselves"
                raise ValueError(f"{restorer} returned NaN or infinite values{reason}; expected images in [0, 1]")
            if low < -0.5 or high > 1.5:
                self._warn(
                    "restored",
                    f"{restorer} returned values in [{low:.2f}, {high:.2f}], which are clamped to [0, 1]; if it works "
                    "in another range, let it convert its input and output",
                )
        restored = restored.clamp(0, 1)
        if restored.shape[2:] != rgb.shape[2:]:
            restored = F.interpolate(restored, size=rgb.shape[2:], mode="bicubic", antialias=True).clamp(0, 1)
        return restored

    def _warn(self, what: str, message: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            warnings.warn(message, stacklevel=2)

    # -- the manners of a timm model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            model = self.__dict__.get("_modules", {}).get("model")
            if model is None or name.startswith("__"):
                raise
        inner: Any = model if hasattr(model, name) else unwrap(model)
        if name in _OF_THE_MODEL:
            return getattr(inner, name)
        if name in _OF_IMAGES:
            return partial(self._through, getattr(inner, name))
        if name == "no_weight_decay":  # of timm's optimizers, which compare whole names
            return partial(_prefixed, inner.no_weight_decay)
        hint = f"; the model has, as .model.{name}, without the restorer" if hasattr(inner, name) else ""
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{hint}")


def _prefixed(names: Callable[[], Any]) -> set[str]:
    return {f"model.{name}" for name in names()}


def _name(restorer: Any) -> str:
    return getattr(restorer, "__name__", type(restorer).__name__)


def _image_keyword(restorer: Callable[..., Any]) -> str | None:
    """Return ``"image"`` if the restorer has a parameter of this name that is not its first, else None."""
    try:
        call = restorer.forward if isinstance(restorer, nn.Module) else restorer
        parameters = inspect.signature(call).parameters
    except (TypeError, ValueError):  # built-in callables have no signature
        return None
    return "image" if "image" in list(parameters)[1:] else None


def _first_of(taps: list[QualityTap], normalized: bool) -> QualityTap | None:
    """Return the tap that describes the model's images; ValueError if taps disagree about what the caller left out."""
    if not taps:
        return None
    known, *others = (
        (t.in_chans, *(() if normalized else (t.mean, t.std, t.channel_order)), f"(layer {t.layer!r})") for t in taps
    )
    for other in others:
        if other[:-1] != known[:-1]:
            raise ValueError(
                "the taps of the model disagree about the channels, mean, std and order of its images: "
                f"{known} and {other}. Give mean and std, or put a restorer before each part"
            )
    return taps[0]


def _can_look(images: Tensor) -> bool:
    """Return whether values can be read: neither in graphs nor of empty tensors."""
    in_graph = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return not (in_graph or not has_numbers(images) or images.numel() == 0)


def _range(images: Tensor) -> tuple[float, float]:
    """Return the smallest and the largest value, or NaN if there is one."""
    low, high = torch.aminmax(images.detach())
    return float(low), float(high)
