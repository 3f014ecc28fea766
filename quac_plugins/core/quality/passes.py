"""The forward pass that a part of a model works for: the part goes on with the pass of its input.

So the model and its parts (its children, and those of its lists and chains) tell what they are called with and what
they return:

1. what runs inside a call goes on with the pass that the call began, or was recognized as going on with;
2. what a part or the model returned is known by its identity, so ``fa = m.forward_features(a)``, ``fb =
   m.forward_features(b)``, ``m.forward_head(fa)`` is right;
3. where other code has made the input of it, the thread's current pass goes on, unless another may: one that has begun
   and in which the site has not run more often. A graph tells which sites are in it (:mod:`compiled`), so that passes
   which begin in compiled code are told apart as others are;
4. a pass ends with the call of the whole model in which it began, and none is current then. A compiled call is not seen
   to end;
5. where 3 does not tell, autograd's graph does, or nobody, which is an error. So it is where the two disagree.

What 3 takes for the newer pass's: a part that is called *again* on an older pass's features, which other code has
changed without gradients, before it is called on the newer's.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch import Tensor, nn

_MOST = 32  # passes of a thread that are told apart while they may go on; of older ones, what any may wait for


class Pass(Protocol):
    """The protocol of a forward pass."""

    ran: dict[str, int]
    """How often each site, by its name, has run in it."""


class _Level:
    """A call of the model or a part that is running."""

    __slots__ = ("began", "known", "mixed", "open", "part", "whole")

    def __init__(self, part: nn.Module, whole: bool, known: bool, others: list[dict[str, int]]):
        self.part = part
        self.whole = whole  # of the model itself: what begins inside ends inside
        self.known = known  # whatever runs in it now belongs to the thread's current pass
        self.open = others  # passes that may go on after it, if it is whole
        self.mixed = False  # it was given what came from several
        self.began = 0  # passes


class _Thread(threading.local):
    def __init__(self) -> None:
        self.levels: list[_Level] = []
        self.open: list[dict[str, int]] = []  # what has run in each pass that may go on
        self.current: Any = None  # the pass that goes on


class Passes:
    """The forward passes of one context; each thread has its own."""

    def __init__(self) -> None:
        self._thread = _Thread()
        self._marks: dict[int, tuple[weakref.ref[Tensor], Pass]] = {}

    @property
    def current(self) -> Any:
        """Return the current pass of this thread, or None."""
        return self._thread.current

    @current.setter
    def current(self, new: Any) -> None:
        self._thread.current = new

    @property
    def several(self) -> bool:
        """Return whether this thread has passes that may go on."""
        return bool(self._thread.open)

    # -- told by the model and its parts; ``given``: the thread is inside use_q, so there is nothing to find out

    def enter(self, part: nn.Module, args: Any, whole: bool, by_hand: bool) -> None:
        """Note that a call begins."""
        thread = self._thread
        at = next((i for i, level in enumerate(thread.levels) if level.part is part), None)
        if at is not None:  # the call before was broken off from outside
            self._end(at, by_hand)
        known = by_hand or (bool(thread.levels) and thread.levels[-1].known)
        level = _Level(part, whole, known, thread.open)
        thread.levels.append(level)
        if known:
            return
        if whole:
            thread.current = None  # no image has reached it yet
            return
        passes = self.known(args)
        level.mixed = len(passes) > 1
        if len(passes) == 1:
            self._recognized(passes[0])

    def leave(self, part: nn.Module, output: Any, by_hand: bool) -> None:
        """Note that a call ends; its output belongs to the thread's current pass, if that is known."""
        thread = self._thread
        at = next((i for i in reversed(range(len(thread.levels))) if thread.levels[i].part is part), None)
        if at is None:
            return
        current, known = thread.current, thread.levels[at].known
        self._end(at, by_hand)
        if known and current is not None and (not thread.levels or thread.levels[-1].whole):
            for tensor in _tensors(output):
                self._mark(tensor, current)

    def _end(self, at: int, by_hand: bool) -> None:
        """End the call at this level, and the calls inside it."""
        thread = self._thread
        for level in thread.levels[at:]:
            if level.whole:
                thread.open = level.open
                thread.current = thread.current if by_hand else None
        del thread.levels[at:]

    def begin(self, new: Pass, waits: bool = True) -> None:
        """Begin a pass of this thread; ``waits``: outputs of its parts may be given to other parts later."""
        thread = self._thread
        for level in thread.levels:
            level.began += 1
            level.known = level.began == 1  # of two passes in one call, who knows whose what comes next is
        thread.current = new
        if waits:
            thread.open = [*thread.open, new.ran]
        if len(thread.open) > _MOST:
            first, second, *rest = thread.open
            thread.open = [{site: min(times, second.get(site, 0)) for site, times in first.items()}, *rest]

    # -- asked by a site

    def of(self, x: Tensor, layer: str, marks: Callable[[Tensor], Any]) -> Any:
        """Return the pass that the input x of a running site belongs to; None: there is none, or it cannot be told.

        Args:
            x: the input of the site.
            layer: the name of the site.
            marks: returns the passes to which the autograd graph of a tensor leads.
        """
        thread = self._thread
        current = thread.current
        if not (thread.levels and thread.levels[-1].known):
            known = self.known(x)
            current = known[0] if known else self._by_counts(layer, marks(x))
            if current is not None:
                self._recognized(current)
        if current is not None:
            current.ran[layer] = current.ran.get(layer, 0) + 1
        return current

    def _by_counts(self, layer: str, marks: Any) -> Any:
        """Decide by how often the site has run, and by the marks: rules 3 to 5 of the module's docstring."""
        current = self._thread.current
        graph = next(iter(marks)) if len(marks) == 1 else None
        if current is None:
            return graph
        times = current.ran.get(layer, 0)
        if any(ran is not current.ran and ran.get(layer, 0) <= times for ran in self._thread.open):
            return graph
        return current if graph is None or graph is current else None

    def _recognized(self, current: Any) -> None:
        """Note that the running code, and the input of the parts around it, belong to one pass."""
        self._thread.current = current
        for level in reversed(self._thread.levels):
            if level.whole or level.mixed or level.known:
                break
            level.known = True

    # -- tensors; notes on themselves would be copied and saved with them

    def known(self, value: Any) -> list[Any]:
        """Return the passes that the tensors in a value are known to come from."""
        passes = {}
        for tensor in _tensors(value):
            reference, mark = self._marks.get(id(tensor), (None, None))
            if reference is not None and reference() is tensor:
                passes[id(mark)] = mark
        return list(passes.values())

    def _mark(self, tensor: Tensor, current: Pass) -> None:
        key, marks = id(tensor), self._marks

        def forget(gone: weakref.ref[Tensor]) -> None:
            if key in marks and marks[key][0] is gone:
                del marks[key]

        marks[key] = weakref.ref(tensor, forget), current


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if not isinstance(value, nn.Parameter):
            yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def parts_of(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that a caller uses when it calls a model in pieces."""
    for child in model.children():
        yield child
        if isinstance(child, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            yield from parts_of(child)
