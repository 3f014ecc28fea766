"""The timesteps of a restoration, from a scheduler of diffusers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

# they end elsewhere than at the clean image, go the other way, add noise, or need a number that nobody gives
_OFF = ("invert_sigmas", "shift_terminal", "stochastic_sampling", "use_dynamic_shifting")


def check_scheduler(scheduler: Any) -> None:
    """Raise a TypeError or ValueError unless the scheduler leads from the degraded image to the clean one.

    Example:
        >>> check_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0))
    """
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        raise TypeError(
            "scheduler must be a FlowMatchEulerDiscreteScheduler, which integrates the velocity that the network "
            f"predicts, got {type(scheduler).__name__}"
        )
    for name in _OFF:
        if value := scheduler.config.get(name):
            raise ValueError(
                f"scheduler: {name}={value!r} does not lead from the degraded image straight to the clean one; leave "
                "it out"
            )


def schedule_of(scheduler: Any, steps: int, device: torch.device) -> FlowMatchEulerDiscreteScheduler:
    """Return a scheduler for one call, with its timesteps: calls in several threads would count each other's steps.

    Args:
        scheduler: the pipeline's scheduler, which stays unchanged.
        steps: the number of steps, of equal length before the scheduler shifts them.
        device: the device of the timesteps.

    Raises:
        TypeError: see :func:`check_scheduler`.
        ValueError: see :func:`check_scheduler`; or the first timestep does not stand for the degraded image.

    Example:
        >>> schedule_of(FlowMatchEulerDiscreteScheduler(), 2, torch.device("cpu")).timesteps
        tensor([1000.,  500.])
    """
    check_scheduler(scheduler)
    schedule = copy.deepcopy(scheduler)
    schedule.set_timesteps(sigmas=[1 - i / steps for i in range(steps)], device=device)
    if not abs(float(schedule.sigmas[0]) - 1) < 1e-4:  # NaN too
        raise ValueError(f"scheduler begins at t = {float(schedule.sigmas[0]):.4g}; a restoration begins at 1")
    return schedule
