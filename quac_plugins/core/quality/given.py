"""Quality features that are given by hand: ``with use_q(model, q): model(images)``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quac_plugins.core.quality.compiled import note_graph, traced_graph
from quac_plugins.core.quality.context import QualityContext


def contexts_of(model: nn.Module) -> list[QualityContext]:
    """Return every context in a model (one for each tap), in module order."""
    contexts: dict[int, QualityContext] = {}
    for module in model.modules():
        context = getattr(module, "context", None)
        if isinstance(context, QualityContext):
            contexts[id(context)] = context
    return list(contexts.values())


@contextmanager
def use_q(model: nn.Module, q: Tensor) -> Iterator[None]:
    """Give a model its quality features by hand: inside the ``with`` block, the tap does not compute them.

    Activations and a prior with different quality functions have a tap each. Then q replaces the features of the same
    width, and the other tap computes its own; nest two calls to give both.

    Args:
        model: a model with QuAC inside (also wrapped, as by DistributedDataParallel).
        q: (B, Q) or (B, Q, 1, 1), floating point.

    Raises:
        TypeError: q is not a tensor.
        ValueError: nothing in the model reads q, or nothing reads a q of this width.

    Example:
        >>> import torch, timm, quac_plugins
        >>> model = timm.create_model("test_resnet_qacon").eval()
        >>> with quac_plugins.use_q(model, torch.zeros(2, 36)):
        ...     model(torch.rand(2, 3, 64, 64)).shape
        torch.Size([2, 1000])
    """
    if not isinstance(q, Tensor):
        raise TypeError(f"q must be a tensor (B, Q), got {type(q).__name__}")
    contexts = contexts_of(model)
    if not contexts:
        raise ValueError(f"{type(model).__name__} has no QuAC inside that reads q; call quac_plugins.inject first")
    if q.ndim == 4 and q.shape[2:] == (1, 1):
        q = q.flatten(1)
    wanted = [c for c in contexts if q.ndim == 2 and q.shape[1] == c.channels and q.is_floating_point()]
    if not wanted:
        widths = " or ".join(f"(B, {width})" for width in dict.fromkeys(c.channels for c in contexts))
        raise ValueError(
            f"q has shape {tuple(q.shape)} and dtype {q.dtype}; this model expects floating point {widths}"
        )
    with quality_given([(context, q) for context in wanted]):
        yield


class quality_given:
    """Give each context its q (B, Q), unchecked: inside the ``with`` block their taps compute none. See :func:`use_q`.

    A class and not a generator, which torch 2.6 cannot compile.
    """

    def __init__(self, pairs: Iterable[tuple[QualityContext, Tensor]]):
        self.pairs = list(pairs)
        self.before: list[Any] = []

    def __enter__(self) -> None:
        if torch.compiler.is_dynamo_compiling():
            self.before = [(c.q, c.given, c._given_here, traced_graph(c._handle)) for c, _ in self.pairs]
            for context, q in self.pairs:
                context.given, context._given_here = q, True
                context.begin(q)
            return
        self.before = [context._give(q) for context, q in self.pairs]

    def __exit__(self, *error: object) -> None:
        if torch.compiler.is_dynamo_compiling():
            for (context, _), (q, q_by_hand, is_local, graph) in zip(self.pairs, self.before, strict=True):
                context.q, context.given, context._given_here = q, q_by_hand, is_local
                note_graph(context._handle, graph)
            return
        for (context, _), (gift, forward) in zip(self.pairs, self.before, strict=True):
            context._take_back(gift, forward)
