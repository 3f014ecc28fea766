"""Hosts without a batch of images as input, such as detectors: finding the part that takes a batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quac_plugins.core.host.facts import facts_of


class TakenApart(Exception):
    """A host takes its batch apart, image by image: no later tensor holds a batch of images."""


class _Found(BaseException):  # that no host catches
    def __init__(self, name: str, shape: tuple[int, ...]):
        super().__init__()
        self.name, self.shape = name, shape


def find_part(model: nn.Module, images: Tensor) -> tuple[str, tuple[int, ...]] | None:
    """Find the outermost module that a host calls with a batch of its images: name and shape of the batch, or None.

    The host runs up to that call, on images as detectors take them: a list of images, a list of dicts, or a tensor.

    Example:
        >>> import torchvision
        >>> detector = torchvision.models.detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None)
        >>> find_part(detector.eval(), torch.zeros(2, 3, 64, 64))
        ('backbone', (2, 3, 320, 320))
    """
    names = {id(module): name for name, module in model.named_modules()}

    def stop(module: nn.Module, args: tuple, kwargs: dict) -> None:
        x = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(x, Tensor) and x.ndim == 4 and x.shape[1] == images.shape[1] and x is not inputs:
            raise _Found(names[id(module)], tuple(x.shape))

    handles: list[Any] = []
    try:
        for module in model.modules():
            if module is not model and not isinstance(module, torch.jit.ScriptModule):  # which takes no such hooks
                handles.append(module.register_forward_pre_hook(stop, with_kwargs=True))
        for inputs in (list(images), [{"image": image} for image in images], images):
            try:
                with torch.no_grad():
                    model(inputs)
            except _Found as found:
                return found.name, found.shape
            except Exception:  # it takes its images in another way
                continue
    finally:
        for handle in handles:
            handle.remove()
    return None


def in_words(model: nn.Module, part: tuple[str, tuple[int, ...]] | None) -> str:
    """Return a sentence that names the part to inject instead of the host."""
    if part is None:
        return "Inject the part of it that is given the images as one tensor (B, C, H, W), as a backbone is"
    name, shape = part
    plain = all(word.isidentifier() for word in name.split("."))
    where = f"model.{name}" if plain else f"model.get_submodule({name!r})"
    known = facts_of(model).inner_normalization
    mean, std = ([round(float(v), 6) for v in values] for values in known or ((), ()))
    normalized = f"mean={mean}, std={std}" if known else "mean=…, std=… that normalize them"
    return (
        f"Inject the part that is given them as one batch, {where}: quac_plugins.inject({where}, config, "
        f"example=torch.empty(1, {', '.join(map(str, shape[1:]))})), with {normalized} in the config"
    )
