"""Time and memory of what is put into a network, as ratios against the alternative in the same run.

    python benchmarks/speed.py activation     # Q-ACON against SiLU, (8, 256, 56, 56)
    python benchmarks/speed.py quality        # BRISQUE, 32 images of 224×224, against OpenCV's, one by one
    python benchmarks/speed.py models         # networks with Q-ACON and BRISQUE against their hosts
    python benchmarks/speed.py margins        # networks with margins against their hosts, at inference
    python benchmarks/speed.py scale          # against batch, resolution and number of sites; with a plot
    python benchmarks/speed.py evaluate --data DIR   # what an evaluation's time goes into; DIR of folders of classes

The alternatives take turns, so that a busy machine slows all of them; figures are medians of --repeats. Each writes
benchmarks/results/speed_NAME.{json,md}. With --device cuda it times with events, ten calls at a time. The activation
is then measured on (128, 256, 56, 56), which no cache holds, while the GPU has all its calls before it, so that Python
is not what is timed; and its kernels, with the few operations that prepare their numbers, are compared with a device
copy, by the bytes that they have to move, and with float64.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import itertools
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import timm
import torch
import torch.nn.functional as F
from tables import write_tables
from torch import Tensor, nn

import quac_plugins as quac
from quac_plugins.core.activations import QACON
from quac_plugins.core.kernels.plain import acon
from quac_plugins.core.quality.brisque import brisque
from quac_plugins.degradations import CORRUPTIONS

RESULTS = Path(__file__).parent / "results"
MODELS = ("resnet50", "convnext_tiny", "mobilenetv3_large_100")
CALLS = 10  # between two events of a GPU
SLEEP = 50_000_000  # cycles of a GPU, some 30 ms, in which Python makes these calls
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


def measure(args: argparse.Namespace, runs: dict[str, Callable[[], Any]], queued: bool = False) -> dict[str, float]:
    """Median milliseconds of each, in turns; what they set in the environment does not last. queued: see ``once``."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    with mock.patch.dict(os.environ):
        for run in runs.values():
            run()
            run()
        for _ in range(args.repeats):
            for name, run in runs.items():
                times[name].append(once(args.device, run, queued))
    return {name: statistics.median(found) for name, found in times.items()}


def once(device: str, run: Callable[[], Any], queued: bool = False) -> float:
    """Milliseconds; queued: of a GPU that never waits for its next call."""
    if device == "cpu":
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if queued:
        torch.cuda._sleep(SLEEP)
    first.record()
    for _ in range(CALLS):
        run()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / CALLS


def kept(run: Callable[[], Any], without: nn.Module) -> int:
    """Bytes that autograd keeps, but for parameters."""
    own = {p.untyped_storage().data_ptr() for p in without.parameters()}
    sizes: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        output = run()
    del output
    return sum(size for at, size in sizes.items() if at not in own)


def kernels(choice: str) -> Any:
    """Inside, the kernels are those of a choice."""
    return mock.patch.dict(os.environ, QUAC_KERNELS=choice)


def by_kernel(choice: str, run: Callable[..., Any], *inputs: Any) -> Callable[[], Any]:
    """A run with the kernels of a choice: set in a microsecond, where ``kernels`` takes a tenth of a millisecond.

    That of ``auto`` is that nothing is set: what users have.
    """

    def chosen() -> Any:
        if choice == "auto":
            os.environ.pop("QUAC_KERNELS", None)
        else:
            os.environ["QUAC_KERNELS"] = choice
        return run(*inputs)

    return chosen


def keep_memory() -> None:
    """Freed memory stays with the process: given back and asked for again, all alternatives would wait for it."""
    if platform.libc_ver()[0] == "glibc":
        mallopt, trim, mmap = ctypes.CDLL(None).mallopt, -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        if not (mallopt(mmap, 1 << 30) and mallopt(trim, 2**31 - 1)):
            raise RuntimeError("mallopt refused its thresholds")


