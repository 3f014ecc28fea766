"""The work of a data preprocessor: its normalization is undone for the quality function, its padding left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from quac_plugins.core.quality.padding import note_sizes

_TURNED_TO_BGR = "_quac_turned_to_bgr"


def prepares_images(preprocessor: Any) -> bool:
    """Return whether a preprocessor normalizes images; MMEngine's plainest one only moves data."""
    return isinstance(preprocessor, nn.Module) and hasattr(preprocessor, "_enable_normalize")


def note_config(built: Any, cfg: Any) -> None:
    """Remember whether a preprocessor turns the channels to BGR or to RGB, which it does not keep itself."""
    if prepares_images(built) and isinstance(cfg, Mapping) and cfg.get("rgb_to_bgr"):
        setattr(built, _TURNED_TO_BGR, True)


def normalization_of(preprocessor: nn.Module) -> dict[str, Any]:
    """Return mean, std and channel_order of a preprocessor's images, as options of :class:`quac_plugins.QuACConfig`."""
    mean, std = getattr(preprocessor, "mean", None), getattr(preprocessor, "std", None)
    if isinstance(mean, Tensor) and isinstance(std, Tensor) and preprocessor._enable_normalize:
        means, stds = mean.flatten().tolist(), std.flatten().tolist()
    else:  # pixels to 255, as they were read
        means, stds = [0.0], [1.0]
    # images are read as BGR; the names are mmpretrain's, mmengine's and mmseg's
    turned = any(getattr(preprocessor, name, False) for name in ("to_rgb", "_channel_conversion", "channel_conversion"))
    order = "rgb" if turned and not getattr(preprocessor, _TURNED_TO_BGR, False) else "bgr"
    return {"mean": tuple(v / 255 for v in means), "std": tuple(v / 255 for v in stds), "channel_order": order}


def listen_to(preprocessor: nn.Module) -> None:
    """Let a preprocessor note the sizes of the images in its batches without padding."""
    if note_batch not in preprocessor._forward_hooks.values():
        preprocessor.register_forward_hook(note_batch, with_kwargs=True)


def note_batch(preprocessor: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    """Note the sizes of the incoming images, or of the data samples if the preprocessor resizes; a hook."""
    data = args[0] if args else kwargs.get("data")
    images = output.get("inputs") if isinstance(output, dict) else None
    if not isinstance(images, Tensor) or images.ndim != 4 or not isinstance(data, dict):
        return
    raw = [(int(image.shape[-2]), int(image.shape[-1])) for image in data.get("inputs", ())]
    samples = output.get("data_samples")
    told = [getattr(image, "img_shape", None) for image in samples] if isinstance(samples, (list, tuple)) else []
    known = [(int(shape[0]), int(shape[1])) for shape in told if shape is not None]
    divisor = max(int(getattr(preprocessor, "pad_size_divisor", 1) or 1), 1)
    padded = tuple(-(-max(side) // divisor) * divisor for side in zip(*raw, strict=True))
    for sizes in (raw, known) if padded == tuple(images.shape[-2:]) else (known, raw):
        if len(sizes) == len(images) and all(h <= images.shape[-2] and w <= images.shape[-1] for h, w in sizes):
            note_sizes(images, sizes)
            return
