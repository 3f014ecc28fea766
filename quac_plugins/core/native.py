"""C++ built by the compiler that torch.compile uses, and the one place that says whether kernels are used."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import torch

CHOICES = ("auto", "reference", "fused")
broken: set[str] = set()
"""Kinds of devices whose compiler failed."""


def kernels_choice() -> str:
    """``QUAC_KERNELS``: ``"auto"``, ``"reference"`` or ``"fused"``.

    Raises:
        ValueError: it is something else.

    Example:
        >>> kernels_choice() in CHOICES
        True
    """
    if "QUAC_KERNELS" not in os.environ:  # asked at every activation, and the fastest to ask
        return "auto"
    choice = os.environ["QUAC_KERNELS"] or "auto"
    if choice not in CHOICES:
        raise ValueError(f"QUAC_KERNELS must be one of {', '.join(CHOICES)}, got {choice!r}")
    return choice


def load(arguments: list[str], source: str) -> Callable[..., None]:
    """The function ``kernel(arguments)`` of a source, built at its first use and kept on disk by torch.

    Args:
        arguments: C declarations, ``"const float* x"`` (a tensor is passed) or ``"const int64_t n"``.
        source: C++ with vectors of ``at::vec``; its ``{arguments}`` is filled in.
    """
    from torch._inductor.codecache import CppPythonBindingsCodeCache

    types = [argument.rpartition(" ")[0] for argument in arguments]
    return CppPythonBindingsCodeCache.load_pybinding(types, source.replace("{arguments}", ", ".join(arguments)))


def compiled_or(kind: str, what: str, compiled: Callable[[], Any], plain: Callable[[], Any]) -> Any:
    """What ``compiled`` returns; where no compiler works, which is told once, what ``plain`` returns.

    Args:
        kind: of device, ``"cpu"`` or ``"cuda"``.
        what: is slow then, for the warning.
    """
    if kind not in broken:
        try:
            return compiled()
        except torch.OutOfMemoryError:  # uncompiled it would need more
            raise
        except Exception as error:  # whatever a machine without a compiler raises
            broken.add(kind)
            lines = str(error).strip().splitlines() or [""]
            reason = next((line for line in lines if "error:" in line), lines[0])
            warnings.warn(
                f"{what} could not be compiled and run uncompiled, several times slower (is "
                f"{'a C++ compiler' if kind == 'cpu' else 'Triton'} installed?): {type(error).__name__}: {reason}",
                stacklevel=3,
            )
    return plain()
