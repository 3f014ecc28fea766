"""Which forward pass a part of a model works for, when several are under way in one thread.

Whoever calls a model in pieces may have two of them open: ``fa = m.forward_features(a)``, ``fb =
m.forward_features(b)``, ``m.forward_head(fa)``. So the model and its parts (its children, and those of its lists and
chains) tell what they are called with and what they return, and a part goes on with the pass that its input came from.
Where that is not known, since other code has touched the input, passes are told apart by what has run in each: none
that has come further than the current one waits for this part. Where that does not tell either, autograd's graph does,
or nobody, which is an error.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch import Tensor, nn

_MOST = 32  # passes of a thread that are remembered as unfinished


class Pass(Protocol):
    """What is asked of a forward pass."""

    order: int
    compiled: bool
    ran: dict[Any, int]
    """How often each site, by its name, and each part, by its id, has run in it."""


class _Level:
    """A call of the model or a part that is running."""

    __slots__ = ("began", "first", "known", "mixed", "part", "whole")

    def __init__(self, part: nn.Module, whole: bool, known: bool, first: int):
        self.part = part
        self.whole = whole  # of the model itself: what begins inside ends inside
        self.known = known  # whatever runs in it now belongs to the thread's current pass
        self.mixed = False  # it was given what came from several
        self.began = 0  # passes
        self.first = first  # order of the first of them


class _Thread(threading.local):
    def __init__(self) -> None:
        self.levels: list[_Level] = []
        self.open: list[tuple[int, bool, dict[Any, int]]] = []


class Passes:
    """The forward passes of one context; each thread has its own."""

    def __init__(self) -> None:
        self._thread = _Thread()
        self._marks: dict[int, tuple[weakref.ref[Tensor], Pass]] = {}

    # -- told by the model and its parts

    def enter(self, part: nn.Module, args: Any, whole: bool, order: int, current: Any) -> Any:
        """A call begins; returns the pass that goes on in it, as far as is known: the thread's current, or another."""
        levels = self._thread.levels
        for i, level in enumerate(levels):
            if level.part is part:  # the call before was broken off from outside
                del levels[i:]
                break
        level = _Level(part, whole, bool(levels) and levels[-1].known, order)
        levels.append(level)
        if level.known and current is not None:
            current.ran[id(part)] = current.ran.get(id(part), 0) + 1
        elif not level.known:
            found = {id(one): one for t in _tensors(args) if (one := self._of(t)) is not None}
            level.mixed = len(found) > 1
            if len(found) == 1:
                current = found.popitem()[1]
                self._recognized(current)
            elif not (found or self.missed() or current is None or self._is_doubtful(current, id(part))):
                self._recognized(current)
        return current

    def _recognized(self, current: Pass) -> None:
        """What runs now belongs to one pass, and so does the input of the parts around it."""
        for level in reversed(self._thread.levels):
            if level.whole or level.mixed or level.known:
                break
            level.known = True
            current.ran[id(level.part)] = current.ran.get(id(level.part), 0) + 1

    def leave(self, part: nn.Module, output: Any, current: Any) -> None:
        """A call ends; what it returns belongs to the thread's current pass, if that is known."""
        thread = self._thread
        at = next((i for i in reversed(range(len(thread.levels))) if thread.levels[i].part is part), None)
        if at is None:
            return
        level = thread.levels[at]
        del thread.levels[at:]
        if level.whole:
            thread.open = [one for one in thread.open if one[0] < level.first]
        elif level.known and current is not None and (not thread.levels or thread.levels[-1].whole):
            for tensor in _tensors(output):
                self._mark(tensor, current)

    def begun(self, new: Pass, finished: bool = False) -> None:
        """The thread has begun a pass; ``finished``: nothing of it is left to others."""
        thread = self._thread
        for level in thread.levels:
            level.began += 1
            level.known = level.began == 1  # of two passes in one call, who knows whose what comes next is
        if not finished:
            thread.open = [*thread.open[1 - _MOST :], (new.order, new.compiled, new.ran)]

    # -- asked by a site

    def missed(self) -> bool:
        """Whether the model has been called, and neither images nor what was made of some have been seen in it."""
        levels = self._thread.levels
        return bool(levels) and levels[0].whole and not (levels[0].known or levels[0].began or levels[-1].known)

    def of(self, current: Pass, x: Tensor, layer: str, lineage: Callable[[Tensor], Any]) -> Any:
        """The pass that x belongs to, in a site that runs; None: it cannot be told."""
        levels = self._thread.levels
        found: Any = current
        if not (levels and levels[-1].known):
            found = self._of(x) or (lineage(x) if self._is_doubtful(current, layer) else current)
            if found is None:
                return None
            self._recognized(found)
        found.ran[layer] = found.ran.get(layer, 0) + 1
        return found

    def _is_doubtful(self, current: Pass, key: Any) -> bool:
        """Whether another open pass has not come further than the current one, and may be the one that goes on."""
        times = current.ran.get(key, 0)
        # in those that begin in compiled code other things run uncompiled, so they are compared among themselves
        alike = [ran for _, compiled, ran in self._thread.open if compiled == current.compiled]
        return [ran for ran in alike if ran is not current.ran and ran.get(key, 0) <= times] != []

    # -- tensors; notes on themselves would be copied and saved with them

    def _of(self, tensor: Tensor) -> Any:
        found = self._marks.get(id(tensor))
        return found[1] if found is not None and found[0]() is tensor else None

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
        for one in value:
            yield from _tensors(one)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def parts_of(model: nn.Module) -> Iterator[nn.Module]:
    """What is called from outside when a model is called in pieces."""
    for child in model.children():
        yield child
        if isinstance(child, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            yield from parts_of(child)
