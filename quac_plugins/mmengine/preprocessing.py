"""What a data preprocessor does to images: undone before the quality function, its padding left out."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from quac_plugins.core.quality.padding import note_sizes


def normalization_of(preprocessor: nn.Module) -> dict[str, Any]:
    """mean, std and channel_order of the images it gives out, in the words of :class:`quac_plugins.QuACConfig`."""
    mean, std = getattr(preprocessor, "mean", None), getattr(preprocessor, "std", None)
    if isinstance(mean, Tensor) and isinstance(std, Tensor) and getattr(preprocessor, "_enable_normalize", True):
        means, stds = mean.flatten().tolist(), std.flatten().tolist()
    else:  # pixels to 255, as they were read
        means, stds = [0.0], [1.0]
    # images are read as BGR, and turned round where the preprocessor says so
    turned = getattr(preprocessor, "to_rgb", getattr(preprocessor, "_channel_conversion", False))
    values = {"mean": tuple(v / 255 for v in means), "std": tuple(v / 255 for v in stds)}
    return {**values, "channel_order": "rgb" if turned else "bgr"}


def listen_to(preprocessor: nn.Module) -> None:
    """Let a preprocessor note how large the images in its batches are without padding."""
    if note_batch not in preprocessor._forward_hooks.values():
        preprocessor.register_forward_hook(note_batch)


def note_batch(preprocessor: nn.Module, args: tuple, output: Any) -> None:
    """Hook: sizes are those of the data samples, which follow resizing in the preprocessor, else those of the input."""
    images = output.get("inputs") if isinstance(output, dict) else None
    if not isinstance(images, Tensor) or images.ndim != 4 or not args or not isinstance(args[0], dict):
        return
    sizes = _sizes(output.get("data_samples"), args[0].get("inputs"))
    height, width = images.shape[-2:]
    if len(sizes) == len(images) and all(0 < h <= height and 0 < w <= width for h, w in sizes):
        note_sizes(images, sizes)


def _sizes(samples: Any, raw: Any) -> list[tuple[int, int]]:
    shapes = [getattr(one, "img_shape", None) for one in samples] if isinstance(samples, (list, tuple)) else [None]
    known = [(int(shape[0]), int(shape[1])) for shape in shapes if shape is not None]
    if len(known) == len(shapes):
        return known
    return [tuple(one.shape[-2:]) for one in raw] if raw is not None else []
