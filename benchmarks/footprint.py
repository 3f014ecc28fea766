"""What a put-in network costs besides its speed.

    python benchmarks/footprint.py memory           # peak memory of networks with Q-ACON against their hosts
    python benchmarks/footprint.py fit --data DIR   # what the time of a fit of ten photographs goes into

Memory is what the process itself had most of (Linux: VmHWM), less what it had before, each network and way in a process
of its own; a first run, which builds kernels, does not count. Each writes benchmarks/results/footprint_NAME.{json,md}.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import os
import re
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import timm
import torch
from speed import MODELS, RESULTS, machine_of, markdown
from tables import write_tables
from torch import Tensor

import quac_plugins as quac
from quac_plugins.core.prior.features import Watch
from quac_plugins.fit import photographs as drawing

CORRUPTIONS = ["fog", "gaussian_noise", "jpeg_compression"]


def status(key: str) -> float:
    """MB, of /proc/self/status."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found is not None
    return int(found[1]) / 1e3


def peak(name: str, way: str, batch: int, threads: int) -> float:
    """MB above what was there before the run."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = timm.create_model(name).train(way != "inference")
    images = torch.rand(batch, 3, 224, 224)

    def run() -> None:
        if way == "inference":
            with torch.no_grad():
                model(images)
        else:
            model(images).square().mean().backward()
            model.zero_grad()

    run()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    run()
    return status("VmHWM") - before


def memory(args: argparse.Namespace) -> list[dict[str, Any]]:
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # in the processes: what is freed is given back at once
    rows = []
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for name in MODELS:
            for way in ("inference", "training step"):
                found = {
                    kind: statistics.median(
                        pool.apply(peak, (f"{name}{suffix}", way, args.batch_size, args.threads))
                        for _ in range(args.repeats)
                    )
                    for kind, suffix in (("host", ""), ("ours", "_qacon"))
                }
                rows.append(
                    {
                        "what": f"{name}, {way}", "host, MB": found["host"], "ours, MB": found["ours"],
                        "ours / host": found["ours"] / found["host"],
                    }
                )  # fmt: skip
    return rows


@contextmanager
def timed(owner: Any, name: str, spent: dict[str, float], what: str) -> Iterator[None]:
    """Inside, the seconds of every call of ``owner.name``."""
    function = getattr(owner, name)

    def call(*inputs: Any, **options: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*inputs, **options)
        finally:
            spent[what] = spent.get(what, 0.0) + time.perf_counter() - start

    with mock.patch.object(owner, name, call):
        yield


def fit(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds of a fit of ten photographs for three corruptions; what is left is the prior itself."""
    photographs = sorted(file for file in args.data.rglob("*") if file.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if len(photographs) < 10:
        raise SystemExit(f"{args.data} holds {len(photographs)} photographs; ten are needed (--data DIR)")
    rows = []
    for workers in (0, 2):
        spent: dict[str, float] = {}
        torch.manual_seed(0)
        model = timm.create_model("resnet50").eval()
        with (
            timed(drawing, "make_draws", spent, "loading and corrupting"),
            timed(Watch, "run", spent, "the host"),
            timed(Tensor, "backward", spent, "backward"),
        ):
            start = time.perf_counter()
            quac.fit_prior(
                model, photographs[:10], config=quac.PriorConfig(), corruptions=CORRUPTIONS, num_workers=workers,
                progress=False, steps=args.steps,
            )  # fmt: skip
            whole = time.perf_counter() - start
        row: dict[str, Any] = {"what": f"resnet50, {workers} workers", "seconds": whole}
        rows.append(row | {f"share of {key}": value / whole for key, value in spent.items()})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = {"memory": memory, "fit": fit}
    parser.add_argument("what", choices=list(what))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40, help="of a fit")
    data = Path(os.environ.get("QUAC_DATA", "data")) / "imagenet_sample"
    parser.add_argument("--data", type=Path, default=data, help="of fit: a folder of photographs")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = what[args.what](args)
    machine = machine_of("cpu", args.threads)
    command = f"benchmarks/footprint.py {args.what}"
    text = markdown(f"Footprint: {args.what}", command, machine, rows)
    write_tables(RESULTS / f"footprint_{args.what}", {"machine": machine, "rows": rows}, text)
    print(text)


if __name__ == "__main__":
    main()
