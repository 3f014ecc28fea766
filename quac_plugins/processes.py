"""One run shared by the processes that torchrun or accelerate launch started, on one machine or several.

Evaluating, fitting and the training of a restoration share it: who computes what, how results, gradients and errors
come together, and who prints and writes. Without a launcher there is one process, and nothing is exchanged. What is
exchanged goes through gloo, which runs everywhere, unless a run asks for NCCL.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["ALONE", "Processes", "default_device", "is_main_process", "process_group"]

T = TypeVar("T")
_groups = itertools.count()
_FAILED = "failed"  # where a process tells the others why it ends


def is_main_process() -> bool:
    """Tell whether this process is the one that prints and writes."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"


def default_device() -> str:
    """Return this process's GPU, or the CPU without one."""
    count = torch.cuda.device_count()
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % count}" if count else "cpu"


class Processes:
    """This process among those that share a run. Every method but ``share`` must be called by all of them.

    Attributes:
        rank: of this process, from 0, which is the one that prints and writes.
        world_size: how many processes there are, over all machines.

    Raises:
        RuntimeError: another process failed; the message is its error.

    Example:
        >>> ALONE.share(["a", "b"]), ALONE.gather(1), Processes(1, 2).share([10, 11, 12])
        (['a', 'b'], [1], [11])
    """

    def __init__(self, rank: int = 0, world_size: int = 1, group: Any = None, store: Any = None, nccl: bool = False):
        self.rank, self.world_size = rank, world_size
        self._group, self._store, self._nccl = group, store, nccl

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Return this process's part of the items: every ``world_size``-th, from its rank on."""
        return items[self.rank :: self.world_size]

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, in the order of their ranks, in every process."""
        values: list[Any] = [value] * self.world_size
        if self.world_size > 1:
            with self._together():
                dist.all_gather_object(values, value, group=self._group)
        return values

    def of_main(self, function: Callable[[], T]) -> T:
        """Return, or raise, in all processes what a function returns or raises in the first one."""
        if self.world_size == 1:
            return function()
        box: list[Any] = [None, None]
        if self.rank == 0:
            try:
                box[0] = function()
            except Exception as error:
                box[1] = error
        with self._together():
            dist.broadcast_object_list(box, group=self._group)
        if box[1] is not None:
            raise box[1]
        return box[0]

    def average(self, tensor: Tensor) -> Tensor:
        """Return the mean over all processes, like the tensor in shape, dtype and device; single numbers in float64."""
        if self.world_size == 1:
            return tensor
        dtype = torch.float64 if tensor.numel() == 1 else tensor.dtype
        total = tensor.detach().to(tensor.device if self._nccl else "cpu", dtype, copy=True)
        with self._together():
            dist.all_reduce(total, group=self._group)
        return (total / self.world_size).to(tensor)

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Average gradients in one exchange; a parameter that has none in any process keeps none."""
        if self.world_size == 1:
            return
        known = list(parameters)
        has = self.average(torch.tensor([float(p.grad is not None) for p in known])).tolist()
        moved = [parameter for parameter, share in zip(known, has, strict=True) if share]
        if not moved:
            return
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in moved]
        flat = self.average(torch.cat([gradient.flatten() for gradient in gradients]))
        for parameter, part in zip(moved, flat.split([p.numel() for p in moved]), strict=True):
            parameter.grad = part.view_as(parameter)

    def same(self, tensors: Iterable[Tensor]) -> None:
        """Give tensors, in place, the values that they have in the first process."""
        for tensor in tensors if self.world_size > 1 else ():
            value = tensor.detach().cpu().contiguous()
            with self._together():
                dist.broadcast(value, 0, group=self._group)
            with torch.no_grad():
                tensor.copy_(value)

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """Raise another process's error where its failure breaks an exchange."""
        try:
            yield
        except RuntimeError as error:
            told = None
            with contextlib.suppress(RuntimeError):  # the process that held the store may have ended
                if self._store is not None and self._store.check([_FAILED]):
                    told = self._store.get(_FAILED).decode()
            if told is None:
                raise
            raise RuntimeError(told) from error


ALONE = Processes()


@contextlib.contextmanager
def process_group(nccl: bool = False) -> Iterator[Processes]:
    """Give this process among the others, joining the group that the environment names unless the caller has one.

    Where the group was joined here, an error of one process ends the others too, with its message.

    Args:
        nccl: exchange tensors on GPUs directly, where each process has a GPU of its own, its `default_device`.

    Example:
        >>> with process_group() as processes:
        ...     processes.rank, processes.world_size
        (0, 1)
    """
    known = dist.is_available() and dist.is_initialized()
    joins = dist.is_available() and not known and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if not known and not joins:
        yield ALONE
        return
    group = store = None
    if joins:
        store, rank, world_size = _meeting_place()
        # under a name of its own: what an earlier group left there would be taken for this one's addresses
        store = dist.PrefixStore(f"quac_plugins/{next(_groups)}", store)
        nccl &= 0 < int(os.environ.get("LOCAL_WORLD_SIZE", "0")) <= torch.cuda.device_count()
        backend, timeout = "cpu:gloo,cuda:nccl" if nccl else "gloo", datetime.timedelta(hours=24)
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world_size)
    elif "gloo" not in str(dist.get_backend_config()):  # one for GPUs alone
        group = dist.new_group(backend="gloo")
    processes = Processes(dist.get_rank(), dist.get_world_size(), group, store, nccl and joins)
    try:
        if joins:
            processes.gather(None)  # whoever left before all have joined would leave the others waiting for it
        yield processes
    except BaseException as error:
        with contextlib.suppress(RuntimeError):  # the first one's counts
            if store is not None:
                what = f"process {processes.rank} of {processes.world_size} failed: {type(error).__name__}: {error}"
                store.compare_set(_FAILED, "", what)
        raise
    finally:
        if joins or group is not None:
            dist.destroy_process_group(group)


@lru_cache(maxsize=1)
def _meeting_place() -> tuple[dist.Store, int, int]:
    """Return the store through which the processes meet, this process's rank, and the number of processes."""
    return next(iter(dist.rendezvous("env://")))
