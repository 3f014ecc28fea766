"""Callbacks at the end of a step, as those of diffusers' pipelines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

from quac_plugins.core.options import one_of


def tensor_inputs(callback: Any, names: Any, known: tuple[str, ...]) -> list[str]:
    """Which tensors a callback is given: those it asks for itself, or else ``names``.

    Raises:
        TypeError: it cannot be called, or the names are no list.
        ValueError: a name is not of ``known``.

    Example:
        >>> tensor_inputs(print, ["latents"], ("latents", "quality"))
        ['latents']
    """
    if callback is not None and not callable(callback):
        raise TypeError(f"callback_on_step_end must be a function, got {type(callback).__name__}")
    if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
        names = callback.tensor_inputs
    if not isinstance(names, (list, tuple)):
        raise TypeError(f"callback_on_step_end_tensor_inputs must be a list of names, got {names!r}")
    for name in names:
        one_of("callback_on_step_end_tensor_inputs", name, list(known))
    return list(names)


def changed_by(callback: Any, pipe: Any, step: int, t: Tensor, tensors: Mapping[str, Any], names: list[str]) -> dict:
    """The tensors after a callback, which may have returned others in their place.

    Args:
        callback: called as ``callback(pipe, step, t, {name: tensor})``; None: nothing is changed.
        pipe, step, t: what it is told.
        tensors: name → tensor, or None for one that there is not.
        names: those it is given.

    Raises:
        TypeError, ValueError: it returned something else than tensors of the same shapes by their names.

    Example:
        >>> changed_by(lambda pipe, step, t, given: {"latents": given["latents"] + 1}, None, 0, None,
        ...            {"latents": Tensor([1.0])}, ["latents"])
        {'latents': tensor([2.])}
    """
    if callback is None:
        return dict(tensors)
    changed = callback(pipe, step, t, {name: tensors[name] for name in names})
    if changed is None:
        return dict(tensors)
    if not isinstance(changed, Mapping):
        raise TypeError(f"callback_on_step_end must return a dict of tensors, got {type(changed).__name__}")
    for name, value in changed.items():
        one_of("tensor returned by callback_on_step_end", name, list(tensors))
        was = tensors[name]
        if value is was:
            continue
        if not isinstance(value, Tensor) or not isinstance(was, Tensor) or value.shape != was.shape:
            wanted = tuple(was.shape) if isinstance(was, Tensor) else was
            got = tuple(value.shape) if isinstance(value, Tensor) else value
            raise ValueError(f"callback_on_step_end returned {name!r} {got}, expected a tensor {wanted}")
    return {**tensors, **changed}
