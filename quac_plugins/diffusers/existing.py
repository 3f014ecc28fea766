"""QuAC inside existing pipelines: q is computed from the argument ``image`` of a call."""

from __future__ import annotations

import functools
import inspect
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor, nn

from quac_plugins.core.deprecated import renamed
from quac_plugins.core.inject import injection_of
from quac_plugins.core.inject.surgery import unwrap
from quac_plugins.core.quality.given import contexts_of, use_q
from quac_plugins.core.quality.tap import QualityTap
from quac_plugins.diffusers.models import add_to_model, is_network, quac_class, with_argument
from quac_plugins.images import pictures_of

_NETWORKS = ("unet", "transformer")
# Guidance repeats the whole batch. These repeat it whole for several images of a prompt, too, so that q may be repeated
# as often as the batch is; in others the rows of several images lie otherwise, and one image a call is always right.
_ORDER = "tile"
_IN_ORDER = frozenset(
    {
        "LDMSuperResolutionPipeline",
        "LatentConsistencyModelImg2ImgPipeline",
        "StableDiffusion3Img2ImgPipeline",
        "StableDiffusion3InpaintPipeline",
        "StableDiffusionDepth2ImgPipeline",
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
        "StableDiffusionInstructPix2PixPipeline",
        "StableDiffusionLatentUpscalePipeline",
        "StableDiffusionUpscalePipeline",
        "StableDiffusionXLImg2ImgPipeline",
        "StableDiffusionXLInpaintPipeline",
        "StableDiffusionXLInstructPix2PixPipeline",
    }
)


def add_quac(pipe: Any, quac: Any = None, adapter: Any = None, revision: str | None = None, example: Any = None) -> Any:
    """Put quality-adaptive activations into the network of a pipeline that takes an image, in place.

    For super-resolution, up-scaling, image-to-image, InstructPix2Pix, Marigold and the like. The pipeline is called and
    saved as before, and computes what it did until it is trained. ``add_quac(from_pretrained(…))`` of a pipeline that
    was saved with QuAC inside takes it as it is; so does ``add_quac(Other.from_pipe(pipe, unet=pipe.unet))``.

    Args:
        pipe: a pipeline with a ``unet`` or a ``transformer``, whose ``__call__`` takes an ``image``.
        quac: a :class:`quac_plugins.QuACConfig` or a dict of its options. None: Q-ACON driven by BRISQUE, in place of
            the activations that follow a convolution, or of all activations of a transformer.
        adapter: an adapter of ``quac_plugins.save_adapter(pipe.unet, …)``, instead of ``quac``: a folder, or
            ``"org/name"`` on the Hub.
        revision: the revision of the adapter on the Hub.
        example: the network's arguments, for other transformers than Stable Diffusion 3's and Flux's: a dict of its
            arguments, first the latents (B, C, H, W) or tokens (B, N, C); see :func:`quac_plugins.inject`.

    Returns:
        The pipeline. Its ``__call__`` takes one more argument, ``q`` (B, Q), one row an image, which replaces the
        measured features: latents, for example, cannot be measured. Several images in one call are an error unless the
        layout of the pipeline's batches is known.

    Raises:
        TypeError: ``pipe`` is no pipeline that takes an image, or its network is compiled or wrapped.
        ValueError: an option is unknown, or a site does not exist; both ``quac`` and ``adapter`` are given, or one of
            them for a network that holds QuAC already. The pipeline is as before.
    """
    if not isinstance(pipe, DiffusionPipeline):
        raise TypeError(f"add_quac needs a pipeline of diffusers, got {type(pipe).__name__}")
    host: Any = getattr(type(pipe), "quac_host", type(pipe))
    name = next((name for name in _NETWORKS if isinstance(getattr(pipe, name, None), nn.Module)), None)
    if name is None or "image" not in inspect.signature(host.__call__).parameters:
        lacks = "a unet or a transformer" if name is None else "an argument 'image' whose quality could be measured"
        raise TypeError(f"{host.__name__} has not {lacks}")
    if quac is not None and adapter is not None:
        raise ValueError("give quac or adapter, not both: an adapter brings its options")
    network: Any = getattr(pipe, name)
    if unwrap(network) is not network and injection_of(network) is None:
        raise TypeError(f"the {name} is inside a {type(network).__name__}: add QuAC first, then compile or wrap it")
    if injection_of(network) is None and adapter is not None:
        cls: Any = type(network)
        quac_class(cls).from_adapter(network, adapter, revision=revision, example=example)
    elif injection_of(network) is None:
        add_to_model(network, quac, example)
    elif quac is not None or adapter is not None:
        raise ValueError(f"the {name} holds QuAC already; call add_quac(pipe) alone, or quac_plugins.remove first")
    _expand(unwrap(network))
    pipe.__class__ = pipeline_class(host)
    return pipe


def _expand(network: Any) -> None:
    """Expand q in the order in which guidance repeats the batch, unless the config names another order."""
    record = injection_of(network)
    assert record is not None
    if record.config is None or record.config.expand_q != "error":
        return
    for tap in (module for module in network.modules() if isinstance(module, QualityTap)):
        if tap.given == "error":
            tap.given = _ORDER
    record.config = replace(record.config, expand_q=_ORDER)
    network.register_to_config(quac=record.options_to_save())


def _network(pipe: Any) -> Any:
    return next(getattr(pipe, name) for name in _NETWORKS if isinstance(getattr(pipe, name, None), nn.Module))


