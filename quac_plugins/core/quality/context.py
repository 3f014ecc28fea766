"""The context: how q travels from the tap on the first layer to the activations, which are called with x alone.

Requirements, all checked in the tests:

1. several threads through one model do not see each other's q: in eager mode q is kept per thread;
2. ``torch.compile(fullgraph=True)`` and ``torch.export`` cannot trace thread-local storage: within one graph q is a
   plain value, and operators hand it to the running thread and ask for it there (:mod:`compiled`). Plain attributes
   say nothing about whose q it is: they show a graph its shape, or carry a gradient after they were recognized;
3. ``deepcopy``, ``pickle`` and ``torch.save`` carry the wiring but never a q;
4. under activation checkpointing a recomputation runs during backward, when the q of another forward may be current.
   Every forward therefore leaves a mark in the autograd graph, and a recomputation follows its input's graph back to
   the mark. Where no graph leads back (reentrant checkpointing), the one forward whose graph is alive is meant; if
   there are several, it is an error, never a guess. A tap that is itself recomputed goes on with the forward that its
   images began. The graph of what compiled code makes has no marks, so where it may lead past such a forward, to what
   that one's images were made from, it is not followed.

Whose q a part of a model takes is said by :mod:`passes`.
"""

from __future__ import annotations

import gc
import itertools
import threading
import weakref
from collections import deque
from typing import Any

import torch
from torch import Tensor, nn

from quac_plugins.core.graphs import compiling
from quac_plugins.core.private import in_backward
from quac_plugins.core.quality.compiled import define_operators, is_exporting, note_graph, note_site, note_tap
from quac_plugins.core.quality.passes import Passes


class QualityError(RuntimeError):
    """An activation has no quality feature that belongs to its input."""


class _Forward:
    """The q of one forward pass; autograd nodes of that pass hold it, so it lives as long as its graph."""

    __slots__ = (
        "__weakref__", "anchored", "by_hand", "exported", "fixed", "grad_enabled", "images", "lent", "order", "q",
        "ran", "recomputations",
    )  # fmt: skip
    _count = itertools.count()

    def __init__(self, q: Tensor, images: Tensor | None = None, by_hand: bool = False):
        self.q = q
        self.images = weakref.ref(images) if images is not None else None
        self.by_hand = by_hand
        self.order = next(self._count)
        self.ran: dict[str, int] = {}
        self.grad_enabled = torch.is_grad_enabled()
        self.anchored = False  # the tap's layer has a gradient, so every graph of this pass leads to its mark
        self.recomputations = 0  # sites run under no_grad inside a forward with grad: reentrant checkpoints
        self.exported = compiling()  # by torch.export, which runs the code on tensors without data
        self.fixed = False  # given inside of compiled code, and only there
        self.lent: Tensor | None = None  # q as a graph returned it, where it has a gradient


def _same(images: Tensor | None, others: Tensor) -> bool:
    """Return whether both are one tensor, or the detached copy that reentrant checkpointing makes."""
    if images is None or images is others:
        return images is others
    form = images.shape == others.shape and images.stride() == others.stride() and images.device == others.device
    return form and images.data_ptr() == others.data_ptr() != 0


def _metadata(node: Any) -> dict[str, Any]:
    """Return the dict of an autograd node, which lives as long as the node."""
    return node.metadata


_handles = itertools.count()
_contexts: weakref.WeakValueDictionary[int, QualityContext] = weakref.WeakValueDictionary()


def context_of(handle: int) -> QualityContext:
    """Return the context that compiled code knows by its handle."""
    return _contexts[handle]


class _Gift:
    """A q that a thread gave by hand."""

    __slots__ = ("gifts", "q")

    def __init__(self, q: Tensor, gifts: list[_Gift]):
        self.q = q
        self.gifts = gifts  # of the thread


