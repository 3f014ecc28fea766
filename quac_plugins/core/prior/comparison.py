"""The loss of a fit: the distance of a student's features of degraded pictures from its teacher's of clean ones.

With z the features standardized per channel by the teacher's statistics, the loss is

    Σ_places w · mean (z_student(degraded) − z_teacher(clean))² / drift + w_logits · KL(teacher ‖ student) / drift

where every term is divided by its value for the untouched host on the same picture (and a share of the mean of all, see
``Recipe.least_drift``), so that about 1 means "nothing repaired" in each, and no picture of strong contrast rules the
others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quac_plugins.core.prior.features import LOGITS, Moments, Watch, by_channel
from quac_plugins.core.prior.recipe import Recipe
from quac_plugins.core.prior.sites import PriorSite

_CACHE = 1 << 30  # bytes of clean features that are kept
_MARGIN = 8  # features at the cut edges of crops that are not compared


@dataclass
class Pictures:
    """The pictures of a fit: uint8, in pairs.

    Attributes:
        clean: clean pictures, (V, H, W, 3) uint8.
        degraded: degraded pictures, (N, H, W, 3) uint8.
        view: (N,), the index of each degraded picture's clean picture.
        train, held: indices of degraded pictures to fit on, and of held-out ones.
        labels: (V,) class indices, or None.
        image: (V,), the index of each clean picture's image. None: each picture is an image of its own.
    """

    clean: np.ndarray
    degraded: np.ndarray
    view: np.ndarray
    train: np.ndarray
    held: np.ndarray
    labels: np.ndarray | None = None
    image: np.ndarray | None = None

    def images_of(self, indices: np.ndarray) -> int:
        """Return the number of different images among some degraded pictures."""
        views = self.view[indices]
        return len(set((views if self.image is None else self.image[views]).tolist()))


class Comparison:
    """The loss of a fit, and the features that it needs.

    Args:
        model: the student.
        teacher: the untouched host.
        sites: the sites of the prior; the near part compares the first one. Empty: there is no near part.
        deep: later places whose features are compared.
        normalize: uint8 (B, H, W, 3) on any device → the host's input.
        pictures: the pictures, in pairs.
        recipe: weights, and the size of the near part's crops.
        device: the device of the computation.
        front: the module that repairs the features at the first site, if it needs nothing but these. Then the near part
            runs on crops of features that are computed once; else the host runs up to the first site.
        during: indices of degraded pictures → a context in which the student's step runs, but no judging.

    Attributes:
        near_steps: the number of steps that compare the first site alone.
        near_only: whether all steps are near.

    Raises:
        ValueError: there is nothing to compare, the host's features are not finite, or labels do not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module,
        sites: list[PriorSite],
        deep: list[PriorSite],
        normalize: Callable[[Tensor], Tensor],
        pictures: Pictures,
        recipe: Recipe,
        device: torch.device,
        front: nn.Module | None = None,
        during: Callable[[np.ndarray], AbstractContextManager[None]] | None = None,
    ):
        self.front, self.during = front, during
        self.model, self.teacher = model, teacher
        self.normalize, self.pictures, self.recipe, self.device = normalize, pictures, recipe, device
        compared = {site.name: site for site in (*sites[:1], *deep)}
        self.places = list(compared)
        self.axes = {name: 1 if site.layout == "nchw" else -1 for name, site in compared.items()}
        self.first = sites[0].name if sites else None
        self.near_steps = round(recipe.steps * recipe.near) if self.first else 0
        if not recipe.deep_weight and not recipe.logits_weight and not recipe.label_weight:
            self.near_steps = recipe.steps
        self.near_only = bool(self.first) and self.near_steps == recipe.steps
        self._clean: dict[int, dict[str, Tensor]] = {}
        self._degraded: dict[int, Tensor] = {}
        self._kept = 0
        self.watch, self.watch_teacher = Watch(model, self.places), Watch(teacher, self.places)
        try:
            self.statistics, self.drift = self._measure()
            self._check()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Remove the hooks from student and teacher."""
        self.watch.close()
        self.watch_teacher.close()

    def _measure(self) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
        """Measure mean and deviation of each channel of the clean features, and the drift of the untouched host."""
        views = sorted(set(self.pictures.view[self.pictures.train].tolist()))
        moments = {name: Moments() for name in self.places}
        for batch in batches(views, self.recipe.batch_size):
            for name, value in self._clean_features(batch, None).items():
                if name in moments:
                    moments[name].add(by_channel(value, self.axes[name]))
        statistics = {name: moment.mean_and_std() for name, moment in moments.items()}
        self.statistics = statistics
        drift: dict[str, list[Tensor]] = {}
        scores: list[Tensor] = []
        for batch in batches(list(range(len(self.pictures.degraded))), self.recipe.batch_size):
            with torch.no_grad():
                clean = self._clean_features(self.pictures.view[batch].tolist(), None)
                features = self.watch_teacher.run(self.teacher, self._images(self.pictures.degraded[batch]))
                for name, value in self.distances(features, clean).items():
                    drift.setdefault(name, []).append(value)
                if LOGITS in features and self.recipe.label_weight:
                    scores.append(features[LOGITS])
        self._host_scores = torch.cat(scores) if scores else None
        whole = {name: torch.cat(values) for name, values in drift.items()}
        least = self.recipe.least_drift
        floored = {name: _floored(values, self.pictures.train, least) for name, values in whole.items()}
        self._host = {name: values / floored[name] for name, values in whole.items()}
        return statistics, floored

    def of_host(self, indices: np.ndarray) -> float:
        """Return the loss of the untouched host on these degraded pictures."""
        weights = self.weights(self.near_only)
        total = sum(
            weight * float(self._host[name][indices].mean()) for name, weight in weights.items() if name in self._host
        )
        if self._host_scores is not None and self.pictures.labels is not None and not self.near_only:
            labels = torch.as_tensor(self.pictures.labels[self.pictures.view[indices]], device=self.device)
            total += self.recipe.label_weight * float(F.cross_entropy(self._host_scores[indices].float(), labels))
        return total

    def _check(self) -> None:
        """Refuse pictures and recipes that leave nothing to learn."""
        for name, values in self.drift.items():
            if not bool(torch.isfinite(values).all()):
                raise ValueError(f"the host's own {name} are not finite (NaN or infinity) on these pictures")
        for near in [True] * (self.near_steps > 0) + [False] * (not self.near_only):
            by_labels = self.recipe.label_weight and not near
            if not by_labels and not set(self.weights(near)) & set(self.drift):
                raise ValueError(
                    "there is nothing to compare: the model returns no logits (B, K), or their weight is 0, and no "
                    "other places are given; name some in deep"
                )
        if self.recipe.label_weight and self.pictures.labels is not None:
            if LOGITS not in self.drift:
                raise ValueError("label_weight needs a model that returns logits (B, K)")
            classes = next(iter(self._clean.values()))[LOGITS].shape[-1] if self._clean else math.inf
            if not 0 <= int(self.pictures.labels.min()) <= int(self.pictures.labels.max()) < classes:
                raise ValueError(f"labels must be from 0 to {classes - 1}, the model's classes")

    def distances(self, student: dict[str, Tensor], teacher: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return place → (B,), the distance of each picture's features from the features of its clean view."""
        return {name: self._one(name, value, teacher[name]) for name, value in student.items()}

    def _one(self, name: str, value: Tensor, target: Tensor) -> Tensor:
        target = target.to(value.device)
        if name == LOGITS:
            logs = value.float().log_softmax(1), target.float().log_softmax(1)
            return F.kl_div(*logs, reduction="none", log_target=True).sum(1).clamp(min=0)
        std = self.statistics[name][1].to(value.device)
        difference = (value.float() - target.float()).movedim(self.axes[name], -1) / std
        return difference.square().flatten(1).mean(1)

    def weights(self, near: bool) -> dict[str, float]:
        """Return place → weight of its term, in the near part or the deep one."""
        recipe = self.recipe
        later = [name for name in self.places if name != self.first]
        weights = {self.first: recipe.site_weight} if self.first else {}
        if not near:
            weights |= {name: recipe.deep_weight / len(later) for name in later}
            weights[LOGITS] = recipe.logits_weight
        return {name: weight for name, weight in weights.items() if weight}  # type: ignore[misc]

    def near_loss(self, indices: np.ndarray, generator: np.random.Generator | None) -> Tensor:
        """Compute the loss at the first site alone, on crops drawn from the generator, or on whole features."""
        assert self.front is not None
        assert self.first is not None
        degraded = self._degraded_features(indices)
        clean = self._clean_features(self.pictures.view[indices].tolist(), self.first)[self.first]
        inner: list[tuple[int, int, int]] = []
        if generator is not None and degraded.ndim == 4:
            rows = 2 if self.axes[self.first] == 1 else 1
            for axis in (rows, rows + 1):
                size = degraded.shape[axis]
                length = min(self.recipe.near_crop, size)
                start = int(generator.integers(0, (size - length) // 4 + 1)) * 4
                degraded, clean = degraded.narrow(axis, start, length), clean.narrow(axis, start, length)
                # what lies at a cut sees padding where the network will see features
                before, after = (_MARGIN if edge else 0 for edge in (start > 0, start + length < size))
                if length > before + after:
                    inner.append((axis, before, length - before - after))
        repaired = self.front(degraded)
        for axis, start, length in inner:
            repaired, clean = repaired.narrow(axis, start, length), clean.narrow(axis, start, length)
        distance = self._one(self.first, repaired, clean)
        return self.recipe.site_weight * (distance / self.drift[self.first][indices].to(distance)).mean()

    def _degraded_features(self, indices: np.ndarray) -> Tensor:
        """Return the teacher's features of degraded pictures at the first site, kept as far as memory allows."""
        assert self.first is not None
        missing = [i for i in dict.fromkeys(indices.tolist()) if i not in self._degraded]
        fresh: dict[int, Tensor] = {}
        if missing:
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                images = self._images(self.pictures.degraded[missing])
                features = self.watch_teacher.run(self.teacher, images, self.first)[self.first]
            for row, index in enumerate(missing):
                fresh[index] = features[row].clone()
                if self._kept + fresh[index].nbytes <= 2 * _CACHE:
                    self._degraded[index] = fresh[index]
                    self._kept += fresh[index].nbytes
        return torch.stack([self._degraded[i] if i in self._degraded else fresh[i] for i in indices.tolist()])

    def loss(self, indices: np.ndarray, near: bool, generator: np.random.Generator | None = None) -> Tensor:
        """Compute the loss on these degraded pictures; the near part draws crops from the generator, if any."""
        if near and self.front is not None:
            return self.near_loss(indices, generator)
        views = self.pictures.view[indices].tolist()
        until = self.first if near else None
        clean = self._clean_features(views, until)
        with nullcontext() if self.during is None or generator is None else self.during(indices):
            student = self.watch.run(self.model, self._images(self.pictures.degraded[indices]), until)
        distances = self.distances(student, clean)
        terms = {name: (value / self.drift[name][indices].to(value)).mean() for name, value in distances.items()}
        weights = self.weights(near)
        total = torch.zeros((), device=self.device)
        for name, weight in weights.items():
            total = total + weight * terms[name] if name in terms else total
        if not near and self.recipe.label_weight and self.pictures.labels is not None and LOGITS in student:
            labels = torch.as_tensor(self.pictures.labels[views], device=self.device)
            total = total + self.recipe.label_weight * F.cross_entropy(student[LOGITS].float(), labels)
        return total

    @property
    def compares_logits(self) -> bool:
        """Return whether a deep part compares logits."""
        return LOGITS in self.drift and bool(self.recipe.logits_weight) and not self.near_only

    def logits_distance(self, indices: np.ndarray) -> float:
        """Return the distance of the student's logits on these degraded pictures; 1 is the untouched host."""
        total = 0.0
        for batch in batches(indices.tolist(), self.recipe.batch_size):
            clean = self._clean_features(self.pictures.view[batch].tolist(), None)
            student = self.watch.run(self.model, self._images(self.pictures.degraded[batch]))
            distance = self._one(LOGITS, student[LOGITS], clean[LOGITS])
            total += float((distance / self.drift[LOGITS][batch].to(distance)).sum())
        return total / len(indices)

    def _images(self, pictures: np.ndarray) -> Tensor:
        return self.normalize(torch.from_numpy(np.ascontiguousarray(pictures)).to(self.device))

    def _clean_features(self, views: list[int], until: str | None) -> dict[str, Tensor]:
        """Return the teacher's features of clean views, kept as far as memory allows."""
        missing = [view for view in dict.fromkeys(views) if view not in self._clean]
        fresh: dict[int, dict[str, Tensor]] = {}
        if missing:
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                features = self.watch_teacher.run(self.teacher, self._images(self.pictures.clean[missing]))
            for row, view in enumerate(missing):
                fresh[view] = {name: value[row].detach().clone() for name, value in features.items()}
                size = sum(value.nbytes for value in fresh[view].values())
                if self._kept + size <= _CACHE:
                    self._clean[view] = fresh[view]
                    self._kept += size
        rows = [self._clean[view] if view in self._clean else fresh[view] for view in views]
        names = [until] if until else list(rows[0])
        return {name: torch.stack([row[name] for row in rows]) for name in names}


def batches(items: list[int], size: int) -> Iterator[list[int]]:
    """Yield the items in lists of at most ``size``."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _floored(drift: Tensor, train: np.ndarray, least: float) -> Tensor:
    """Return each picture's drift as a divisor: pictures that hardly drift (clean ones) must not rule the loss."""
    return drift + max(least * float(drift[train].mean()), 1e-5)
