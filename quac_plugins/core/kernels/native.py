"""The one place that says whether a kernel may read a tensor, and C++ built by the compiler that torch.compile uses."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from quac_plugins.core.deprecated import warn_of
from quac_plugins.core.private import cpp_builder, hides_memory

CHOICES = ("auto", "plain", "native")
_OLD = {"reference": "plain", "fused": "native"}
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
broken: set[str] = set()
"""Kinds of devices whose compiler failed."""
_OWN = {Tensor, nn.Parameter}


def kernels_choice() -> str:
    """Return the value of ``QUAC_KERNELS``: ``"auto"``, ``"plain"`` (no kernels) or ``"native"`` (kernels of any size).

    Raises:
        ValueError: the variable has another value.

    Example:
        >>> kernels_choice() in CHOICES
        True
    """
    if "QUAC_KERNELS" not in os.environ:  # asked at every activation, and the fastest to ask
        return "auto"
    choice = os.environ["QUAC_KERNELS"] or "auto"
    if choice in _OLD:
        warn_of(f"QUAC_KERNELS={choice}", f"QUAC_KERNELS={_OLD[choice]}")
        choice = _OLD[choice]
    if choice not in CHOICES:
        raise ValueError(f"QUAC_KERNELS must be one of {', '.join(CHOICES)}, got {choice!r}")
    return choice


def in_graph() -> bool:
    """Return whether any thread is making a graph; a graph gets the plain expression."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def may_read(x: Tensor, *others: Tensor, large: bool = True) -> bool:
    """Return whether a kernel may and should read the memory of these tensors.

    A graph gets the plain expression, which its compiler fuses with the neighbouring operations. So do subclasses of
    tensors, and code inside a mode or a transform that sees operations. ``QUAC_KERNELS`` may forbid kernels.

    Args:
        x: decides on the device; all must be on it.
        others: further tensors that the kernel reads.
        large: whether x has so many numbers that a kernel saves time.
    """
    return not in_graph() and _reads(x, *others, large=large)


def reads(x: Tensor, *others: Tensor, large: bool = True) -> bool:
    """Do the same as :func:`may_read`, inside functions that compilers do not enter."""
    choice = kernels_choice()
    if choice == "plain" or not (large or choice == "native") or x.dtype not in DTYPES:
        return False
    tensors = (x, *others)
    device = x.device
    if not _OWN.issuperset(map(type, tensors)) or device.type not in ("cpu", "cuda"):
        return False
    return {t.device for t in tensors} == {device} and not hides_memory(*tensors)


_reads = torch.compiler.disable(reads)  # compilers do not know it, and may meet it as a frame of its own


class WrongNumbersError(Exception):
    """A built kernel computes other numbers than the plain expression."""


def built_or_none(kind: str, what: str, build: Callable[[], Any]) -> Any:
    """Return what ``build`` returns; where no compiler works or a kernel is wrong, warn once and return None.

    Args:
        kind: the kind of device, ``"cpu"`` or ``"cuda"``.
        what: the computation that is slow without the kernel, for the warning.
        build: builds the kernel and tries it on a few numbers; raises :class:`WrongNumbersError`.
    """
    if kind in broken:
        return None
    try:
        return build()
    except WrongNumbersError as error:
        reason = f"are wrong on this machine and left out: {error}"
    except Exception as error:  # whatever a machine without a compiler raises
        broken.add(kind)
        lines = str(error).strip().splitlines() or [""]
        line = next((line for line in lines if "error:" in line), lines[0])
        compiler = "a C++ compiler" if kind == "cpu" else "Triton"
        reason = f"could not be compiled (is {compiler} installed?): {type(error).__name__}: {line}"
    warnings.warn(f"{what} {reason}; what runs instead takes several times as long", stacklevel=4)
    return None


def load(arguments: list[str], source: str) -> Callable[..., None]:
    """Build the function ``kernel(arguments)`` of a C++ source; torch keeps the library on disk.

    Args:
        arguments: C declarations, ``"const float* x"`` (a tensor is passed) or ``"const int64_t n"``.
        source: C++ with vectors of ``at::vec``; its ``{arguments}`` is filled in.

    Raises:
        RuntimeError: this version of torch does not build C++ in the way that is known here.
    """
    types = [argument.rpartition(" ")[0] for argument in arguments]
    return cpp_builder().load_pybinding(types, source.replace("{arguments}", ", ".join(arguments)))
