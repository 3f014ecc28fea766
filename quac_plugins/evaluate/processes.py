"""One run shared by the processes that `torchrun` starts: who computes what, and how the results come together."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import os
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch.distributed as dist

__all__ = ["gather", "is_main_process", "process_group"]

_groups = itertools.count()


def is_main_process() -> bool:
    """Tell whether this process is the one that prints and writes."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def process_group() -> Iterator[tuple[int, int]]:
    """Give (rank, world size), joining the group that the environment names unless the caller already has.

    Only small Python objects are exchanged, so the group is of gloo, which runs everywhere.
    """
    if not dist.is_available() or (not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) < 2):
        yield 0, 1
        return
    ours = not dist.is_initialized()
    if ours:
        store, rank, world_size = _meeting_place()
        # under a name of its own: what an earlier group left there would be taken for this one's addresses
        store = dist.PrefixStore(f"quac_plugins/{next(_groups)}", store)
        timeout = datetime.timedelta(hours=24)
        dist.init_process_group("gloo", timeout=timeout, store=store, rank=rank, world_size=world_size)
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        if ours:
            dist.destroy_process_group()


@lru_cache(maxsize=1)
def _meeting_place() -> tuple[dist.Store, int, int]:
    """The store through which the processes find each other, this one's rank, and how many there are."""
    return next(iter(dist.rendezvous("env://")))


def gather(value: Any, world_size: int) -> list[Any]:
    """Return the values of all processes, in the order of their ranks, in every process."""
    if world_size == 1:
        return [value]
    values: list[Any] = [None] * world_size
    dist.all_gather_object(values, value)
    return values
