"""Labels on the tensors of a pass: where their channels and images are, and what they were computed from.

Each tensor that depends on the image carries one, which every operation hands on.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from quac_plugins.core.inject.detectors import TakenApart
from quac_plugins.core.private import is_fake

BATCH = 10007  # prime, larger than any axis of a network, so that it divides no other
_LOGGER = logging.getLogger("quac_plugins")
_LONG = 10.0  # seconds after which a pass says where it is


@dataclass(frozen=True)
class Label:
    """The known facts of a tensor that depends on the image."""

    batch: int  # axis that holds the images
    fold: str | None = None  # other things on that axis too: images outside ("interleave"), inside ("tile"), or "mixed"
    channel: int | None = None
    kernel: int | None = None  # of the last convolution (1 for linear), None after sums of branches and activations
    node: int = 0  # number of the tensor; 0 is the image, −1 what a tap makes of it, which is beside the host


class Labels(TorchDispatchMode):
    """Hands labels from the inputs of every operation to its outputs, numbers the outputs and counts the layers."""

    def __init__(self, batch: int):
        super().__init__()
        self.batch = batch
        self.layers = 0
        self.parents: list[tuple[int, ...]] = [()]  # of every numbered tensor,
        self.depths = [0]  # and the layers on the longest way to it
        self.uncounted = 0  # running modules whose layers are not the host's,
        self.unnumbered = 0  # and whose tensors are beside the host
        self.running: list[Any] = []
        self.began = self.told = time.monotonic()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._tell()
        _refuse_apart(func, args, self.batch)
        out = _result(func, args, kwargs or {})
        flat = [t for a in args for t in (a if isinstance(a, (list, tuple)) else (a,)) if isinstance(t, Tensor)]
        labelled = [t for t in flat if label_of(t) is not None]
        if labelled:
            name = func.overloadpacket.__name__.strip("_")
            layer = not self.uncounted and _is_layer(name, flat)
            self.layers += layer
            nodes = {label.node for t in labelled if (label := label_of(t)) is not None and label.node >= 0}
            parents = () if self.unnumbered else tuple(nodes)
            for tensor in out if isinstance(out, (list, tuple)) else (out,):
                if isinstance(tensor, Tensor):
                    self._hand_on(name, flat, labelled, args, tensor)
                    self._number(tensor, parents, layer)
        return out

    def _tell(self) -> None:
        """Print the progress of a long pass."""
        now = time.monotonic()
        if now - self.told > _LONG:
            self.told = now
            where = next((repr(call.name) for call in reversed(self.running) if call.name), "the host")
            _LOGGER.warning("looking at what the host's modules return: %.0f s so far, in %s", now - self.began, where)

    def _hand_on(self, name: str, flat: list[Tensor], labelled: list[Tensor], args: tuple, out: Tensor) -> None:
        axes = [i for i, size in enumerate(out.shape) if size and size % self.batch == 0]
        source = labelled[0]
        label = label_of(source)
        assert label is not None
        if not axes:
            return
        if name == "convolution":
            weight = flat[1]
            new = replace(label, channel=1, kernel=max(weight.shape[2:], default=1))
        elif name in ("mm", "addmm", "bmm", "baddbmm", "linear"):
            new = replace(label, channel=out.ndim - 1, kernel=1)
        elif "batch_norm" in name or "group_norm" in name:
            new = replace(label, channel=1) if out.ndim > 1 else label
        elif "layer_norm" in name:
            new = replace(label, channel=out.ndim - 1) if len(args[1]) == 1 else label
        elif name in ("permute", "transpose", "t"):
            new = self._permuted(name, label, args, out)
        elif name in ("view", "unsafe_view", "reshape", "expand", "squeeze", "unsqueeze", "as_strided", "clone"):
            new = self._reshaped(label, source, out)
        else:
            new = self._other(name, label, source, labelled, out)
        if new.batch not in axes:
            new = replace(new, batch=axes[0])
        if new.channel is not None and new.channel >= out.ndim:
            new = replace(new, channel=None)
        out._quac_label = new  # type: ignore[attr-defined]

    def _number(self, tensor: Tensor, parents: tuple[int, ...], layer: bool) -> None:
        label = label_of(tensor)
        if label is not None:
            tensor._quac_label = replace(label, node=len(self.parents) if parents else -1)  # type: ignore[attr-defined]
            if parents:
                self.parents.append(parents)
                self.depths.append(max(self.depths[node] for node in parents) + layer)

    @staticmethod
    def _permuted(name: str, label: Label, args: tuple, out: Tensor) -> Label:
        order = list(range(out.ndim))
        if name == "permute":
            order = [axis % out.ndim for axis in args[1]]
        elif out.ndim > 1:
            a, b = (0, 1) if name == "t" else (args[1] % out.ndim, args[2] % out.ndim)
            order[a], order[b] = order[b], order[a]
        channel = order.index(label.channel) if label.channel is not None else None
        return replace(label, batch=order.index(label.batch), channel=channel)

    def _reshaped(self, label: Label, source: Tensor, out: Tensor) -> Label:
        axes = [i for i, size in enumerate(out.shape) if size % self.batch == 0]
        before = source.shape[label.batch] // self.batch
        after = out.shape[axes[0]] // self.batch
        fold = label.fold
        if after == 1:
            fold = None
        elif after > before:  # something was merged with the images: onto which side?
            left = math.prod(source.shape[: label.batch]) > math.prod(out.shape[: axes[0]])
            right = math.prod(source.shape[label.batch + 1 :]) > math.prod(out.shape[axes[0] + 1 :])
            merged = "mixed" if left and right else "tile" if left else "interleave"
            fold = merged if fold in (None, merged) else "mixed"
        channel = self._same_axis(source, label.channel, out) if label.channel is not None else None
        return replace(label, batch=axes[0], fold=fold, channel=channel)

    @staticmethod
    def _same_axis(source: Tensor, axis: int, out: Tensor) -> int | None:
        size, before, after = source.shape[axis], math.prod(source.shape[:axis]), math.prod(source.shape[axis + 1 :])
        for i in range(out.ndim):
            if out.shape[i] == size and (math.prod(out.shape[:i]) == before or math.prod(out.shape[i + 1 :]) == after):
                return i
        return None

    @staticmethod
    def _other(name: str, label: Label, source: Tensor, labelled: list[Tensor], out: Tensor) -> Label:
        if len(labelled) > 1 and name in ("add", "add_", "sub", "cat", "stack"):
            label = replace(label, kernel=None)
        if label.channel is not None and out.ndim != source.ndim:  # a reduction or an index took axes away
            last = label.channel == source.ndim - 1
            label = replace(label, channel=out.ndim - 1 if last else min(label.channel, out.ndim - 1))
        return label


def _refuse_apart(func: Any, args: tuple, batch: int) -> None:
    if func is torch.ops.aten.unbind.int and batch == BATCH:  # a real pass has too few images to be sure
        label = label_of(args[0])
        axis = (args[1] if len(args) > 1 else 0) % args[0].ndim
        if label is not None and axis == label.batch and args[0].shape[axis] == batch:
            raise TakenApart


def _result(func: Any, args: tuple, kwargs: dict) -> Any:
    if func is torch.ops.aten.native_batch_norm.default and is_fake(x := args[0]):
        # only shapes count, and to find these torch goes through the arithmetic: two thirds of the pass of a ResNet
        return torch.empty_like(x), x.new_empty(0), x.new_empty(0)
    return func(*args, **kwargs)


def _is_layer(name: str, flat: list[Tensor]) -> bool:
    """Return whether an operation is a convolution, or a matrix product with a weight."""
    if name == "convolution":
        return True
    if name in ("mm", "addmm", "bmm", "baddbmm"):
        return any(label_of(t) is None for t in flat[-2:])
    return name == "linear"


def label_of(tensor: Any) -> Label | None:
    """Return the label of a tensor, or None if it does not depend on the image."""
    return getattr(tensor, "_quac_label", None)
