"""Any no-reference metric of pyiqa (IQA-PyTorch) as a quality function of width 1: ``pyiqa:NAME``."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from quac_plugins.core.naming import unknown
from quac_plugins.core.private import has_numbers
from quac_plugins.core.quality.registry import QualityFunction, quality_family, shared

# Listed by pyiqa as no-reference, but of folders of images, or of images with captions.
_NOT_OF_AN_IMAGE = ("clipscore", "fid", "fid_dinov2", "inception_score", "sfid")


def _configs() -> dict[str, Any]:
    try:
        import pyiqa.default_model_configs  # absolute: the package, not this file
    except ImportError as error:
        raise ImportError(f'quality "pyiqa:…" needs pyiqa: pip install "quac-plugins[pyiqa]" ({error})') from error
    return pyiqa.default_model_configs.DEFAULT_CONFIGS


class PyIQA:
    """The quality function: images (B, 3, H, W), RGB in [0, 1] → (B, 1), float32, finite.

    A plain object, so that the metric's network is not part of the network that uses it. Copies share it, pickling
    keeps the name. Images are clamped to [0, 1] and measured one at a time: several metrics accept no more, and of some
    the value would depend on the batch. NaN (some metrics have no value on flat images) becomes 0, ±inf the largest
    float32. pyiqa computes metrics without gradient.

    Args:
        name: the metric's name in pyiqa.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._metrics: dict[torch.device, Any] = {}

    def load(self, device: torch.device) -> Any:
        """Make the metric on a device, which may download its weights.

        Raises:
            RuntimeError: the weights are not on this machine and could not be downloaded.
        """
        import pyiqa

        try:
            metric = pyiqa.create_metric(self.name, device=device)
        except OSError as error:
            folder = os.path.join(torch.hub.get_dir(), "pyiqa")
            raise RuntimeError(
                f"the weights of the pyiqa metric {self.name!r} could not be loaded or downloaded: {error}. Download "
                "them from https://huggingface.co/chaofengc/IQA-PyTorch-Weights on a machine that can, put them into "
                f"{folder} (the folder pyiqa reads), and try again; or use a quality function without weights, such as "
                '"brisque"'
            ) from error
        metric.check_input_range = False  # they are clamped; the check would wait for the device
        return metric

    def __call__(self, images: Tensor) -> Tensor:
        """Compute (B, 1) of images (B, 3, H, W) in [0, 1].

        Raises:
            TypeError: the images are not of a floating dtype.
            ValueError: the images are not (B, 3, H, W), or the metric gives more than one number an image.
            RuntimeError: the metric's weights are not on this machine and could not be downloaded.
        """
        if not images.is_floating_point():
            raise TypeError(f"pyiqa expects floating-point images in [0, 1], got {images.dtype}; divide by 255")
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"pyiqa expects images (B, 3, H, W), got {tuple(images.shape)}")
        if not has_numbers(images) or images.shape[0] == 0:
            return images.new_empty((images.shape[0], 1), dtype=torch.float32)  # only the shape is asked for
        if images.device not in self._metrics:
            self._metrics[images.device] = self.load(images.device)
        metric = self._metrics[images.device]
        images = images.float().nan_to_num(0.0).clamp(0.0, 1.0)
        with torch.autocast(images.device.type, enabled=False):
            values = [metric(image).float().reshape(-1) for image in images.split(1)]
        if values[0].numel() != 1:
            raise ValueError(f"the pyiqa metric {self.name!r} gives {values[0].numel()} numbers an image, expected 1")
        return torch.stack(values).to(images.device).nan_to_num(0.0)

    def __deepcopy__(self, memo: dict[int, Any]) -> PyIQA:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return shared, (PyIQA, self.name)

    def __repr__(self) -> str:
        return f"PyIQA({self.name!r})"


@quality_family("pyiqa")
def pyiqa_metric(name: str) -> QualityFunction:
    """Build ``pyiqa:NAME``, width 1, for a no-reference metric NAME of an image.

    The metric is made, and its weights downloaded if it has any, at the first call.

    Raises:
        ImportError: pyiqa is not installed.
        ValueError: there is no name, pyiqa does not know it, or it is not a no-reference metric of an image.

    Example:
        >>> pyiqa_metric("entropy").channels
        1
    """
    configs = _configs()
    known = sorted(k for k, v in configs.items() if v.get("metric_mode") == "NR" and k not in _NOT_OF_AN_IMAGE)
    if not name:
        raise ValueError(
            'quality "pyiqa" needs the name of a metric, such as "pyiqa:musiq". Known: ' + ", ".join(known)
        )
    if name not in configs:
        raise unknown("pyiqa has no metric", name, known)
    if name not in known:
        why = "needs more than an image" if name in _NOT_OF_AN_IMAGE else "compares with a reference image"
        raise ValueError(f"the pyiqa metric {name!r} {why}. No-reference metrics: {', '.join(known)}")
    return QualityFunction(f"pyiqa:{name}", 1, shared(PyIQA, name))