class QualityContext:
    """Shared by one tap and the activations of one model.

    Args:
        channels: Q, the width of the quality features that it carries.
        tap: name of the layer whose tap writes, for errors.
    """

    def __init__(self, channels: int, tap: str = ""):
        self.channels = channels
        self.tap = tap
        self._reset()

    def _reset(self) -> None:
        self.q: Tensor | None = None  # the latest of any thread; see requirement 2
        self.given: Tensor | None = None  # likewise, while a thread is inside use_q
        self._given_here = False  # while tracing: it was given in the code that is traced
        self._gifts: list[_Gift] = []  # of all threads
        # by thread, while it lives: its latest q was given, so a recomputed tap must not compute one
        self._gave: weakref.WeakKeyDictionary[threading.Thread, bool] = weakref.WeakKeyDictionary()
        self._local = threading.local()
        self._lock = threading.Lock()
        self._alive: weakref.WeakSet[_Forward] = weakref.WeakSet()
        self._reentrant: deque[_Forward] = deque(maxlen=64)
        self._tap: weakref.ref[nn.Module] | None = None
        self._passes = Passes()
        self._unmarked = -1  # order of the latest pass whose graph leads, by no mark, to what its images were made from
        define_operators()
        self._handle = next(_handles)  # how compiled code names this context
        _contexts[self._handle] = self

    def __getstate__(self) -> dict[str, Any]:
        return {"channels": self.channels, "tap": self.tap}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.channels, self.tap = state["channels"], state["tap"]
        self._reset()

    def __deepcopy__(self, memo: dict[int, Any]) -> QualityContext:
        memo[id(self)] = copied = type(self)(self.channels, self.tap)
        return copied

    # -- written by the tap

    def given_q(self) -> Tensor | None:
        """Return the q of :func:`use_q`, if this thread is inside one, else None; a graph asks again when it runs."""
        if torch.compiler.is_dynamo_compiling():
            return self.given
        gifts: list[_Gift] = self._local.__dict__.get("gifts", [])
        return gifts[-1].q if gifts else None

    def watch(self, tap: nn.Module) -> None:
        """Remember the tap that writes: once its layer is replaced and the tap gone, its last q is not used."""
        if not compiling():
            self._tap = weakref.ref(tap)

    def begin(self, q: Tensor, images: Tensor | None = None) -> None:
        """Start a forward pass whose quality features are q (B, Q)."""
        if torch.compiler.is_dynamo_compiling():
            if not is_exporting():
                q_by_hand = None if self._given_here else self.given
                descends = images is not None and images.requires_grad
                graph = note_tap(self._handle)
                q = torch.ops.quac_plugins.keep_q(q, q_by_hand, self._handle, graph, self._given_here, descends)
            else:
                note_tap(self._handle)
            self.q = q
            return
        self.q = q
        forward = _Forward(q, images, self.given_q() is not None)
        self._start(forward)
        if images is not None and images.grad_fn is not None and torch.is_grad_enabled() and not torch.jit.is_tracing():
            _metadata(images.grad_fn)[self._key] = forward  # what else is made of them is not what they were made from

    def keep(self, q: Tensor, q_by_hand: Tensor | None, ran: dict[str, int], fixed: bool, descends: bool) -> Tensor:
        """Start a forward pass of the thread that runs a graph, and return its q: that of the graph, or the thread's.

        Args:
            q: the q in the graph, (B, Q).
            q_by_hand: the q that any thread gave by hand when the graph started, or None.
            ran: site name → how often the site runs in the graph.
            fixed: code inside the graph gave q.
            descends: the images may have been made by another pass, with gradients.
        """
        thread_q = None if fixed else self.given_q()
        unequal = q_by_hand is None or thread_q is None or not _same(q_by_hand, thread_q)
        if q_by_hand is not thread_q and unequal:
            if thread_q is None or thread_q.shape != q.shape or q.requires_grad:
                raise QualityError(
                    f"layer {self.tap!r} is compiled, and threads gave its model different quality features by hand, "
                    "or one none, which compiled code cannot tell apart. Call the model uncompiled inside "
                    "`with use_q(…)`, or give each thread a copy"
                )
            q = thread_q.to(q)
        forward = _Forward(q.detach().clone(), by_hand=fixed or thread_q is not None)
        forward.fixed, forward.ran = fixed, dict(ran)
        if descends:
            self._unmarked = forward.order
        if in_backward():  # the tap is recomputed
            matches = [f for f in self._waiting() if f.q.shape == q.shape and torch.equal(f.q, q)]
            forward = matches[0] if matches else forward
        self._start(forward)
        lent = q.clone()
        forward.lent = lent if lent.requires_grad or q.requires_grad else None
        return lent

    def resume(self, images: Tensor, layer: str) -> bool:
        """If the tap's layer is recomputed during backward, go on with the forward pass that these images began."""
        if compiling() or not in_backward():
            return False
        matches = [f for f in self._waiting() if f.images is not None and _same(f.images(), images)]
        if matches and all(f.q.shape == matches[0].q.shape and torch.equal(f.q, matches[0].q) for f in matches[1:]):
            self._start(matches[0])
            return True
        was_given = self._gave.get(
            threading.current_thread(), any(self._gave.copy().values())
        )  # autograd has threads of its own
        if matches or (was_given and self.given_q() is None):
            raise QualityError(
                f"layer {layer!r} is recomputed by activation checkpointing, after quality features were given by "
                "hand, and it cannot be told whether these are its own. Call backward inside `with use_q(…)`, or "
                "use non-reentrant checkpointing (use_reentrant=False) and one tensor of images for one forward."
            )
        return False

    def _start(self, forward: _Forward) -> None:
        self._local.forward = forward  # begun last, or recomputed last
        if not in_backward():
            self._gave[threading.current_thread()] = forward.by_hand
            self._passes.begin(forward, not (forward.by_hand or forward.exported))
        note_graph(self._handle, 0)
        with self._lock:
            self._alive.add(forward)

    def _candidates(self) -> list[_Forward]:
        """Return the forward passes that a recomputation may belong to; the latest alone if all have the same q."""
        forwards = sorted(self._waiting(), key=lambda forward: forward.order)
        alike = all(f.q.shape == forwards[0].q.shape and torch.equal(f.q, forwards[0].q) for f in forwards[1:])
        return forwards[-1:] if alike else forwards

    def _waiting(self) -> list[_Forward]:
        """Return the forward passes that a recomputation may belong to."""
        with self._lock:
            return list({id(f): f for f in [*self._alive, *self._reentrant]}.values())

    def _give(self, q: Tensor) -> tuple[_Gift, _Forward | None]:
        """Give this thread a q, and return the arguments of :meth:`_take_back`."""
        gifts: list[_Gift] = self._local.__dict__.setdefault("gifts", [])
        gift, before = _Gift(q, gifts), self._passes.current
        gifts.append(gift)
        with self._lock:
            self._gifts.append(gift)
            self.given = q
        self.begin(q)
        return gift, before

    def _take_back(self, gift: _Gift, before: _Forward | None) -> None:
        """End a :meth:`_give`; calls may end in any order, as generators do."""
        was_last = gift.gifts[-1] is gift
        gift.gifts.remove(gift)
        with self._lock:
            self._gifts.remove(gift)
            self.given = self._gifts[-1].q if self._gifts else None
        if was_last and gift.gifts is self._local.__dict__.get("gifts"):
            # an outer use_q goes on; a finished forward pass does not become current again
            self._passes.current = before if gift.gifts else None

    # -- told by the model and its parts

    def enter(self, part: nn.Module, args: Any, whole: bool) -> None:
        """Note the start of a call of the model (``whole``) or of a part of it, with these arguments."""
        if not compiling() and not in_backward():
            self._passes.enter(part, args, whole, self.given_q() is not None)

    def leave(self, part: nn.Module, output: Any) -> None:
        """Note the end of a call of the model or of a part, with its output."""
        if not compiling() and not in_backward():
            self._passes.leave(part, output, self.given_q() is not None)

    def go_on(self, output: Any) -> None:
        """Let the next code belong to the pass of the model's ``output``, or to the latest pass if none is known."""
        if compiling() or in_backward() or self.given_q() is not None:
            return
        passes = self._passes.known(output) or [getattr(self._local, "forward", None)]
        self._passes.current = passes[0] if len(passes) == 1 else None

    # -- read by the activations

    def current(self, x: Tensor, layer: str) -> Tensor:
        """Return the q (B, Q) of the forward pass of x; a QualityError names ``layer`` if there is none."""
        if torch.compiler.is_dynamo_compiling():
            if self.q is None:
                raise QualityError(self._no_image(layer))
            if note_site(self._handle, layer):
                return self.q
            differentiated = self.q.requires_grad and torch.is_grad_enabled()
            return torch.ops.quac_plugins.current_q(self.q, x, self._handle, layer, differentiated)
        forward = self._forward_of(x, layer)
        if forward.lent is not None and torch.is_grad_enabled():
            return self._differentiated(forward, self.q, layer)
        return forward.q

    def lend(self, like: Tensor, x: Tensor, layer: str, differentiated: bool) -> Tensor:
        """Return the q of :meth:`current` to a running graph; ``like`` is the graph's q, maybe of other images."""
        forward = self._forward_of(x, layer)
        q = self._differentiated(forward, like, layer) if differentiated else forward.q
        if q.shape != like.shape or q.dtype != like.dtype:
            raise QualityError(
                f"layer {layer!r} is compiled apart from the layer that sees the images, and another thread uses the "
                f"model with another batch (q {tuple(q.shape)}, there {tuple(like.shape)}). Compile the whole model, "
                "or give each thread a copy."
            )
        return q.clone()

    def _differentiated(self, forward: _Forward, q: Tensor | None, layer: str) -> Tensor:
        """Return q with its gradient, if q is the one of the forward pass."""
        if q is None or not _same(q, forward.lent if forward.lent is not None else forward.q):
            raise QualityError(
                f"layer {layer!r} and the layer that sees the images are not in one compiled graph, gradients are to "
                "reach the quality features, and another forward pass came in between, so they would go to that one's. "
                "Compile the whole model with fullgraph=True, or none of it"
            )
        return q

    def _forward_of(self, x: Tensor, layer: str) -> _Forward:
        """Return the forward pass that x belongs to; QualityError if it cannot be told."""
        if in_backward():
            return self._recomputed(x, layer)
        if self._tap is not None and self._tap() is None:
            raise QualityError(self._no_image(layer))
        forward: _Forward | None = self._passes.current
        is_given = self.given_q() is not None
        if not is_given and not (forward is not None and forward.exported):
            forward = self._passes.of(x, layer, self._marks)
            if forward is None and self._passes.several:
                raise QualityError(
                    f"layer {layer!r} is called in a part of a model that has begun with several batches of images, "
                    "and it cannot be told which of them its input came from. Call the model as a whole, go on with "
                    "one batch before the next begins, give the parts what other parts have returned, unchanged, or "
                    "give the quality features: `with quac_plugins.use_q(model, q): …`"
                )
        if forward is None or forward.exported != compiling() or (forward.fixed and not is_given):
            raise QualityError(self._no_image(layer))
        if forward.grad_enabled and not forward.anchored and not torch.is_grad_enabled():
            forward.recomputations += 1
            with self._lock:
                if forward not in self._reentrant:
                    self._reentrant.append(forward)
        return forward

    def mark(self, output: Any, tap: bool = False) -> None:
        """Leave the current forward pass in the autograd graph of ``output``, for recomputations to find.

        Args:
            output: the output of a layer.
            tap: the layer is the tapped one, which has just begun the forward pass.
        """
        if compiling() or torch.jit.is_tracing():
            return
        if not isinstance(output, Tensor) or output.grad_fn is None:
            return
        forward = self._lineage(output) if in_backward() and not tap else None
        if forward is None:
            forward = getattr(self._local, "forward", None) if in_backward() else self._passes.current
        if forward is not None:
            _metadata(output.grad_fn)[self._key] = forward
            forward.anchored |= tap

    @property
    def _key(self) -> str:
        return f"quac_plugins.{id(self)}"

    def _lineage(self, x: Tensor) -> _Forward | None:
        """Return the pass of the latest mark up the autograd graph of x: images may come from an earlier pass."""
        return max(self._marks(x), key=lambda forward: forward.order, default=None)

    def _marks(self, x: Tensor) -> set[_Forward]:
        """Return the nearest marks up the autograd graph of x, without marks that say nothing."""
        marks: set[_Forward] = set()
        if x.grad_fn is None:
            return marks
        queue, seen = deque([x.grad_fn]), {x.grad_fn}
        while queue:
            node = queue.popleft()
            mark = _metadata(node).get(self._key)
            if mark is not None:
                marks.add(mark)
                continue
            for parent, _ in node.next_functions:
                if parent is not None and parent not in seen:
                    seen.add(parent)
                    queue.append(parent)
        return {forward for forward in marks if forward.order >= self._unmarked}

    def _recomputed(self, x: Tensor, layer: str) -> _Forward:
        forward = self._lineage(x)
        if forward is None:
            candidates = self._candidates()
            if len(candidates) > 1:  # graphs that nobody can use any more may still wait for the garbage collector
                del candidates
                gc.collect()
                candidates = self._candidates()
            if not candidates:
                raise QualityError(self._no_image(layer))
            if len(candidates) > 1:
                raise QualityError(
                    f"layer {layer!r} is recomputed by activation checkpointing, and {len(candidates)} forward passes "
                    "of this model are in memory, so it cannot be told whose quality features it needs. Use "
                    "non-reentrant checkpointing (use_reentrant=False) behind a layer that has a gradient, or call "
                    "backward before the next forward, also before one without gradients."
                )
            forward = candidates[0]
        with self._lock:
            forward.recomputations -= 1
            if forward.recomputations <= 0 and forward in self._reentrant:
                self._reentrant.remove(forward)
        return forward

    def _no_image(self, layer: str) -> str:
        return (
            f"layer {layer!r} was called before any image reached the model, or on its own after the model's call had "
            "ended with what no part of it returned, so there are no quality features. They are computed where layer "
            f"{self.tap or 'the model itself'!r} is called (if it was replaced, remove QuAC and inject it again; a "
            "copy of a part of a model is without it). Call the model on images, or give the features: `with "
            "quac_plugins.use_q(model, q): …`, model being whatever is called, also such a part, and q of shape "
            f"(B, {self.channels})."
        )
