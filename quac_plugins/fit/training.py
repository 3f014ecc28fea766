"""The training loop of a fit: injected modules learn to give a host its clean outputs on degraded images.

The same loop serves a prior and quality-adaptive activations: a student (the host with injected modules), a teacher
(the untouched host), places where their features are compared, and pictures in pairs. The loop knows neither files nor
corruptions.

The loss is in :mod:`quac_plugins.core.prior.comparison`. The first part of the steps ("near") compares the
features at the first site alone, where ten photographs hold thousands of examples; the rest ("deep") compares all
places, through the frozen host. Ten photographs are few examples for the deep places, so the state kept is the best one
on images held out, the untouched host included.
"""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from quac_plugins.core.prior.comparison import Comparison, batches
from quac_plugins.fit.photographs import digest_of
from quac_plugins.processes import ALONE, Processes

if TYPE_CHECKING:
    from quac_plugins.fit.session import FitSession

_LOOKED_AT = 96  # held-out pictures, at most
_STRENGTHS = (1.0, 0.75, 0.5, 0.25)
_SAFE_STRENGTHS = (0.75, 0.5)  # where the pictures held out are of so few images that what they say is chance
FEW = 4  # photographs held out


class Fit:
    """One stage of a fit, by the loop of the module's docstring.

    Args:
        comparison: the comparison of student and teacher on pictures; the student stays in eval mode.
        parameters: the fitted parameters, by name in the student.
        processes: the processes that share the work.
        scaled: parameters that what is fitted is proportional to, see :meth:`Fit._set_strength`, and which of their
            rows are fitted, bool; the others stay. None: all.

    Attributes:
        curve: an entry for each look: step, loss since the last look, and held-out loss.
        best_step: the step of the kept state; 0 is the untouched host.
        stopped: the reason for an end before the last step, or None.
        untouched: the held-out loss of the untouched host.
        strength: the factor that scaled the fitted residual at the end.
    """

    def __init__(
        self,
        comparison: Comparison,
        parameters: dict[str, nn.Parameter],
        processes: Processes = ALONE,
        scaled: Mapping[nn.Parameter, Tensor | None] | None = None,
    ):
        self.comparison, self.parameters, self.processes = comparison, parameters, processes
        self.pictures, self.recipe, self.device = comparison.pictures, comparison.recipe, comparison.device
        self.loss, self.near_steps = comparison.loss, comparison.near_steps
        self.optimizer = torch.optim.AdamW(self._groups(), lr=self.recipe.lr)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.recipe.amp == "fp16")
        self.step, self.best_step, self.best = 0, 0, math.inf
        self.best_state = self._state()
        self.curve: list[dict[str, Any]] = []
        self.untouched = math.nan
        self._looks = 0  # since the best
        self._running: list[float] = []  # losses since the last look
        self.stopped: str | None = None
        self.scaled, self.strength = dict(scaled or {}), 1.0

    def close(self) -> None:
        """Remove the hooks from student and teacher."""
        self.comparison.close()

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
        near = step < self.near_steps
        start, length = (0, self.near_steps) if near else (self.near_steps, self.recipe.steps - self.near_steps)
        warm = max(1, length // 10)
        done = step - start
        peak = self.recipe.lr * (1.0 if step < self.near_steps or not self.near_steps else 0.5)
        if done < warm:
            return peak * (done + 1) / warm
        return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (done - warm) / max(1, length - warm))))

    def _draw(self, step: int) -> np.ndarray:
        """Return the pictures of a step, by its number alone, so that an interrupted fit goes on unchanged."""
        generator = np.random.default_rng([self.recipe.seed, step])
        train = self.pictures.train
        on_features = step < self.near_steps and self.comparison.front is not None
        size = self.recipe.near_batch if on_features else self.recipe.batch_size
        return generator.choice(train, size, replace=len(train) < size)

    def run(
        self, progress: Callable[[int, float], None] | None = None, checkpoint: Callable[[], None] | None = None
    ) -> Fit:
        """Fit until the last step, and leave the best state in the model.

        Args:
            progress: called after every step with its number and loss.
            checkpoint: called after every look at the held-out images.
        """
        recipe = self.recipe
        if not self.curve:
            self._begin()
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
        self.strength = self._set_strength()
        return self

    def _begin(self) -> None:
        """Judge the first state; an earlier fit's may be worse on these pictures than the untouched host."""
        self._look()
        fresh = bool(self.scaled) and not any(bool(parameter.any()) for parameter in self.scaled)
        self.untouched = self.best if fresh else self.comparison.of_host(self._judges)
        if self.scaled and self.untouched < self.best:
            self.best_state = {
                name: self._times(parameter, parameter.detach().clone(), 0.0 if parameter in self.scaled else 1.0)
                for name, parameter in self.parameters.items()
            }
            self.best = self.untouched

    def _times(self, parameter: nn.Parameter, value: Tensor, strength: float) -> Tensor:
        """Return a parameter's value with its fitted part multiplied by a number."""
        rows = self.scaled.get(parameter)
        if strength == 1 or rows is None:
            return value * strength
        return torch.where(rows.to(value.device)[:, None], value * strength, value)

    def _set_strength(self) -> float:
        """Scale the fitted residual so that the logits of the held-out images come nearest to the teacher's.

        A few images teach too much rather than too little: features come nearer while logits go away. With fewer than
        four held-out images the choice is between less and much less.
        """
        held = evenly(self.pictures.held, _LOOKED_AT)
        if not (self.scaled and len(held) and self.best_step and self.comparison.compares_logits):
            return 1.0
        whole = [parameter.detach().clone() for parameter in self.scaled]
        distances: dict[float, float] = {}
        few = self.pictures.images_of(held) < FEW
        for strength in (*(_SAFE_STRENGTHS if few else _STRENGTHS), None):
            chosen = min(distances, key=lambda s: distances[s]) if strength is None else strength
            with torch.no_grad(), self._autocast():
                for parameter, value in zip(self.scaled, whole, strict=True):
                    parameter.copy_(self._times(parameter, value, chosen))
                if strength is not None:
                    distances[strength] = self.comparison.logits_distance(held)
        return chosen

    def _one_step(self) -> float:
        near = self.step < self.near_steps
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate(self.step)
        indices = self._draw(self.step)
        share = np.array_split(indices, self.processes.world_size)[self.processes.rank]
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=self.device)
        if len(share):
            with self._autocast():
                # a share of the mean over the whole batch: shares may differ by one picture
                crop = np.random.default_rng([self.recipe.seed, self.step, 1])
                loss = self.loss(share, near, crop)
                loss = loss * (len(share) * self.processes.world_size / len(indices))
            self.scaler.scale(loss).backward()
        value = float(self.processes.average(loss.detach()))
        if not math.isfinite(value):
            return value
        parameters = list(self.parameters.values())
        self.processes.average_gradients(parameters)
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(parameters, self.recipe.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return value

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.recipe.amp == "no":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16 if self.recipe.amp == "bf16" else torch.float16)

    @property
    def _judges(self) -> np.ndarray:
        """Return the held-out pictures; without any, the pictures of training."""
        return evenly(self.pictures.held if len(self.pictures.held) else self.pictures.train, _LOOKED_AT)

    def _look(self) -> None:
        """Note the loss on the judging pictures, and whether it is the best."""
        chosen = self._judges
        share = self.processes.share(list(batches(chosen.tolist(), self.recipe.batch_size)))
        total = torch.zeros(1, dtype=torch.float64)
        with torch.no_grad(), self._autocast():
            for batch in share:
                total += float(self.loss(np.array(batch), near=self.comparison.near_only)) * len(batch)
        held = float(self.processes.average(total)) * self.processes.world_size / len(chosen)
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

    # -- state

    def _state(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    def _restore(self, state: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state[name])

    def state_dict(self) -> dict[str, Any]:
        """Return the state from which :meth:`load_state_dict` goes on as without an interruption."""
        return {
            "step": self.step,
            "best_step": self.best_step,
            "best": self.best,
            "untouched": self.untouched,
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
        self.untouched = state["untouched"]
        self._looks, self.stopped, self.curve = state["looks"], state["stopped"], list(state["curve"])
        self._restore(state["parameters"])
        self.best_state = state["best_state"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])


def evenly(indices: np.ndarray, most: int) -> np.ndarray:
    """Return at most ``most`` of the indices, evenly spread."""
    if len(indices) <= most:
        return indices
    return indices[np.linspace(0, len(indices) - 1, most).round().astype(int)]


def run_stage(session: FitSession, stage: str, fit: Fit) -> None:
    """Run one stage, from an interrupted run's state if there is one, and write its results into the report."""
    keep, show = session.keep, session.show
    of = digest_of(fit.pictures) if keep.folder is not None else ""
    try:
        state = session.processes.of_main(lambda: keep.load(stage, of))
        if state is not None:
            try:
                fit.load_state_dict(state)
            except (KeyError, TypeError, ValueError, RuntimeError) as error:
                raise keep.damaged(stage, error) from error
        fit.run(
            progress=lambda step, loss: show(stage, step, fit.recipe.steps, loss),
            checkpoint=lambda: keep.save(stage, fit.state_dict(), of),
        )
    finally:
        fit.close()
    keep.save(stage, fit.state_dict(), of)
    session.report.stages[stage] = {
        "curve": fit.curve,
        "best_step": fit.best_step,
        "first": fit.untouched,
        "best": fit.best if math.isfinite(fit.best) else math.nan,
        "stopped": fit.stopped,
        "strength": fit.strength,
    }
