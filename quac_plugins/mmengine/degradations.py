"""Degradations in MMEngine's data pipelines: a transform, a dataset of every condition, and the metric over them."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from mmengine.evaluator import BaseMetric
from mmengine.registry import DATASETS, METRICS, TRANSFORMS
from torch.utils.data import Dataset

from quac_plugins.core.colours import CHANNEL_ORDERS, in_order
from quac_plugins.core.options import one_of
from quac_plugins.degradations import check_severity, corrupt, corruption_names, image_seed

CLEAN = ("clean", 0)


@TRANSFORMS.register_module(force=True)
class CorruptImage:
    """Degrade ``results["img"]`` (H, W, 3), uint8, by a corruption of ImageNet-C (Hendrycks and Dietterich, ICLR 2019).

    Required keys: ``img``; without arguments also ``corruption`` and ``severity``, which :class:`CorruptedDataset`
    gives. Modified: ``img``. Added: ``corruption``, ``severity``.

    Args:
        corruptions: names or sets of :func:`quac_plugins.degradations.corruption_names`; each image draws one.
        severities: a severity from 1 to 5, or several; each image draws one.
        prob: the share of images that are degraded.
        channel_order: the order of the image, ``"bgr"`` (MMCV's) or ``"rgb"``.
        seed: an integer makes the draws functions of the image's name alone. None: numpy's generator draws.

    Raises:
        ValueError: a name or a severity is unknown; the image is not uint8 (H, W, 3).
    """

    def __init__(
        self,
        corruptions: str | Sequence[str] | None = None,
        severities: int | Sequence[int] = (1, 2, 3, 4, 5),
        prob: float = 1.0,
        channel_order: str = "bgr",
        seed: int | None = None,
    ):
        self.names = corruption_names(corruptions) if corruptions is not None else []
        levels = [severities] if isinstance(severities, int) else list(severities)
        self.severities = [check_severity(level) for level in levels]
        if isinstance(prob, bool) or not isinstance(prob, (int, float)) or not 0 <= prob <= 1:
            raise ValueError(f"prob must lie between 0 and 1, got {prob!r}")
        one_of("channel_order", channel_order, CHANNEL_ORDERS)
        self.prob, self.channel_order, self.seed = prob, channel_order, seed

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        """Degrade the image of ``results``, and return ``results``."""
        image = results["img"]
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            got = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
            raise ValueError(f"CorruptImage takes uint8 images (H, W, 3), got {got}; put it before normalization")
        key = str(results.get("img_path", results.get("sample_idx", "")))
        name, severity, seed = self._draw(results, key)
        results["corruption"], results["severity"] = name, severity
        if severity:
            corrupted = corrupt(np.ascontiguousarray(in_order(image, self.channel_order, -1)), name, severity, seed)
            results["img"] = np.ascontiguousarray(in_order(corrupted, self.channel_order, -1))
        return results

    def _draw(self, results: dict[str, Any], key: str) -> tuple[str, int, int]:
        if not self.names:
            if "corruption" not in results:
                raise ValueError("CorruptImage without corruptions needs a CorruptedDataset, which gives them")
            name, severity = results["corruption"], results["severity"]
            return name, severity, image_seed(self.seed or 0, name, severity, key)
        rng = np.random if self.seed is None else np.random.default_rng([self.seed, *key.encode()])
        if rng.random() >= self.prob:
            return (*CLEAN, 0)
        name, severity = str(rng.choice(self.names)), int(rng.choice(self.severities))
        return name, severity, image_seed(int(rng.random() * 2**31), name, severity, key)

    def __repr__(self) -> str:
        """Return the options."""
        return f"CorruptImage(corruptions={self.names}, severities={self.severities}, prob={self.prob})"


@DATASETS.register_module(force=True)
class CorruptedDataset(Dataset[Any]):
    """Every image of a dataset under every condition; its pipeline holds ``dict(type="CorruptImage")``.

    Args:
        dataset: a dataset of MMEngine, or its config.
        corruptions: names or sets of corruptions, as in :class:`CorruptImage`; each is a condition.
        severities: a severity from 1 to 5, or several; each is a condition.
        clean: add the images without corruption.
    """

    def __init__(
        self,
        dataset: Any,
        corruptions: str | Sequence[str] = "all",
        severities: int | Sequence[int] = (3,),
        clean: bool = True,
    ):
        self.dataset = DATASETS.build(dataset) if isinstance(dataset, dict) else dataset
        if not hasattr(self.dataset, "pipeline"):
            raise ValueError(
                f"CorruptedDataset takes a dataset with a pipeline of its own, got {type(self.dataset).__name__}: wrap "
                "each of its datasets instead"
            )
        levels = [severities] if isinstance(severities, int) else list(severities)
        pairs = [(name, check_severity(level)) for level in levels for name in corruption_names(corruptions)]
        self.conditions = ([CLEAN] if clean else []) + pairs

    @property
    def metainfo(self) -> dict[str, Any]:
        """Return the dataset's metainfo."""
        return copy.deepcopy(self.dataset.metainfo)

    def full_init(self) -> None:
        """Load the annotations, which MMEngine may have put off."""
        self.dataset.full_init()

    def __len__(self) -> int:
        return len(self.dataset) * len(self.conditions)

    def get_data_info(self, idx: int) -> dict[str, Any]:
        """Return the image's annotations with its condition."""
        condition, image = divmod(idx, len(self.dataset))
        name, severity = self.conditions[condition]
        return {**self.dataset.get_data_info(image), "corruption": name, "severity": severity}

    def __getitem__(self, idx: int) -> Any:
        return self.dataset.pipeline(self.get_data_info(idx))


@METRICS.register_module(force=True)
class CorruptionAccuracy(BaseMetric):
    """The metric top-1 in percent: for each corruption and severity, for clean images, and the mean of corruptions.

    The data samples carry ``corruption`` and ``severity``: name them in ``meta_keys`` of ``PackInputs``.

    Raises:
        KeyError: the data samples carry no ``corruption`` or ``severity``.
    """

    default_prefix = "corruption"

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        """Note which predictions of a batch are right."""
        for sample in data_samples:
            if "corruption" not in sample:
                raise KeyError(
                    "the data samples have no corruption: PackInputs(meta_keys=(…, 'corruption', 'severity')) after "
                    "CorruptImage"
                )
            predicted = sample["pred_score"].argmax() if "pred_score" in sample else sample["pred_label"]
            right = int(predicted) in sample["gt_label"].flatten().tolist()
            self.results.append((sample["corruption"], int(sample["severity"]), right))

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        """Return ``clean``, ``fog/3``, … and ``mean``, in percent."""
        counts: dict[tuple[str, int], list[bool]] = defaultdict(list)
        for name, severity, right in results:
            counts[name, severity].append(right)
        metrics = {
            "clean" if not severity else f"{name}/{severity}": 100 * sum(rights) / len(rights)
            for (name, severity), rights in counts.items()
        }
        degraded = [value for key, value in metrics.items() if key != "clean"]
        return {**metrics, "mean": sum(degraded) / len(degraded)} if degraded else metrics
