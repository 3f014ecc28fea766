"""Fitting what was put into a host so that it computes on degraded images what the untouched host does on clean ones.

The same loop serves a prior and quality-adaptive activations: a student (the host with what was put in), a teacher (the
host as it was), places where their features are compared, and pictures in pairs. It knows no files and no corruptions.

With z the features standardized per channel by the teacher's statistics, the loss is

    Σ_places w · mean (z_student(degraded) − z_teacher(clean))² / drift + w_logits · KL(teacher ‖ student) / drift

where every term is divided by its value for the untouched host on the same picture, so that 1 means "nothing repaired"
in each, and no picture of strong contrast rules the others. The first part of the steps ("near") compares the features
at the first site alone, where ten photographs hold thousands of examples; the rest ("deep") compares all places,
through the frozen host. Ten photographs are few examples for the deep places, so the state kept is the best one on
images held out, the untouched host included.
"""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quac_plugins.core.prior.sites import PriorSite

LOGITS = "logits"
_CACHE = 1 << 30  # bytes of clean features that are kept
_LEAST_DRIFT = 0.1  # of the mean drift
_MARGIN = 8  # features at the cut edges of crops that are not compared


@dataclass
class Recipe:
    """How to fit.

    Attributes:
        steps: of AdamW, with warm-up over the first tenth of each part and cosine decay.
        near: share of the steps that compares the features at the first site alone.
        batch_size: pictures a step, over all processes.
        lr: highest learning rate.
        weight_decay: of matrices and kernels; vectors have none.
        site_weight: weight of the first site.
        deep_weight: weight of all later places together; 0: the near part is all.
        logits_weight: weight of the logits.
        label_weight: weight of cross-entropy where labels are given.
        check_every: steps between two looks at the held-out images.
        patience: looks without a better one after which the deep part stops; 0: never.
        clip: largest norm of the gradient.
        amp: ``"no"``, ``"bf16"`` or ``"fp16"`` (on a GPU).
        near_crop: side of the crops of features that the near part works on; the whole of smaller ones.
        near_batch: pictures a step of the near part.
        deep_crop: side of the crops of pictures that the deep part works on, where the host takes such; 0: the whole.
        seed: of the order of the pictures.
    """

    steps: int = 400
    near: float = 0.5
    batch_size: int = 8
    lr: float = 2e-3
    weight_decay: float = 1e-2
    site_weight: float = 1.0
    deep_weight: float = 1.0
    logits_weight: float = 0.2
    label_weight: float = 0.0
    check_every: int = 40
    patience: int = 0
    clip: float = 1.0
    amp: str = "no"
    near_crop: int = 64
    near_batch: int = 8
    deep_crop: int = 160
    seed: int = 0


@dataclass
class Pictures:
    """What is fitted on: uint8 pictures in pairs.

    Attributes:
        clean: (V, H, W, 3) uint8.
        degraded: (N, H, W, 3) uint8.
        view: (N,) which clean picture each degraded one belongs to.
        train, held: indices into the N.
        labels: (V,) class indices, or None.
    """

    clean: np.ndarray
    degraded: np.ndarray
    view: np.ndarray
    train: np.ndarray
    held: np.ndarray
    labels: np.ndarray | None = None


@dataclass
class Share:
    """This process's part of a fit that several share: rank, how many, and how to average tensors over all."""

    rank: int = 0
    world_size: int = 1
    average: Callable[[Tensor], Tensor] = field(default=lambda tensor: tensor)


@dataclass
class Outcome:
    """What a fit did.

    Attributes:
        curve: one entry for each look: step, loss since the last one, held-out loss, and its terms.
        best_step: whose state was kept; 0 is the host as it was.
        stopped: why it ended before the last step, or None.
    """

    curve: list[dict[str, Any]]
    best_step: int
    stopped: str | None


