"""QuAC inside pipelines that exist: q comes from the ``image`` that a pipeline is called with."""

from __future__ import annotations

import functools
import inspect
from dataclasses import replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from quac_plugins.core.inject import injection_of
from quac_plugins.core.inject.surgery import unwrap
from quac_plugins.core.quality.context import contexts_of, quality_of
from quac_plugins.diffusers.images import pictures_of
from quac_plugins.diffusers.models import add_to_model, options_of, quac_class, with_argument

_NETWORKS = ("unet", "transformer")
# they put every image into the batch several times, the whole batch again and again
_ORDER = "tile"


def add_quac(pipe: Any, quac: Any = None, adapter: Any = None, example: Any = None) -> Any:
    """Put quality-adaptive activations into the network of a pipeline that takes an image, in place.

    For super-resolution, up-scaling, image-to-image, InstructPix2Pix, Marigold and the like. The pipeline is called and
    saved as before, and computes what it did until it is trained. ``add_quac(from_pretrained(…))`` of a pipeline that
    was saved with QuAC inside takes it as it is.

    Args:
        pipe: with a ``unet`` or a ``transformer``, and a ``__call__`` with an ``image``.
        quac: a :class:`quac_plugins.QuACConfig` or a dict of its options; by default Q-ACON after the activations that
            follow a convolution, driven by BRISQUE.
        adapter: what was saved with ``quac_plugins.save_adapter(pipe.unet, …)``, instead of ``quac``: a folder, or
            ``"org/name"`` on the Hub.
        example: what the network takes, for a transformer; see :func:`quac_plugins.inject`.

    Returns:
        The pipeline. Its ``__call__`` takes one more argument, ``quality`` (B, Q), in the place of that of ``image``:
        for latents, which cannot be measured.

    Raises:
        TypeError: it is no pipeline that takes an image.
        ValueError: an option is not known, or a site is not there.
    """
    if not isinstance(pipe, DiffusionPipeline):
        raise TypeError(f"add_quac needs a pipeline of diffusers, got {type(pipe).__name__}")
    host: Any = getattr(type(pipe), "quac_host", type(pipe))
    name = next((name for name in _NETWORKS if isinstance(getattr(pipe, name, None), nn.Module)), None)
    if name is None or "image" not in inspect.signature(host.__call__).parameters:
        lacks = "a unet or a transformer" if name is None else "an argument 'image' whose quality could be measured"
        raise TypeError(f"{host.__name__} has not {lacks}")
    network: Any = getattr(pipe, name)
    if injection_of(network) is None and adapter is not None:
        cls: Any = type(network)
        quac_class(cls).from_adapter(network, adapter, example=example)
    elif injection_of(network) is None:
        options = options_of(quac)
        if options.expand_q == "error":
            options = replace(options, expand_q=_ORDER)
        add_to_model(network, options, example)
    elif quac is not None or adapter is not None:
        raise ValueError(f"the {name} holds QuAC already; call add_quac(pipe) alone, or quac_plugins.remove first")
    pipe.register_modules(**{name: network})  # model_index.json names its class
    pipe.__class__ = pipeline_class(host)
    return pipe


def quality_of_image(network: Any, image: Any) -> Tensor | None:
    """q (B, Q) of what a pipeline is given as ``image``; None if the network reads none."""
    record = injection_of(network)
    if record is None or record.quality is None:
        return None
    if isinstance(image, Tensor) and image.is_floating_point() and bool((image < 0).any()):
        image = image / 2 + 0.5  # pipelines take tensors in [-1, 1] too
    try:
        pictures = pictures_of(image)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{error}. Its quality cannot be measured: give quality=(B, Q)") from error
    with torch.no_grad():
        return torch.cat([record.quality(picture.pixels[None]) for picture in pictures])


@functools.cache
def pipeline_class(host: Any) -> Any:
    """The class of pipelines like those of ``host`` whose networks are given the quality of the image.

    It bears the host's name, so that what it saves is loaded by the host's class.
    """
    signature = inspect.signature(host.__call__)

    @functools.wraps(host.__call__)
    def __call__(self: Any, *args: Any, quality: Tensor | None = None, **kwargs: Any) -> Any:
        network = next(getattr(self, name) for name in _NETWORKS if isinstance(getattr(self, name, None), nn.Module))
        if not contexts_of(unwrap(network)):
            return host.__call__(self, *args, **kwargs)
        if quality is None:
            image = signature.bind_partial(self, *args, **kwargs).arguments.get("image")
            if image is None:
                raise ValueError("image is missing: the quality is that of the degraded image; or give quality=(B, Q)")
            quality = quality_of_image(network, image)
        assert quality is not None
        if len(quality) > 1 and host.__name__.startswith("Marigold"):
            raise ValueError(
                f"{host.__name__} cuts its batch into pieces, whose images cannot be told; give one image at a time"
            )
        device = next(network.parameters()).device
        with quality_of(network, quality.to(device)):
            return host.__call__(self, *args, **kwargs)

    added = inspect.Parameter("quality", inspect.Parameter.KEYWORD_ONLY, default=None)
    __call__.__signature__ = with_argument(host.__call__, added)  # type: ignore[attr-defined]
    body = {"__call__": __call__, "quac_host": host, "__module__": host.__module__, "__doc__": host.__doc__}
    return type(host.__name__, (host,), body)
