"""The operators of compiled code: graphs cannot read thread-local storage, so operators do while the graphs run.

Within the graph of the tap q is a value like any other. The operator ``keep_q`` hands it to the thread that runs the
graph, for activations which are not in it, and ``current_q`` gives it to another graph. Neither is in what
``torch.export`` makes.
"""

from __future__ import annotations

import itertools
import sys
import threading
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

_noted = threading.local()


@torch.compiler.assume_constant_result
def _in_export() -> bool:
    """Return whether dynamo traces for ``torch.export``, which torch 2.6 has no public name for."""
    frame: Any = sys._getframe()
    while frame is not None and "torch/export/" not in frame.f_code.co_filename.replace("\\", "/"):
        frame = frame.f_back
    return frame is not None


is_exporting = getattr(torch.compiler, "is_exporting", _in_export)


_graphs: dict[int, dict[str, int]] = {}
_numbers = itertools.count(1)


def sites_of(graph: int) -> dict[str, int]:
    """Return, for a graph with a tap, site name → how often the site runs after the tap."""
    return _graphs[graph]


# while a graph is traced; these run then, not when the graph runs


@torch.compiler.assume_constant_result
def traced_graph(handle: int) -> int:
    """Return the number of the traced graph, if it already holds the tap of the context; else 0."""
    return _noted.__dict__.setdefault("numbers", {}).get(handle, 0)


@torch.compiler.assume_constant_result
def note_graph(handle: int, number: int) -> int:
    """Set the number of the traced graph; 0: the next code, compiled or not, is another graph."""
    _noted.__dict__.setdefault("numbers", {})[handle] = number
    return number


@torch.compiler.assume_constant_result
def note_tap(handle: int) -> int:
    """Note that a tap is traced, and return the new number of its graph."""
    number = next(_numbers)
    _graphs[number] = {}
    return note_graph(handle, number)


@torch.compiler.assume_constant_result
def note_site(handle: int, layer: str) -> bool:
    """Note that a site is traced, and return whether its tap is in the same graph."""
    ran = _graphs.get(traced_graph(handle))
    if ran is not None:
        ran[layer] = ran.get(layer, 0) + 1
    return ran is not None


@lru_cache(maxsize=1)
def define_operators() -> None:
    """Define ``torch.ops.quac_plugins``, with the first context, since they cost a third of an import."""
    from quac_plugins.core.quality.context import context_of  # which cannot be imported before

    def keep_q(q: Tensor, q_by_hand: Tensor | None, handle: int, graph: int, fixed: bool, descends: bool) -> Tensor:
        """Start a forward pass of this thread with q, or with what the thread was given in its place."""
        return context_of(handle).keep(q, q_by_hand, sites_of(graph), fixed, descends)

    def current_q(like: Tensor, x: Tensor, handle: int, layer: str, differentiated: bool) -> Tensor:
        """Return this thread's q for x; ``like`` has the shape of q, and is q itself where gradients reach it."""
        return context_of(handle).lend(like, x, layer, differentiated)

    # a recorded CUDA graph would replay what it did, and not ask again
    tags: dict[str, Any] = {"tags": (torch.Tag.cudagraph_unsafe,)} if hasattr(torch.Tag, "cudagraph_unsafe") else {}
    keep = torch.library.custom_op("quac_plugins::keep_q", keep_q, mutates_args=(), **tags)
    keep.register_fake(lambda q, q_by_hand, handle, graph, fixed, descends: torch.empty_like(q))
    keep.register_autograd(lambda ctx, grad: (grad, *[None] * 5))
    current = torch.library.custom_op("quac_plugins::current_q", current_q, mutates_args=(), **tags)
    current.register_fake(lambda like, x, handle, layer, differentiated: torch.empty_like(like))
    current.register_autograd(lambda ctx, grad: (grad, None, None, None, None))
