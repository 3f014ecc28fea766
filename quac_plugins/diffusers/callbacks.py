"""Callbacks at the end of a denoising step, called as diffusers' pipelines call theirs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

from quac_plugins.core.deprecated import warn_of
from quac_plugins.core.options import one_of

_RENAMED = {"quality": "q"}  # tensors of callbacks that were written for version 0.1.0


def tensor_inputs(callback: Any, names: Any, known: tuple[str, ...]) -> list[str]:
    """Return the names of the tensors that a callback gets: its own ``tensor_inputs``, or else ``names``.

    Raises:
        TypeError: the callback cannot be called, or the names are not a list.
        ValueError: a name is not in ``known``.

    Example:
        >>> tensor_inputs(print, ["latents"], ("latents", "q"))
        ['latents']
    """
    if callback is not None and not callable(callback):
        raise TypeError(f"callback_on_step_end must be a function, got {type(callback).__name__}")
    if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
        names = callback.tensor_inputs
    if not isinstance(names, (list, tuple)):
        raise TypeError(f"callback_on_step_end_tensor_inputs must be a list of names, got {names!r}")
    for name in names:
        if name in _RENAMED:
            warn_of(f"callback_on_step_end_tensor_inputs={name!r}", repr(_RENAMED[name]))
        one_of("callback_on_step_end_tensor_inputs", _RENAMED.get(name, name), list(known))
    return list(names)


def changed_by(callback: Any, pipe: Any, step: int, t: Tensor, tensors: Mapping[str, Any], names: list[str]) -> dict:
    """Call a callback, and return the tensors with those that the callback replaced.

    Args:
        callback: called as ``callback(pipe, step, t, {name: tensor})``. None: no tensor is changed.
        pipe, step, t: the pipeline, the index of the step, and the timestep.
        tensors: name → tensor, or None where the pipeline has no such tensor.
        names: the tensors that the callback gets.

    Raises:
        TypeError: the callback returned something else than a dict or None.
        ValueError: the callback returned an unknown name, or a tensor of another shape.

    Example:
        >>> changed_by(lambda pipe, step, t, tensors: {"latents": tensors["latents"] + 1}, None, 0, None,
        ...            {"latents": Tensor([1.0])}, ["latents"])
        {'latents': tensor([2.])}
    """
    if callback is None:
        return dict(tensors)
    changed = callback(pipe, step, t, {name: tensors[_RENAMED.get(name, name)] for name in names})
    if changed is None:
        return dict(tensors)
    if not isinstance(changed, Mapping):
        raise TypeError(f"callback_on_step_end must return a dict of tensors, got {type(changed).__name__}")
    changed = {_RENAMED.get(name, name): value for name, value in changed.items()}
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
