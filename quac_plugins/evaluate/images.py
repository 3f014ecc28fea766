"""The data set that the workers of a run share: read, crop, corrupt."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from quac_plugins.degradations import corrupt, image_seed
from quac_plugins.evaluate.data import CLEAN, Item
from quac_plugins.images import read_image

__all__ = ["CorruptedImages", "Job", "worker_init"]


class Job(NamedTuple):
    """One image under one condition; ``apply`` tells whether the corruption is applied or already in the file.

    ``place`` is its place among this process's images of that condition.
    """

    item: Item
    condition: tuple[str, int]
    apply: bool
    place: int


class CorruptedImages(Dataset):
    """Maps an index to (uint8 tensor (3, H, W), class index, index of the job, whether the file could be read).

    Consecutive jobs of one file decode it once, so the jobs should be sorted by file.
    """

    def __init__(self, jobs: list[Job], crop: Any, size: tuple[int, int], seed: int):
        self.jobs, self.crop, self.size, self.seed = jobs, crop, size, seed
        self._last: tuple[Item | None, torch.Tensor | None] = (None, None)

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, int, bool]:
        item, condition, apply, _ = self.jobs[index]
        cropped = self._cropped(item)
        if cropped is None:
            return torch.zeros(3, *self.size, dtype=torch.uint8), item.target, index, False
        if apply and condition != CLEAN:
            name, severity = condition
            pixels = np.ascontiguousarray(cropped.permute(1, 2, 0).numpy())
            corrupted = corrupt(pixels, name, severity, image_seed(self.seed, name, severity, item.key))
            cropped = torch.from_numpy(corrupted).permute(2, 0, 1).contiguous()
        return cropped, item.target, index, True

    def _cropped(self, item: Item) -> torch.Tensor | None:
        if self._last[0] is not item:
            cropped = None
            with contextlib.suppress(OSError):
                cropped = self.crop(read_image(item.path))
            self._last = (item, cropped)
        return self._last[1]


def worker_init(_: int) -> None:
    """Keep OpenCV from threads of its own: a forked worker can wait for ever on those of its parent."""
    with contextlib.suppress(ImportError):
        import cv2

        cv2.setNumThreads(0)
