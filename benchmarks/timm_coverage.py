"""Try every timm name: build NAME_qacon, find its sites, run it forward and backward, and write what happened.

    python benchmarks/timm_coverage.py                    # all names, to benchmarks/results/timm_coverage.{json,md}
    python benchmarks/timm_coverage.py "resnet*" --jobs 2

Networks of up to 60 million parameters on pictures of up to 256×256 run for real; their logits are compared with
those of the untouched base (preserve: the difference should be 0). Larger ones run on fake tensors: shapes, dtypes and
the autograd graph are real, numbers are not. A network passes if it has at least one site, its forward gives finite
logits, backward reaches every put-in parameter, and its logits are those of the base to 1e-5 of their largest.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

MAX_PARAMETERS = 60e6
MAX_SIDE = 256
SMALL_SIDE = 128  # for networks that take any size; those that do not take this one get their own
RESULTS = Path(__file__).parent / "results"


def try_name(base: str) -> dict[str, Any]:
    row = try_size(base, SMALL_SIDE)
    return row if row["ok"] or row.get("fixed") else try_size(base, None)


def try_size(base: str, side: int | None) -> dict[str, Any]:
    import torch

    import quac_plugins as quac

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    row: dict[str, Any] = {"name": f"{base}_qacon", "ok": False}
    start = time.perf_counter()
    try:
        model, real = build(base, side)
        row |= {"real": real, "parameters": sum(p.numel() for p in model.parameters())}
        size = input_size(model, side)
        row["fixed"] = bool(model.pretrained_cfg.get("fixed_input_size"))
        row["input"] = list(size)
        torch.manual_seed(0)
        shape = (2, *size)
        model.eval()
        images = torch.randn(shape) if real else None
        with torch.no_grad():
            before = logits(model(images)) if images is not None else None
        quac.inject(
            model, quac.QuACConfig(), example=images if images is not None else torch.empty(shape, device="meta")
        )
        injected = quac.injection_of(model)
        row["sites"] = len(injected.sites)
        row["tap"] = injected.tap
        row["kind"] = kind_of(injected)
        row["layouts"] = sorted({f"{s.channel_dim}/{s.expand_q}" for s in injected.sites})
        if images is not None:
            with torch.no_grad():
                after = logits(model(images))
            row["difference"] = float((after - before).abs().max() / before.abs().max().clamp(min=1e-12))
            if not torch.isfinite(after).all():
                raise RuntimeError("logits are not finite")
            if row["difference"] > 1e-5:
                raise RuntimeError(f"logits differ from the base's by {row['difference']:.2g}")
        model.train()
        for module in model.modules():  # frozen statistics: deep stages of small pictures have one value a channel
            if isinstance(module, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
                module.eval()
        loss = logits(model(images if images is not None else torch.randn(shape, device="meta"))).float().mean()
        loss.backward()
        missing = [
            name
            for name, p in model.named_parameters()
            if p.grad is None and name.startswith(injected.prefixes()) and ".host." not in name
        ]
        if missing:
            raise RuntimeError(f"no gradient for {len(missing)} put-in parameters, such as {missing[0]}")
        row["ok"] = True
    except Exception as error:
        row["reason"] = f"{type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ''}"
        row["where"] = traceback.format_exc().splitlines()[-3:-1]
    row["seconds"] = round(time.perf_counter() - start, 2)
    return row


def build(base: str, side: int | None):
    """The base for real if it is small enough, else on the meta device."""
    import timm
    import torch

    try:
        with torch.device("meta"):
            model = timm.create_model(base)
    except Exception:  # builds tensors whose values it reads: only possible for real
        return timm.create_model(base), True
    small = sum(p.numel() for p in model.parameters()) <= MAX_PARAMETERS and max(input_size(model, side)) <= MAX_SIDE
    return (timm.create_model(base), True) if small else (model, False)


def input_size(model: Any, side: int | None) -> tuple[int, int, int]:
    """(C, H, W): the network's own size if it is fixed, else ``side`` if it is given."""
    channels, height, width = model.pretrained_cfg["input_size"]
    if side is None or model.pretrained_cfg.get("fixed_input_size"):
        return channels, height, width
    return channels, min(height, side), min(width, side)


def logits(output: Any):
    import torch

    if isinstance(output, (tuple, list)):
        return torch.cat([logits(o).flatten(1) for o in output], dim=1)
    return output


def kind_of(injected: Any) -> str:
    if any(site.after for site in injected.sites):
        return "last"
    from quac_plugins.core.inject.sites import PLACES

    return next((place for place in PLACES if place == injected.config.where), "auto")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pattern", nargs="?", default="*", help="which bases, as in timm.list_models")
    parser.add_argument("--keep", action="store_true", help="keep the rows of other names from the file of results")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=RESULTS / "timm_coverage")
    args = parser.parse_args()
    import timm
    import torch

    names = timm.list_models(args.pattern)
    rows, start = [], time.perf_counter()
    # a worker does few names: memory of a large network goes back to the system with its process
    with multiprocessing.get_context("spawn").Pool(args.jobs, maxtasksperchild=40) as pool:
        for row in pool.imap_unordered(try_name, names):
            rows.append(row)
            if not row["ok"]:
                print(f"{row['name']}: {row['reason']} {row['where']}", flush=True)
            if len(rows) % 50 == 0:
                print(f"{len(rows)}/{len(names)} in {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    table = args.out.with_suffix(".json")
    if args.keep and table.is_file():
        tried = {row["name"] for row in rows}
        rows += [row for row in json.loads(table.read_text())["rows"] if row["name"] not in tried]
        names = timm.list_models("*", exclude_filters="*_qacon")
    rows.sort(key=lambda row: names.index(row["name"].removesuffix("_qacon")))
    versions = {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    table.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(markdown(rows, versions))
    print(f"{sum(row['ok'] for row in rows)} of {len(rows)} pass")


def markdown(rows: list[dict[str, Any]], versions: dict[str, str]) -> str:
    ok = [row for row in rows if row["ok"]]
    real = [row for row in ok if row["real"]]
    lines = [
        "# Every timm architecture with QuAC inside",
        "",
        "`python benchmarks/timm_coverage.py`; " + ", ".join(f"{k} {v}" for k, v in versions.items()) + ".",
        "",
        f"**{len(ok)} of {len(rows)}** names build, have sites, run forward and backward. {len(real)} of them ran for "
        f"real: their logits differ from the untouched base's by at most "
        f"{max((row['difference'] for row in real), default=0):.2g} of the largest logit. The other "
        f"{len(ok) - len(real)} are too large for that here and ran on fake tensors.",
        "",
        "Layouts (channel axis / order of q's rows): "
        + ", ".join(f"`{layout}` {n}" for layout, n in Counter(x for r in ok for x in r["layouts"]).most_common()),
        "",
    ]
    failed = [row for row in rows if not row["ok"]]
    if failed:
        lines += ["## Exceptions", "", "| name | reason |", "|---|---|"]
        lines += [f"| {row['name']} | {row['reason'].replace('|', '/')} |" for row in failed]
        lines.append("")
    lines += ["## All", "", "| name | sites | tap | input | ran | difference |", "|---|---|---|---|---|---|"]
    for row in ok:
        difference = f"{row['difference']:.1g}" if row["real"] else ""
        ran = "real" if row["real"] else "fake"
        size = "×".join(map(str, row["input"]))
        lines.append(f"| {row['name']} | {row['sites']} | {row['tap']} | {size} | {ran} | {difference} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