def activation(args: argparse.Namespace) -> list[dict[str, Any]]:
    keep_memory()
    rows, batch = [], 8 if args.device == "cpu" else 128
    for dtype, (layout, memory_format) in itertools.product(DTYPES, LAYOUTS.items()):
        x = torch.randn(batch, 256, 56, 56, device=args.device).to(dtype, memory_format=memory_format)
        x.requires_grad_()
        q, grad = torch.randn(batch, 36, device=args.device), torch.randn_like(x)
        for init, host, of in (("paper", None, F.silu), ("preserve", nn.ReLU(), F.relu)):
            site = QACON(256, init=init, host=host).to(args.device)

            def forward(function: Any, *inputs: Any) -> Any:
                with torch.no_grad():
                    return function(*inputs)

            def both(function: Any, *inputs: Any, grad: Tensor = grad) -> Any:
                return function(*inputs).backward(grad)

            name = "SiLU" if init == "paper" else "ReLU"
            found = {}
            for way, run in (("forward", forward), ("forward + backward", both)):
                site.train(run is both)
                found[way] = measure(
                    args,
                    {
                        name: lambda run=run, of=of, x=x: run(of, x),
                        "fused": by_kernel("auto", run, site, x, q),
                        "plain": by_kernel("plain", run, site, x, q),
                    },
                    queued=True,
                )
            with kernels("native"):
                memory = kept(lambda site=site, x=x, q=q: site(x, q), site) / x.nbytes
            with kernels("plain"):
                before = kept(lambda site=site, x=x, q=q: site(x, q), site) / x.nbytes
            for way, times in found.items():
                rows.append(
                    {
                        "what": f"{init}, {str(dtype)[6:]}, {layout}, {way}",
                        f"{name}, ms": times[name], "fused, ms": times["fused"],
                        "fused / host": times["fused"] / times[name], "plain / host": times["plain"] / times[name],
                        "kept / x, fused": memory, "kept / x, plain": before,
                    }
                )  # fmt: skip
        if args.device != "cpu":
            rows += bandwidth(args, x.detach(), layout)
    return rows


def bandwidth(args: argparse.Namespace, x: Tensor, layout: str) -> list[dict[str, Any]]:
    """Without the driver: the kernels' bytes a second over those of a copy, and their errors against float64."""
    from quac_plugins.core.kernels import activate

    x, grad = x.requires_grad_(), torch.randn_like(x)
    p = [torch.randn(len(x), x.shape[1], 1, 1, device=x.device).requires_grad_() for _ in range(3)]
    y = activate(x, p, acon)

    def forward() -> Tensor:
        return activate(x.detach(), [v.detach() for v in p], acon)

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, [x, *p], grad, retain_graph=True)

    times = measure(args, {"copy": lambda: x.detach().clone(), "forward": forward, "backward": backward}, queued=True)
    few = slice(4)  # in float64 the rest would not fit beside it
    wide = [t[few].detach().double().requires_grad_() for t in (x, *p)]
    exact = acon(*wide)
    by_x, *by_p = (t[few] for t in backward())
    exact_by_x, *exact_by_p = torch.autograd.grad(exact, wide, grad[few].double())
    errors = {
        "forward": (forward()[few] - exact).abs().max(),
        "backward": max(
            (by_x - exact_by_x).abs().max(),
            *((a - b).abs().max() / b.abs().max() for a, b in zip(by_p, exact_by_p, strict=True)),
        ),
    }
    # a copy moves x twice, and so does forward; backward moves it, its gradient and that of y
    return [
        {
            "what": f"{way} kernel, {str(x.dtype)[6:]}, {layout}",
            "bytes a second / copy": moved / 2 * times["copy"] / times[way],
            "error": float(errors[way].detach()),
        }
        for way, moved in (("forward", 2), ("backward", 3))
    ]


def quality(args: argparse.Namespace) -> list[dict[str, Any]]:
    import cv2
    from skimage import data

    picture = torch.from_numpy(data.astronaut().copy()).permute(2, 0, 1)[None].float()
    pictures = torch.cat([picture[:, :, 8 * i : 8 * i + 224, 7 * i : 7 * i + 224] for i in range(32)])
    loop = [np.ascontiguousarray(p.permute(1, 2, 0).numpy().astype(np.uint8)[..., ::-1]) for p in pictures]
    images = (pictures / 255).to(args.device)
    times = measure(
        args,
        {
            "cv2": lambda: [cv2.quality.QualityBRISQUE_computeFeatures(p) for p in loop],
            "ours": lambda: brisque(images),
        },
    )
    return [
        {
            "what": "BRISQUE, 32×3×224×224", "cv2 loop, ms": times["cv2"], "ours, ms": times["ours"],
            "ours / cv2": times["ours"] / times["cv2"],
        }
    ]  # fmt: skip


