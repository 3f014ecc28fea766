"""What compiled code asks of a context: graphs cannot read thread-local storage, so operators do, when the graphs run.

Within the graph of the tap q is a value like any other. The operator ``keep_q`` hands it to the thread that runs the
graph, for activations which are not in it, and ``current_q`` gives it to another graph. Neither is in what
``torch.export`` makes.
"""

from __future__ import annotations

import sys
import threading
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

_noted = threading.local()


@torch.compiler.assume_constant_result
def _in_export() -> bool:
    """Whether dynamo traces for ``torch.export``; torch 2.6 does not say so."""
    frame: Any = sys._getframe()
    while frame is not None and "torch/export/" not in frame.f_code.co_filename.replace("\\", "/"):
        frame = frame.f_back
    return frame is not None


is_exporting = getattr(torch.compiler, "is_exporting", _in_export)


@torch.compiler.assume_constant_result
def is_in_graph(handle: int) -> bool:
    """While a graph is traced: whether the tap of a context is in it, before; of ~handle: whether it calls the model.

    Runs then, not when the graph runs.
    """
    return handle in _noted.__dict__.setdefault("handles", set())


@torch.compiler.assume_constant_result
def note_in_graph(handle: int, there: bool) -> bool:
    """While a graph is traced: note it. What runs afterwards, compiled or not, is another graph."""
    handles = _noted.__dict__.setdefault("handles", set())
    (handles.add if there else handles.discard)(handle)
    return there


@lru_cache(maxsize=1)
def define_operators() -> None:
    """``torch.ops.quac_plugins``; made with the first context, since making them costs a third of an import."""
    from quac_plugins.core.quality.context import context_of  # which cannot be imported before

    def keep_q(q: Tensor, given: Tensor | None, handle: int, fixed: bool, whole: bool) -> Tensor:
        """Start a forward pass of this thread with q, or with what the thread was given in its place."""
        return context_of(handle).keep(q, given, fixed, whole)

    def current_q(like: Tensor, x: Tensor, handle: int, layer: str, differentiated: bool) -> Tensor:
        """The q that belongs to x in this thread; ``like`` has its shape, and is it where gradients reach q."""
        return context_of(handle).lend(like, x, layer, differentiated)

    # a recorded CUDA graph would replay what it did, and not ask again
    tags: dict[str, Any] = {"tags": (torch.Tag.cudagraph_unsafe,)} if hasattr(torch.Tag, "cudagraph_unsafe") else {}
    keep = torch.library.custom_op("quac_plugins::keep_q", keep_q, mutates_args=(), **tags)
    keep.register_fake(lambda q, given, handle, fixed, whole: torch.empty_like(q))
    keep.register_autograd(lambda ctx, grad: (grad, None, None, None, None))
    current = torch.library.custom_op("quac_plugins::current_q", current_q, mutates_args=(), **tags)
    current.register_fake(lambda like, x, handle, layer, differentiated: torch.empty_like(like))
    current.register_autograd(lambda ctx, grad: (grad, None, None, None, None))