def _quality_function(network: Any) -> Any:
    record = injection_of(network)
    prior = record.prior if record is not None else None
    return record.quality or (prior.quality if prior is not None else None) if record is not None else None


def quality_of_image(pipe: Any, image: Any) -> Tensor:
    """Compute q (B, Q) of a pipeline's argument ``image``, on the pipeline's device.

    Raises:
        ValueError: the argument cannot be measured, as latents cannot.
    """
    function = _quality_function(_network(pipe))
    try:
        pictures = pictures_of(_in_unit_range(pipe, image), upright=False)  # the pipeline does not turn it either
    except (TypeError, ValueError) as error:
        raise ValueError(f"{error}. Its quality cannot be measured: give q=(B, Q)") from error
    with torch.no_grad():
        return torch.cat([function(picture.pixels[None].to(pipe._execution_device)) for picture in pictures])


def _in_unit_range(pipe: Any, image: Any) -> Any:
    """Convert tensors and arrays to [0, 1], read by the pipeline's own rules."""
    parts = image if isinstance(image, (list, tuple)) else [image]
    processor = getattr(pipe, "image_processor", None)
    if not all(isinstance(part, (Tensor, np.ndarray)) and part.dtype not in (torch.uint8, np.uint8) for part in parts):
        return image
    if isinstance(processor, VaeImageProcessor):  # takes what has a negative number to be in [−1, 1]
        signed = any(part.size and bool((part < 0).any()) for part in map(np.asarray, map(_numbers, parts)))
    else:  # without a processor of its own a pipeline takes tensors to be in [−1, 1]
        signed = processor is None and all(isinstance(part, Tensor) for part in parts)
    return [part / 2 + 0.5 for part in parts] if signed else image


def _numbers(part: Any) -> Any:
    return part.detach().float().cpu().numpy() if isinstance(part, Tensor) else part


def _count(image: Any) -> int:
    """Count the images."""
    if isinstance(image, (list, tuple)):
        return sum(_count(item) for item in image)
    return len(image) if isinstance(image, (Tensor, np.ndarray)) and image.ndim == 4 else 1


def checked_q(q: Any, count: int, channels: int) -> Tensor:
    """Return a user's q; ValueError unless it has a row of finite numbers for each image."""
    wanted = (count, channels)
    if not isinstance(q, Tensor) or not q.is_floating_point() or tuple(q.shape) != wanted:
        got = tuple(q.shape) if isinstance(q, Tensor) else type(q).__name__
        raise ValueError(f"q must be a floating point tensor {wanted}, a row for each image, got {got}")
    if not bool(torch.isfinite(q).all()):
        raise ValueError("q holds NaN or infinity")
    return q


@functools.cache
def pipeline_class(host: Any) -> type[Any]:
    """Return the class of pipelines like ``host`` whose networks get the quality of the image.

    The class bears the host's name, so that the host's class loads the saved pipelines.
    """
    signature = inspect.signature(host.__call__)

    @renamed(quality="q")
    @functools.wraps(host.__call__)
    def __call__(self: Any, *args: Any, q: Tensor | None = None, **kwargs: Any) -> Any:
        network = _network(self)
        if not contexts_of(unwrap(network)):
            return host.__call__(self, *args, **kwargs)
        image = signature.bind_partial(self, *args, **kwargs).arguments.get("image")
        if image is None:
            raise ValueError("image is missing: the quality is that of the degraded image")
        count = _count(image)
        if count > 1 and host.__name__ not in _IN_ORDER:
            raise ValueError(
                f"{host.__name__} lays out the rows of several images in an order of its own, so their quality "
                "features cannot be told apart; give one image a call"
            )
        if q is None:
            q = quality_of_image(self, image)
        else:
            q = checked_q(q, count, _quality_function(network).channels).to(self._execution_device)
        with use_q(network, q):
            return host.__call__(self, *args, **kwargs)

    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        note_classes(self)
        return host.save_pretrained(self, *args, **kwargs)

    def _get_signature_types(cls: Any) -> Any:
        """Let ``from_pipe`` accept a network with QuAC inside in the place of its host."""
        return {
            part: (*types, *(quac_class(t) for t in types if part in _NETWORKS and is_network(t)))
            for part, types in host._get_signature_types().items()
        }

    def __reduce__(self: Any) -> Any:
        return _rebuilt, (host,), self.__dict__

    save_pretrained.__doc__ = host.save_pretrained.__doc__
    added = inspect.Parameter("q", inspect.Parameter.KEYWORD_ONLY, default=None)
    __call__.__signature__ = with_argument(host.__call__, added)  # type: ignore[attr-defined]
    body = {
        "__call__": __call__,
        "save_pretrained": save_pretrained,
        "__reduce__": __reduce__,
        "_get_signature_types": classmethod(_get_signature_types),
        "quac_host": host,
    }
    return type(host.__name__, (host,), {**body, "__module__": host.__module__, "__doc__": host.__doc__})


def _rebuilt(host: Any) -> Any:
    """Return an empty pipeline, for pickle to fill."""
    cls: Any = pipeline_class(host)
    return cls.__new__(cls)


def note_classes(pipe: Any) -> None:
    """Let ``model_index.json`` name the current classes of a pipeline's networks, with QuAC or without."""
    pipe.register_modules(**{name: getattr(pipe, name) for name in _NETWORKS if getattr(pipe, name, None) is not None})