class Watch:
    """Collects the features at places of a network while it runs; can end a run after the last one wanted."""

    def __init__(self, model: nn.Module, places: list[str]):
        self.places = places
        self.features: dict[str, Tensor] = {}
        self.until: str | None = None
        self._handles = [model.get_submodule(name).register_forward_hook(self._hook(name)) for name in places]

    def _hook(self, name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            if name == self.until:
                self.features[name] = output
                raise _EnoughError
            self.features[name] = output.clone()  # what comes after may work in place

        return keep

    def run(self, model: nn.Module, images: Tensor, until: str | None = None) -> dict[str, Tensor]:
        """Features by place, and the network's own output as ``"logits"`` if it is a tensor (B, K)."""
        self.features, self.until = {}, until
        with contextlib.suppress(_EnoughError):
            output = model(images)
            if isinstance(output, Tensor) and output.ndim == 2:
                self.features[LOGITS] = output
        self.until = None
        return self.features

    def close(self) -> None:
        """Stop listening."""
        for handle in self._handles:
            handle.remove()


class _EnoughError(Exception):
    """All features that are wanted are there."""


class Fit:
    """One fit: see the module's docstring.

    Args:
        model: the student; stays in eval mode while it is fitted.
        teacher: the host as it was.
        parameters: what is fitted, by name in the student.
        sites: where the prior is; the first is compared in the near part. Empty: there is no near part.
        deep: later places whose features are compared.
        normalize: uint8 (B, H, W, 3) on any device → what the host takes.
        recipe, share: see there.
        front: what maps the features at the first site to the repaired ones, if it needs nothing else. Then the near
            part runs on features that are computed once, on crops of them; else the host runs up to the first site.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module,
        parameters: dict[str, nn.Parameter],
        sites: list[PriorSite],
        deep: list[PriorSite],
        normalize: Callable[[Tensor], Tensor],
        pictures: Pictures,
        recipe: Recipe,
        share: Share | None = None,
        front: nn.Module | None = None,
    ):
        self.front = front
        self.model, self.teacher, self.parameters = model, teacher, parameters
        self.normalize, self.pictures, self.recipe, self.share = normalize, pictures, recipe, share or Share()
        compared = {site.name: site for site in (*sites[:1], *deep)}
        self.compared, self.places = compared, list(compared)
        self.axes = {name: 1 if site.layout == "nchw" else -1 for name, site in compared.items()}
        self.first = sites[0].name if sites else None
        self.near_steps = round(recipe.steps * recipe.near) if self.first else 0
        if not recipe.deep_weight and not recipe.logits_weight and not recipe.label_weight:
            self.near_steps = recipe.steps
        self.watch, self.watch_teacher = Watch(model, self.places), Watch(teacher, self.places)
        self.device = next(iter(parameters.values())).device
        self.optimizer = torch.optim.AdamW(self._groups(), lr=recipe.lr)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.amp == "fp16")
        self.step, self.best_step, self.best = 0, 0, math.inf
        self.best_state = self._state()
        self.curve: list[dict[str, Any]] = []
        self._looks = 0  # since the best
        self._running: list[float] = []  # losses since the last look
        self._clean: dict[int, dict[str, Tensor]] = {}
        self._degraded: dict[int, Tensor] = {}
        self._kept = 0
        self.stopped: str | None = None
        try:
            self.crops = self._takes_crops()
            self.statistics, self.drift = self._measure()
            self._check()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Take the hooks off student and teacher."""
        self.watch.close()
        self.watch_teacher.close()

    # -- what is compared

    def _measure(self) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
        """Per-channel mean and deviation of the clean features, and the drift of the untouched host."""
        views = sorted(set(self.pictures.view[self.pictures.train].tolist()))
        moments = {name: _Moments() for name in self.places}
        for batch in _batches(views, self.recipe.batch_size):
            for name, value in self._clean_features(batch, None).items():
                if name in moments:
                    moments[name].add(_by_channel(value, self.axes[name]))
        statistics = {name: moment.mean_and_std() for name, moment in moments.items()}
        self.statistics = statistics
        drift: dict[str, list[Tensor]] = {}
        for batch in _batches(list(range(len(self.pictures.degraded))), self.recipe.batch_size):
            with torch.no_grad():
                clean = self._clean_features(self.pictures.view[batch].tolist(), None)
                there = self.watch_teacher.run(self.teacher, self._images(self.pictures.degraded[batch]))
                for name, value in self._distances(there, clean).items():
                    drift.setdefault(name, []).append(value)
        return statistics, {name: _floored(torch.cat(values), self.pictures.train) for name, values in drift.items()}

    def _check(self) -> None:
        """Refuse what leaves nothing to learn from."""
        for name, values in self.drift.items():
            if not bool(torch.isfinite(values).all()):
                raise ValueError(f"the host's own {name} are not finite (NaN or infinity) on these pictures")
        for near in [True] * (self.near_steps > 0) + [False] * (not self.near_only):
            by_labels = self.recipe.label_weight and not near
            if not by_labels and not set(self._weights(near)) & set(self.drift):
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

    def _distances(self, student: dict[str, Tensor], teacher: dict[str, Tensor]) -> dict[str, Tensor]:
        """Place → (B,): how far the features of each picture are from those of its clean view."""
        terms = {}
        for name, value in student.items():
            target = teacher[name].to(value.device)
            if name == LOGITS:
                logs = value.float().log_softmax(1), target.float().log_softmax(1)
                terms[name] = F.kl_div(*logs, reduction="none", log_target=True).sum(1).clamp(min=0)
            else:
                std = self.statistics[name][1].to(value.device)
                difference = (value.float() - target.float()).movedim(self.axes[name], -1) / std
                terms[name] = difference.square().flatten(1).mean(1)
        return terms

    def _weights(self, near: bool) -> dict[str, float]:
        recipe = self.recipe
        later = [name for name in self.places if name != self.first]
        weights = {self.first: recipe.site_weight} if self.first else {}
        if not near:
            weights |= {name: recipe.deep_weight / len(later) for name in later}
            weights[LOGITS] = recipe.logits_weight
        return {name: weight for name, weight in weights.items() if weight}  # type: ignore[misc]

    def near_loss(self, indices: np.ndarray, generator: np.random.Generator | None) -> Tensor:
        """The loss at the first site alone, on crops drawn from the generator, or on whole features."""
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
        distance = self._distances({self.first: repaired}, {self.first: clean})[self.first]
        return self.recipe.site_weight * (distance / self.drift[self.first][indices].to(distance)).mean()

    def _degraded_features(self, indices: np.ndarray) -> Tensor:
        """The teacher's features of degraded pictures at the first site; computed once, as far as memory goes."""
        assert self.first is not None
        missing = [i for i in dict.fromkeys(indices.tolist()) if i not in self._degraded]
        fresh: dict[int, Tensor] = {}
        if missing:
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                images = self._images(self.pictures.degraded[missing])
                found = self.watch_teacher.run(self.teacher, images, self.first)[self.first]
            for row, index in enumerate(missing):
                fresh[index] = found[row].clone()
                if self._kept + fresh[index].nbytes <= 2 * _CACHE:
                    self._degraded[index] = fresh[index]
                    self._kept += fresh[index].nbytes
        return torch.stack([self._degraded[i] if i in self._degraded else fresh[i] for i in indices.tolist()])

    def _crop_of(self, generator: np.random.Generator) -> tuple[slice, slice] | None:
        """A random crop of the pictures, the same for a whole step; None where whole pictures are taken."""
        sides = self.pictures.clean.shape[1:3]
        side = self.recipe.deep_crop
        if not self.crops or min(sides) <= side:
            return None
        starts = [int(generator.integers(0, (size - side) // 2 + 1)) * 2 for size in sides]
        return slice(starts[0], starts[0] + side), slice(starts[1], starts[1] + side)

    def _takes_crops(self) -> bool:
        """Whether the host runs on smaller pictures than its own: most convolutional ones do, most others do not."""
        side = self.recipe.deep_crop
        if not side or min(self.pictures.clean.shape[1:3]) <= side:
            return False
        if any(site.layout != "nchw" for site in self.compared.values()):
            return False
        try:
            with torch.no_grad():
                self.watch_teacher.run(self.teacher, self._images(self.pictures.clean[:1, :side, :side]))
        except Exception:  # whatever a host raises for a size that is not its own
            return False
        return True

    def loss(self, indices: np.ndarray, near: bool, generator: np.random.Generator | None = None) -> Tensor:
        """The loss on these degraded pictures; on crops of them that are drawn from the generator, if there is one."""
        if near and self.front is not None:
            return self.near_loss(indices, generator)
        views = self.pictures.view[indices].tolist()
        until = self.first if near else None
        crop = self._crop_of(generator) if generator is not None else None
        degraded = self.pictures.degraded[indices]
        if crop is None:
            clean = self._clean_features(views, until)
        else:
            degraded = degraded[:, crop[0], crop[1]]
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                pictures = self._images(self.pictures.clean[views][:, crop[0], crop[1]])
                clean = dict(self.watch_teacher.run(self.teacher, pictures, until))
        student = self.watch.run(self.model, self._images(degraded), until)
        distances = self._distances(student, clean)
        terms = {name: (value / self.drift[name][indices].to(value)).mean() for name, value in distances.items()}
        weights = self._weights(near)
        total = torch.zeros((), device=self.device)
        for name, weight in weights.items():
            total = total + weight * terms[name] if name in terms else total
        if not near and self.recipe.label_weight and self.pictures.labels is not None and LOGITS in student:
            labels = torch.as_tensor(self.pictures.labels[views], device=self.device)
            total = total + self.recipe.label_weight * F.cross_entropy(student[LOGITS].float(), labels)
        return total

    def _images(self, pictures: np.ndarray) -> Tensor:
        return self.normalize(torch.from_numpy(np.ascontiguousarray(pictures)).to(self.device))

    def _clean_features(self, views: list[int], until: str | None) -> dict[str, Tensor]:
        """The teacher's features of clean views; computed once, as far as the memory for them goes."""
        missing = [view for view in dict.fromkeys(views) if view not in self._clean]
        fresh: dict[int, dict[str, Tensor]] = {}
        if missing:
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                found = self.watch_teacher.run(self.teacher, self._images(self.pictures.clean[missing]))
            for row, view in enumerate(missing):
                fresh[view] = {name: value[row].detach().clone() for name, value in found.items()}
                size = sum(value.nbytes for value in fresh[view].values())
                if self._kept + size <= _CACHE:
                    self._clean[view] = fresh[view]
                    self._kept += size
        rows = [self._clean[view] if view in self._clean else fresh[view] for view in views]
        names = [until] if until else list(rows[0])
        return {name: torch.stack([row[name] for row in rows]) for name in names}

    # -- the loop

    def _groups(self) -> list[dict[str, Any]]:
        matrices = [p for p in self.parameters.values() if sum(size > 1 for size in p.shape) > 1]
        others = [p for p in self.parameters.values() if sum(size > 1 for size in p.shape) <= 1]
        groups = [
            {"params": matrices, "weight_decay": self.recipe.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def _rate(self, step: int) -> float:
        start, length = (
            (0, self.near_steps)
            if step < self.near_steps
            else (
                self.near_steps,
                self.recipe.steps - self.near_steps,
            )
        )
        warm = max(1, length // 10)
        done = step - start
        peak = self.recipe.lr * (1.0 if step < self.near_steps or not self.near_steps else 0.5)
        if done < warm:
            return peak * (done + 1) / warm
        return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (done - warm) / max(1, length - warm))))

    def _draw(self, step: int) -> np.ndarray:
        """The pictures of a step: by its number alone, so that a fit goes on where it was interrupted."""
        generator = np.random.default_rng([self.recipe.seed, step])
        train = self.pictures.train
        size = self.recipe.near_batch if step < self.near_steps and self.front is not None else self.recipe.batch_size
        return generator.choice(train, size, replace=len(train) < size)

    def run(
        self, progress: Callable[[int, float], None] | None = None, checkpoint: Callable[[], None] | None = None
    ) -> Outcome:
        """Fit until the last step, and leave the best state in the model.

        Args:
            progress: called after every step with its number and loss.
            checkpoint: called after every look at the held-out images.
        """
        recipe = self.recipe
        if not self.curve:
            self._look()
        while self.step < recipe.steps and self.stopped is None:
            loss = self._one_step()
            if not math.isfinite(loss):
                self.stopped = f"the loss was {loss} at step {self.step + 1}"
                kept = f"the best state before, of step {self.best_step}, was kept"
                warnings.warn(f"{self.stopped}; {kept}", stacklevel=3)
                break
            self.step += 1
            self._running.append(loss)
            if progress is not None:
                progress(self.step, loss)
            if self.step % recipe.check_every == 0 or self.step in (self.near_steps, recipe.steps):
                self._look()
                if recipe.patience and self._looks >= recipe.patience and self.step > self.near_steps:
                    self.stopped = f"no better on the held-out images for {self._looks} looks"
                if checkpoint is not None:
                    checkpoint()
        self._restore(self.best_state)
        return Outcome(self.curve, self.best_step, self.stopped)

    def _one_step(self) -> float:
        near = self.step < self.near_steps
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate(self.step)
        indices = self._draw(self.step)
        own = np.array_split(indices, self.share.world_size)[self.share.rank]
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=self.device)
        if len(own):
            with self._autocast():
                # a share of the mean over the whole batch: shares may differ by one picture
                crop = np.random.default_rng([self.recipe.seed, self.step, 1])
                loss = self.loss(own, near, crop)
                loss = loss * (len(own) * self.share.world_size / len(indices))
            self.scaler.scale(loss).backward()
        value = float(self.share.average(loss.detach().clone()))
        if not math.isfinite(value):
            return value
        parameters = list(self.parameters.values())
        if self.share.world_size > 1:
            _average_gradients(parameters, self.share)
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(parameters, self.recipe.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return value

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.recipe.amp == "no":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16 if self.recipe.amp == "bf16" else torch.float16)

    def _look(self) -> None:
        """The loss on the held-out images (without any, on the pictures of training), and whether it is the best."""
        chosen = _spread(self.pictures.held if len(self.pictures.held) else self.pictures.train, 96)
        batches = list(_batches(chosen.tolist(), self.recipe.batch_size))[self.share.rank :: self.share.world_size]
        total = torch.zeros(1, dtype=torch.float64)
        with torch.no_grad(), self._autocast():
            for batch in batches:
                total += float(self.loss(np.array(batch), near=self.near_only)) * len(batch)
        held = float(self.share.average(total)) * self.share.world_size / len(chosen)
        entry = {
            "step": self.step,
            "loss": float(np.mean(self._running)) if self._running else None,
            "held_out": held,
        }
        self._running = []
        self.curve.append(entry)
        if held < self.best:
            self.best, self.best_step, self.best_state, self._looks = held, self.step, self._state(), 0
        else:
            self._looks += 1

    @property
    def near_only(self) -> bool:
        """There is no deep part, so it is not looked at either."""
        return self.near_steps == self.recipe.steps

    # -- state

    def _state(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    def _restore(self, state: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state[name])

    def state_dict(self) -> dict[str, Any]:
        """Everything that :meth:`load_state_dict` needs to go on as if nothing had happened."""
        return {
            "step": self.step,
            "best_step": self.best_step,
            "best": self.best,
            "looks": self._looks,
            "stopped": self.stopped,
            "curve": copy.deepcopy(self.curve),
            "parameters": self._state(),
            "best_state": self.best_state,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.step, self.best_step, self.best = state["step"], state["best_step"], state["best"]
        self._looks, self.stopped, self.curve = state["looks"], state["stopped"], list(state["curve"])
        self._restore(state["parameters"])
        self.best_state = state["best_state"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])


class _Moments:
    """Mean and deviation of each channel over many rows."""

    def __init__(self) -> None:
        self.count, self.total, self.squares = 0, torch.zeros(()), torch.zeros(())

    def add(self, rows: Tensor) -> None:
        rows = rows.double()
        self.count += rows.shape[0]
        self.total = self.total.to(rows) + rows.sum(0)
        self.squares = self.squares.to(rows) + rows.square().sum(0)

    def mean_and_std(self) -> tuple[Tensor, Tensor]:
        mean = self.total / self.count
        std = (self.squares / self.count - mean.square()).clamp(min=0).sqrt()
        # channels that hardly vary (dead ones) must not rule the loss
        return mean.float(), std.clamp(min=max(1e-3 * float(std.max()), 1e-12)).float()


def channel_statistics(
    model: nn.Module,
    axes: dict[str, int],
    prefixes: dict[str, int],
    normalize: Callable[[Tensor], Tensor],
    pictures: np.ndarray,
    device: torch.device,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and deviation of each channel of a network's features, place by place.

    Args:
        model: the network; it runs as far as the last place.
        axes: place → axis of its channels, in the order in which the network comes to them.
        prefixes: place → tokens in front that are not counted.
        normalize: uint8 (B, H, W, 3) → what the network takes.
        pictures: (V, H, W, 3) uint8.
        device: of the network.
    """
    watch, moments = Watch(model, list(axes)), {name: _Moments() for name in axes}
    try:
        for start in range(0, len(pictures), 8):
            images = normalize(torch.from_numpy(np.ascontiguousarray(pictures[start : start + 8])).to(device))
            with torch.no_grad():
                for name, value in watch.run(model, images, watch.places[-1]).items():
                    value = value[:, prefixes[name] :] if prefixes[name] else value
                    moments[name].add(_by_channel(value, axes[name]))
    finally:
        watch.close()
    return {name: moment.mean_and_std() for name, moment in moments.items()}


def _by_channel(value: Tensor, channel_dim: int) -> Tensor:
    """(rows, C) of features with any layout."""
    return value.movedim(channel_dim, -1).reshape(-1, value.shape[channel_dim])


def _batches(items: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _floored(drift: Tensor, train: np.ndarray) -> Tensor:
    """Drift of each picture as a divisor: pictures that hardly drift (clean ones) must not rule the loss."""
    return drift + max(_LEAST_DRIFT * float(drift[train].mean()), 1e-5)


def _spread(indices: np.ndarray, most: int) -> np.ndarray:
    """At most so many of the indices, evenly spread over them."""
    if len(indices) <= most:
        return indices
    return indices[np.linspace(0, len(indices) - 1, most).round().astype(int)]


def _average_gradients(parameters: list[nn.Parameter], share: Share) -> None:
    """One exchange for all gradients; a parameter that has none in any process keeps none, as with one process."""
    has = torch.tensor([float(p.grad is not None) for p in parameters])
    moved = [p for p, any_has in zip(parameters, share.average(has).tolist(), strict=True) if any_has]
    for parameter in moved:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    flat = share.average(torch.cat([p.grad.flatten() for p in moved if p.grad is not None]))
    for parameter, part in zip(moved, flat.split([p.numel() for p in moved]), strict=True):
        assert parameter.grad is not None
        parameter.grad.copy_(part.view_as(parameter))