def models(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for name in MODELS:
        host = timm.create_model(name).to(args.device)
        ours = timm.create_model(f"{name}_qacon").to(args.device)
        images = torch.rand(args.batch_size, 3, 224, 224, device=args.device)

        def infer(model: nn.Module, images: Tensor = images) -> Any:
            with torch.no_grad():
                return model(images)

        def step(model: nn.Module, images: Tensor = images) -> None:
            model(images).square().mean().backward()
            model.zero_grad()

        folded = quac.fuse(copy.deepcopy(ours).eval())  # the batch norms of the drivers
        for way, run in (("inference", infer), ("training step", step)):
            for model in (host, ours):
                model.train(way != "inference")
            runs = {
                "host": lambda run=run, host=host: run(host),
                "ours": by_kernel("auto", run, ours),
                "plain": by_kernel("plain", run, ours),
            }
            if way == "inference":
                runs["folded"] = by_kernel("auto", run, folded)
            times = measure(args, runs)
            row = {
                "what": f"{name}, {way}", "host, ms": times["host"], "ours, ms": times["ours"],
                "ours / host": times["ours"] / times["host"], "plain / host": times["plain"] / times["host"],
            }  # fmt: skip
            if way == "inference":
                row["after quac.fuse / host"] = times["folded"] / times["host"]
            else:
                found = (kept(lambda m=model, i=images: m(i), model) for model in (ours, host))
                row["kept, ours / host"] = next(found) / next(found)
            rows.append(row)
    return rows


def margins(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Inference with margins for the 15 corruptions, with q given and with the quality function's own."""
    rows = []
    for name in ("mobilenetv2_100", "tf_efficientnet_lite0", "tf_efficientnet_lite1", "resnet50"):
        host = timm.create_model(name).to(args.device).eval()
        ours = quac.inject(copy.deepcopy(host), quac.PriorConfig(fdm="margin", experts=list(CORRUPTIONS))).eval()
        for batch in (1, args.batch_size):
            images = torch.rand(batch, 3, 224, 224, device=args.device)
            q = torch.zeros(batch, 17, device=args.device)

            def given(model: nn.Module = ours, images: Tensor = images, q: Tensor = q) -> Any:
                with torch.no_grad(), quac.use_q(model, q):
                    return model(images)

            def infer(model: nn.Module, images: Tensor = images) -> Any:
                with torch.no_grad():
                    return model(images)

            times = measure(args, {"host": partial(infer, host), "given": given, "ours": partial(infer, ours)})
            rows.append(
                {
                    "what": f"{name}, batch {batch}", "host, ms": times["host"],
                    "margins / host": times["given"] / times["host"],
                    "margins and quality / host": times["ours"] / times["host"],
                }
            )  # fmt: skip
    return rows


def evaluation(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Milliseconds an image, of the 15 corruptions in turn: all of it, and what is spent inside the network."""
    from quac_plugins.evaluate import evaluate

    rows = []
    for name in ("mobilenetv3_large_100_qacon", "resnet50_qacon"):
        model = timm.create_model(name, num_classes=1000).eval().to(args.device)
        inside: list[float] = []
        model.register_forward_pre_hook(lambda *_, note=inside.append: note(-time.perf_counter()))
        model.register_forward_hook(lambda *_, note=inside.append: note(time.perf_counter()))

        def run(workers: int, limit: int, model: nn.Module = model) -> Any:
            return evaluate(
                model, args.data, corruptions="all", limit=limit, num_workers=workers, clean=False,
                progress=False, batch_size=args.batch_size, class_map=classes(args.data),
            )  # fmt: skip

        run(0, 1)  # builds the kernels
        for workers in (0, 1, 2):
            inside.clear()
            start = time.perf_counter()
            report = run(workers, args.repeats)
            count = sum(found["3"]["n"] for found in report.corruptions.values())
            whole, network = (1e3 * t / count for t in (time.perf_counter() - start, sum(inside)))
            rows.append(
                {
                    "what": f"{name}, {workers} workers", "images": count, "ms an image": whole,
                    "inside the network": network, "share of the network": network / whole,
                }
            )  # fmt: skip
    return rows


def classes(folder: Path) -> dict[str, int]:
    return {child.name: i for i, child in enumerate(sorted(p for p in folder.iterdir() if p.is_dir()))}


def scale(args: argparse.Namespace) -> list[dict[str, Any]]:
    """resnet50 with Q-ACON against its host, by batch, by side and by how many sites."""
    cases = [("batch", b, b, 224, {}) for b in (1, 2, 4, 8)]
    cases += [("side", s, 2, s, {}) for s in (128, 224, 320, 448)]
    cases += [("sites", n, 2, 224, {"where": list(range(n))}) for n in (1, 12, 24, 49)]
    names = [site.name for site in quac.injection_of(timm.create_model("resnet50_qacon", where="all")).sites]
    rows = []
    for axis, value, batch, side, options in cases:
        if "where" in options:
            options = {"where": [names[round(i * (len(names) - 1) / max(value - 1, 1))] for i in range(value)]}
        host = timm.create_model("resnet50").to(args.device).eval()
        ours = timm.create_model("resnet50_qacon", **options).to(args.device).eval()
        images = torch.rand(batch, 3, side, side, device=args.device)
        with torch.no_grad():
            times = measure(args, {"host": lambda h=host, i=images: h(i), "ours": lambda o=ours, i=images: o(i)})
        memory = kept(lambda o=ours, i=images: o(i), ours)
        rows.append(
            {
                "what": f"{axis} {value}", "host, ms": times["host"], "ours, ms": times["ours"],
                "ours / host": times["ours"] / times["host"], "kept, MB": memory / 1e6,
            }
        )  # fmt: skip
    plot(rows, (args.out or RESULTS / "speed_scale").with_suffix(".png"))
    return rows


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    for column, axis in zip(figure.subplots(2, 3).T, ("batch", "side", "sites"), strict=True):
        found = [row for row in rows if row["what"].startswith(axis)]
        at = [int(row["what"].split()[1]) ** (2 if axis == "side" else 1) for row in found]
        for axes, keys in zip(column, (("host, ms", "ours, ms"), ("kept, MB",)), strict=True):
            for key in keys:
                axes.plot(at, [row[key] for row in found], marker="o", label=key)
            axes.set(xlabel="pixels" if axis == "side" else axis, ylim=(0, None), xlim=(0, None))
            axes.legend()
    figure.savefig(file, dpi=100)


def markdown(title: str, command: str, machine: str, rows: list[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [
        f"# {title}", "", f"`python {command}`: {machine}.", "", "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
    ]  # fmt: skip
    for row in rows:
        cells = (row.get(column, "") for column in columns)
        lines.append("| " + " | ".join(f"{c:.2f}" if isinstance(c, float) else str(c) for c in cells) + " |")
    return "\n".join(lines) + "\n"


def machine_of(device: str, threads: int) -> str:
    cpu = f"{threads} CPU threads with {torch.backends.cpu.get_cpu_capability()}"
    where = cpu if device == "cpu" else torch.cuda.get_device_name()
    return f"{where}, python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    benchmarks = {
        "activation": activation,
        "quality": quality,
        "models": models,
        "margins": margins,
        "scale": scale,
        "evaluate": evaluation,
    }
    parser.add_argument("what", choices=list(benchmarks))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=8)
    data = Path(os.environ.get("QUAC_DATA", "data")) / "imagenet_sample"
    parser.add_argument("--data", type=Path, default=data, help="of evaluate: folders of classes")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/speed_WHAT")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = benchmarks[args.what](args)
    machine = machine_of(args.device, args.threads)
    title = f"Speed: {args.what}"
    text = markdown(title, f"benchmarks/speed.py {args.what}", f"medians of {args.repeats}; {machine}", rows)
    write_tables(args.out or RESULTS / f"speed_{args.what}", {"machine": machine, "rows": rows}, text)
    print(text)


if __name__ == "__main__":
    main()
