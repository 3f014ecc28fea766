"""The restoration pipeline: degraded images → clean ones, in one step or a few, deterministic.

The path is the straight line from the clean image x₀ to the degraded one y: x_t = (1 − t) x₀ + t y, so that its
velocity is the degradation itself, v = y − x₀. The network sees x_t, t and the quality q of y, and predicts v; in
training its error counts t times, as that of the image it leads to. (With what is left, x_t − x₀ = t v, for its output
a small error that is there at every t would come in again at every step: ten steps would make three times as much of
it, and good images would not be left alone.) v is what diffusers' ``FlowMatchEulerDiscreteScheduler`` integrates, with
y in the place of the noise, from t = 1 to 0: one step is x₀ = y − v. It is the bridge of InDI (Delbracio & Milanfar,
2023), and starts at the degraded image as DiffUIR, ResShift and SinSR do, which is why few steps suffice. The network
is not shown y itself beside x_t: from both it could read v off without looking at the image, and more steps would do
what one does.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from numbers import Real
from pathlib import Path
from typing import Any, Union

import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ImagePipelineOutput, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from quac_plugins.core.deprecated import renamed
from quac_plugins.core.inject import injection_of
from quac_plugins.core.inject.surgery import unwrap
from quac_plugins.core.options import one_of, whole_number
from quac_plugins.diffusers.callbacks import changed_by, tensor_inputs
from quac_plugins.diffusers.existing import checked_q, note_classes
from quac_plugins.diffusers.models import QuACUNet2DModel
from quac_plugins.diffusers.schedule import check_scheduler, schedule_of
from quac_plugins.diffusers.tiles import tiled
from quac_plugins.hub.networks import verified_pipeline
from quac_plugins.hub.published import find_published
from quac_plugins.images import OUTPUTS, Picture, give_back, pictures_of
from quac_plugins.registry import is_published_name, published

__all__ = ["QuACRestorationPipeline"]


class QuACRestorationPipeline(DiffusionPipeline):
    """Restores degraded images with a :class:`QuACUNet2DModel`.

    Args:
        unet: a network from x_t (B, 3, H, W) in [−1, 1] to v = y − x₀, the degradation. A plain ``UNet2DModel`` does
            not read the quality.
        scheduler: ``FlowMatchEulerDiscreteScheduler``.
        start_noise: standard deviation, in the scale [−1, 1], of the noise that the training added to the degraded
            image at the start. 0: the result is a function of the image alone.

    Raises:
        TypeError: the network is no ``UNet2DModel``, or the scheduler no ``FlowMatchEulerDiscreteScheduler``.
        ValueError: the network does not map three channels to three, or the scheduler does not lead from the degraded
            image to the clean one.

    Example:
        >>> import numpy as np
        >>> from quac_plugins.diffusers import QuACUNet2DModel
        >>> unet = QuACUNet2DModel(block_out_channels=(32, 32), down_block_types=("DownBlock2D",) * 2,
        ...                        up_block_types=("UpBlock2D",) * 2, layers_per_block=1)
        >>> pipe = QuACRestorationPipeline(unet, FlowMatchEulerDiscreteScheduler())
        >>> pipe.set_progress_bar_config(disable=True)
        >>> pipe(np.zeros((30, 50, 3)), num_inference_steps=2).images[0].size
        (50, 30)
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ("latents", "q")
    _interrupt: bool
    _num_timesteps: int

    def __init__(self, unet: Any, scheduler: FlowMatchEulerDiscreteScheduler, start_noise: float = 0.0):
        super().__init__()
        _check_network(unet)
        check_scheduler(scheduler)
        if isinstance(start_noise, bool) or not isinstance(start_noise, Real) or not 0 <= start_noise < math.inf:
            raise ValueError(f"start_noise must be a number ≥ 0, got {start_noise!r}")
        self._interrupt, self._num_timesteps = False, 0
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(start_noise=float(start_noise))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Load a pipeline: a folder, a published name (``quac list --what pipelines``), or ``"org/name"`` on the Hub.

        Args:
            pretrained_model_name_or_path: a published name ``NAME.TAG`` is embedded in this package, or on the Hub, and
                its weights are compared with the hash in the registry; the environment variable ``QUAC_HUB`` names an
                organization whose ``QUAC_HUB/NAME.TAG`` stands in for it.
            **kwargs: of ``DiffusionPipeline.from_pretrained``.

        Raises:
            FileNotFoundError: nothing is published under that name.
            PermissionError, ConnectionError: the Hub refused access, or cannot be reached.
            ValueError: a file differs from the published one, is no safetensors, or belongs to another pipeline.
            OSError: diffusers finds no pipeline there.

        Example:
            >>> pipe = QuACRestorationPipeline.from_pretrained("restoration_qacon.bsds")
            >>> pipe.unet.config.quac["activation"]
            'qacon'
        """
        folder, kwargs = verified_pipeline(_located(pretrained_model_name_or_path), _PARTS, kwargs)
        return super().from_pretrained(folder, **kwargs)

    @property
    def interrupt(self) -> bool:
        """Return whether a callback has asked, by ``pipe._interrupt = True``, to end after its step."""
        return self._interrupt

    @property
    def num_timesteps(self) -> int:
        """Return the number of steps of the latest call."""
        return self._num_timesteps

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Save the pipeline as ``DiffusionPipeline.save_pretrained`` does, with the networks' current classes."""
        note_classes(self)
        return super().save_pretrained(*args, **kwargs)

    def quality_of(self, images: Tensor) -> Tensor | None:
        """Compute q (B, Q) of images (B, 3, H, W), RGB in [0, 1]; None if the network reads no quality."""
        record = injection_of(self.unet)
        if record is None or record.quality is None:
            return None
        with torch.no_grad():
            return record.quality(images)

    @renamed(quality="q")
    @torch.no_grad()
    def __call__(
        self,
        image: Any,
        num_inference_steps: int = 1,
        q: Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        tile_size: int = 512,
        tile_overlap: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, int, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] | list[str] = ("latents",),
    ) -> Any:
        """Restore images.

        Args:
            image: degraded images: a PIL image, an array (B, H, W, C), a tensor (B, C, H, W), or a list, of any sizes;
                floats in [0, 1].
            num_inference_steps: the number of steps, from 1 on.
            q: quality features (B, Q). None: they are computed once, from the whole degraded image, before padding and
                tiles.
            generator: a generator, or one an image, for the noise at the start, if ``start_noise`` is not 0.
            tile_size: the largest side in pixels; a larger image goes through the network in tiles. Norms see one tile
                each, so small tiles restore a global degradation unevenly: of a photograph in haze, tiles of 256 left
                a level that was on average 7 of 255 away from the level without tiles.
            tile_overlap: the overlap of neighbouring tiles in pixels, over which they pass smoothly into each other.
                None: 64, a quarter of a tile at most. An image that needs tiles is restored alone.
            output_type: ``"pil"``, ``"np"`` (B, H, W, 3), ``"pt"`` (B, 3, H, W), or ``"latent"``, the result of the
                last step, (B, 3, H, W) around [−1, 1], not clamped.
            return_dict: return an ``ImagePipelineOutput``, or else a tuple with the images.
            callback_on_step_end: a function ``f(pipe, step, timestep, tensors)``, called after each step, that returns
                the tensors that it changed. Images of one size are restored together, one size after another. A
                callback that sets ``pipe._interrupt = True`` ends this call, and calls of other threads: each image is
                returned after its latest step, or unchanged.
            callback_on_step_end_tensor_inputs: the tensors that the callback gets: ``"latents"``, the images
                (B, 3, H, W) around [−1, 1], and ``"q"``, their quality features. A ``PipelineCallback`` names its own.

        Returns:
            The restored images in the given order and sizes, with the transparency of PIL images, turned upright as
            their EXIF says.

        Raises:
            TypeError: an argument has a wrong type; see :func:`pictures_of` for images.
            ValueError: an argument is out of range; see :func:`pictures_of` for images.
            RuntimeError: an image became NaN or infinity.
        """
        num_inference_steps, tile_size, tile_overlap = map(_plain, (num_inference_steps, tile_size, tile_overlap))
        whole_number("num_inference_steps", num_inference_steps)
        one_of("output_type", output_type, list(OUTPUTS))
        network: Any = unwrap(self.unet)
        multiple = 2 ** (len(network.config.block_out_channels) - 1)
        whole_number("tile_size", tile_size, multiple)
        overlap = min(64, tile_size // 4) if tile_overlap is None else tile_overlap
        whole_number("tile_overlap", overlap, 0, tile_size // 2)
        names = tensor_inputs(callback_on_step_end, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        pictures = pictures_of(image)
        q_given = self._checked(q, len(pictures))
        if isinstance(generator, list) and len(generator) != len(pictures):
            raise ValueError(f"{len(generator)} generators were given for {len(pictures)} images")

        groups: dict[Any, list[int]] = {}
        for index, picture in enumerate(pictures):
            shape = tuple(picture.pixels.shape)
            groups.setdefault((shape, index) if max(shape) > tile_size else shape, []).append(index)
        self._interrupt, self._num_timesteps = False, num_inference_steps
        restored: dict[int, Tensor] = {}
        latent = output_type == "latent"
        with self.progress_bar(total=num_inference_steps * len(groups)) as bar:
            for indices in groups.values():
                images = torch.stack([pictures[i].pixels for i in indices]).to(self._execution_device)
                if self.interrupt:
                    restored.update(zip(indices, (2 * images - 1 if latent else images).cpu(), strict=True))
                    continue
                q = q_given[indices].to(images.device) if q_given is not None else self.quality_of(images)
                noise = [generator[i] for i in indices] if isinstance(generator, list) else generator
                x = self._start(images, noise)
                scheduler = schedule_of(self.scheduler, num_inference_steps, images.device)
                for step, t in enumerate(scheduler.timesteps):
                    if self.interrupt:
                        break
                    v = self._velocity(x, t, q, tile_size // multiple * multiple, overlap, multiple)
                    x = scheduler.step(v, t, x, return_dict=False)[0]
                    tensors = changed_by(callback_on_step_end, self, step, t, {"latents": x, "q": q}, names)
                    x, q = tensors["latents"], tensors["q"]
                    bar.update()
                for index, finite in zip(indices, torch.isfinite(x).flatten(1).all(1).tolist(), strict=True):
                    if not finite:
                        raise _not_finite(index if len(pictures) > 1 else None, network.dtype)
                restored.update(zip(indices, (x if latent else (x / 2 + 0.5).clamp(0, 1)).cpu(), strict=True))
        self.maybe_free_model_hooks()
        results = [Picture(restored[i], picture.alpha) for i, picture in enumerate(pictures)]
        images = give_back(results, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _checked(self, q: Tensor | None, count: int) -> Tensor | None:
        if q is None:
            return None
        record = injection_of(self.unet)
        if record is None or record.quality is None:
            raise ValueError(f"{type(self.unet).__name__} reads no quality features; leave q= out")
        return checked_q(q, count, record.quality.channels)

    def _start(self, images: Tensor, generator: Any) -> Tensor:
        x = 2 * images - 1
        if self.config.start_noise:
            noise = randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
            x = x + self.config.start_noise * noise
        return x

    def _velocity(self, x: Tensor, t: Tensor, q: Tensor | None, tile: int, overlap: int, multiple: int) -> Tensor:
        """Compute the velocity v at x (B, 3, H, W), at least float32."""
        extra = {"q": q} if q is not None else {}
        network: Any = unwrap(self.unet)

        def function(part: Tensor) -> Tensor:
            return self.unet(part.to(network.dtype), t, return_dict=False, **extra)[0].float()

        return tiled(function, x, tile, min(overlap, tile // 2), multiple)


# By its annotations diffusers checks what it loads, and knows what another pipeline of this class may take over. Its
# older versions do not read those that are strings.
QuACRestorationPipeline.__init__.__annotations__.update(
    unet=Union[QuACUNet2DModel, UNet2DModel],  # noqa: UP007
    scheduler=FlowMatchEulerDiscreteScheduler,
    start_noise=float,
)


_PARTS = {
    "unet": {"quac_plugins.diffusers.models.QuACUNet2DModel", "diffusers.UNet2DModel"},
    "scheduler": {"diffusers.FlowMatchEulerDiscreteScheduler"},
}


def _check_network(unet: Any) -> None:
    """Raise a TypeError or ValueError unless the network takes images alone."""
    config = getattr(unwrap(unet), "config", None) if isinstance(unet, torch.nn.Module) else None
    channels = [getattr(config, name, None) for name in ("in_channels", "out_channels")]
    if None in channels or not hasattr(config, "block_out_channels"):
        raise TypeError(f"unet must be a UNet2DModel, with QuAC inside or without, got {type(unet).__name__}")
    if channels != [3, 3]:
        raise ValueError(f"unet must go from 3 channels to 3 (RGB), got in_channels={channels[0]} and {channels[1]}")
    for name in ("class_embed_type", "num_class_embeds", "cross_attention_dim"):
        if getattr(config, name, None):
            raise ValueError(f"unet must take images alone: its config has {name}={getattr(config, name)!r}")


def _plain(value: Any) -> Any:
    """Convert a whole number of NumPy to Python's int."""
    return int(value) if isinstance(value, np.integer) else value


def _not_finite(index: int | None, dtype: torch.dtype) -> RuntimeError:
    where = "the image" if index is None else f"image {index}"
    hint = "" if dtype == torch.float32 else f"; {dtype} may have too small a range for the network"
    return RuntimeError(f"{where} became NaN or infinity{hint}")


def _located(source: Any) -> Any:
    """Return the folder of a published name, and any other source unchanged."""
    if isinstance(source, os.PathLike):
        source = os.fspath(source)
    if not isinstance(source, str):
        raise TypeError(f"a pipeline is named by a string or a path, got {type(source).__name__}")
    if Path(source).is_dir() or (source.count("/") == 1 and source[0] not in "./~"):
        return source
    entry = find_published(source, door="diffusers") if is_published_name(source) else None
    if entry is None:
        known = ", ".join(published("diffusers")) or "none"
        raise FileNotFoundError(
            f"no pipeline at {source!r}: neither a folder, nor of the form 'org/name' of the Hub, nor published here "
            f"({known})"
        )
    return str(entry.folder())
