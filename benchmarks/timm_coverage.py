"""Try every timm name: build it, put QuAC, a prior, or both into it, run it forward and backward; write what happened.

    python benchmarks/timm_coverage.py                    # all names, to benchmarks/results/timm_coverage.{json,md}
    python benchmarks/timm_coverage.py "resnet*" --jobs 2
    python benchmarks/timm_coverage.py --families          # the first and the last name of each of timm's modules

Networks of up to 60 million parameters on pictures of up to 256×256 run for real; their logits are compared with
those of the untouched base (preserve: the difference should be 0). Larger ones run on fake tensors: shapes, dtypes and
the autograd graph are real, numbers are not. A name passes if it has at least one site, its forward gives finite
logits, backward reaches every put-in parameter, and its logits are those of the base to 1e-5 of their largest.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import multiprocessing
import os
import platform
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MAX_PARAMETERS = 60e6
MAX_SIDE = 256
SMALL_SIDE = 128  # for networks that take any size; those that do not take this one get their own
SUFFIXES = ("_qacon", "_ddp", "_qacon_ddp")
RESULTS = Path(__file__).parent / "results"


def try_name(base: str, suffixes: Iterable[str] = SUFFIXES) -> list[dict[str, Any]]:
    rows = try_size(base, SMALL_SIDE, suffixes)
    again = [row["suffix"] for row in rows if not (row["ok"] or row.get("fixed"))]
    rows = [row for row in rows if row["suffix"] not in again] + (try_size(base, None, again) if again else [])
    return [{key: value for key, value in row.items() if key != "suffix"} for row in rows]


def try_size(base: str, side: int | None, suffixes: Iterable[str]) -> list[dict[str, Any]]:
    """One row for each suffix. The base is built once; what was put in is taken out again."""
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows: list[dict[str, Any]] = []
    host = None
    for suffix in suffixes:
        row: dict[str, Any] = {"name": base + suffix, "suffix": suffix, "ok": False}
        start = time.perf_counter()
        try:
            host = host or Host(base, side)
            row |= {"real": host.images is not None, "parameters": host.parameters}
            row |= {"fixed": host.fixed, "input": list(host.shape[1:])}
            host.try_suffix(suffix, row)
            row["ok"] = True
        except Exception as error:
            host = None
            row["reason"] = f"{type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ''}"
            row["where"] = traceback.format_exc().splitlines()[-3:-1]
        row["seconds"] = round(time.perf_counter() - start, 2)
        rows.append(row)
    return rows


class Host:
    """A base with its weights and logits, for several tries."""

    def __init__(self, base: str, side: int | None):
        import torch

        self.model, real = build(base, side)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.fixed = bool(self.model.pretrained_cfg.get("fixed_input_size"))
        self.shape = (2, *input_size(self.model, side))
        torch.manual_seed(0)
        self.model.eval()
        self.images = torch.randn(self.shape) if real else None
        self.state = copy.deepcopy(self.model.state_dict()) if real else None
        with torch.no_grad():
            self.logits = logits(self.model(self.images)) if real else None

    def try_suffix(self, suffix: str, row: dict[str, Any]) -> None:
        """Put in what the suffix says, note what happens, and take it out again."""
        import torch

        import quac_plugins as quac

        model, images = self.model, self.images
        example = images if images is not None else torch.empty(self.shape, device="meta")
        if "_qacon" in suffix:
            quac.inject(model, quac.QuACConfig(), example)
        if "_ddp" in suffix:
            quac.inject(model, quac.PriorConfig(), example)
        injected = quac.injection_of(model)
        if injected.config is not None:
            row |= {"sites": len(injected.sites), "tap": injected.tap, "kind": kind_of(injected)}
            row["layouts"] = sorted({f"{s.channel_dim}/{s.expand_q}" for s in injected.sites})
        if injected.prior is not None:
            row["prior"] = [[s.name, s.layout, s.stride, s.channels] for s in injected.prior.sites]
        if images is not None and self.logits is not None:
            with torch.no_grad():
                after = logits(model.eval()(images))
            row["difference"] = float((after - self.logits).abs().max() / self.logits.abs().max().clamp(min=1e-12))
            if not torch.isfinite(after).all():
                raise RuntimeError("logits are not finite")
            if row["difference"] > 1e-5:
                raise RuntimeError(f"logits differ from the base's by {row['difference']:.2g}")
        model.train()
        for module in model.modules():  # frozen statistics: deep stages of small pictures have one value a channel
            if isinstance(module, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
                module.eval()
        inputs = images if images is not None else torch.randn(self.shape, device="meta")
        ran = Counter()
        priors = [name for name, _ in model.named_modules() if name.endswith(".quac_prior")]
        for name in priors:
            model.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.update([name]))
        logits(model(inputs)).float().mean().backward()
        if any(ran[name] != 1 for name in priors):
            raise RuntimeError(f"priors ran {[ran[name] for name in priors]} times")
        prefixes = injected.prefixes()
        missing = [
            name
            for name, p in model.named_parameters()
            if p.grad is None and name.startswith(prefixes) and ".host." not in name
        ]
        if missing:
            raise RuntimeError(f"no gradient for {len(missing)} put-in parameters, such as {missing[0]}")
        quac.remove(model)
        model.zero_grad()
        if self.state is not None:
            model.load_state_dict(self.state)


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
    parser.add_argument("--families", action="store_true", help="two names of each of timm's modules alone")
    parser.add_argument("--suffixes", default=",".join(SUFFIXES), help="comma-separated")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=RESULTS / "timm_coverage")
    args = parser.parse_args()
    import timm
    import torch

    names = timm.list_models(args.pattern, exclude_filters=[f"*{suffix}" for suffix in SUFFIXES])
    if args.families:
        modules = [timm.list_models(args.pattern, module=module) for module in timm.list_modules()]
        ours = {name for module in modules for name in (module[:1] + module[-1:])}
        names = [name for name in names if name in ours]
    rows, start, done = [], time.perf_counter(), 0
    # a worker does few names: memory of a large network goes back to the system with its process
    with multiprocessing.get_context("spawn").Pool(args.jobs, maxtasksperchild=40) as pool:
        for found in pool.imap_unordered(functools.partial(try_name, suffixes=args.suffixes.split(",")), names):
            rows += found
            done += 1
            for row in found:
                if not row["ok"]:
                    print(f"{row['name']}: {row['reason']} {row['where']}", flush=True)
            if done % 50 == 0:
                print(f"{done}/{len(names)} in {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    table = args.out.with_suffix(".json")
    if args.keep and table.is_file():
        tried = {row["name"] for row in rows}
        rows += [row for row in json.loads(table.read_text())["rows"] if row["name"] not in tried]
        names = timm.list_models(exclude_filters=[f"*{suffix}" for suffix in SUFFIXES])
    place = {name + suffix: (i, suffix) for i, name in enumerate(names) for suffix in SUFFIXES}
    rows.sort(key=lambda row: (place[row["name"]][0], SUFFIXES.index(place[row["name"]][1])))
    versions = {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(row) for row in rows)
    table.write_text(f'{{"versions": {json.dumps(versions)}, "rows": [\n{lines}\n]}}\n')
    args.out.with_suffix(".md").write_text(markdown(names, rows, versions))
    print(f"{sum(row['ok'] for row in rows)} of {len(rows)} pass")


def markdown(names: list[str], rows: list[dict[str, Any]], versions: dict[str, str]) -> str:
    by_name = {row["name"]: row for row in rows}
    lines = [
        "# Every timm architecture with QuAC, a degradation prior, or both inside",
        "",
        "`python benchmarks/timm_coverage.py`; " + ", ".join(f"{k} {v}" for k, v in versions.items()) + ".",
        "",
    ]
    passed = {}
    for suffix in SUFFIXES:
        tried = [by_name[name + suffix] for name in names if name + suffix in by_name]
        passed[suffix] = [row for row in tried if row["ok"]]
        real = [row for row in passed[suffix] if row["real"]]
        lines += [
            f"`{suffix}`: **{len(passed[suffix])} of {len(tried)}** names build, have sites, run forward and backward. "
            f"{len(real)} of them ran for real: their logits differ from the untouched base's by at most "
            f"{max((row['difference'] for row in real), default=0):.2g} of the largest logit. The other "
            f"{len(passed[suffix]) - len(real)} are too large for that here and ran on fake tensors.",
            "",
        ]
    lines += [
        "Layouts of the activations (channel axis / order of q's rows): "
        + counted(layout for row in passed["_qacon"] for layout in row["layouts"]),
        "",
        "Layouts of the features that priors come after: "
        + counted(layout for row in passed["_ddp"] for _, layout, *_ in row["prior"]),
        "",
    ]
    failed = [row for row in rows if not row["ok"]]
    if failed:
        lines += ["## Exceptions", "", "| name | reason |", "|---|---|"]
        lines += [f"| {row['name']} | {row['reason'].replace('|', '/')} |" for row in failed]
        lines.append("")
    lines += [
        "## All",
        "",
        "The last three columns: the difference of the logits where they ran for real.",
        "",
        "| name | activations | tap | priors after | layout | strides | input | ran | _qacon | _ddp | _qacon_ddp |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in names:
        found = [by_name.get(name + suffix, {"ok": False}) for suffix in SUFFIXES]
        merged = {key: value for row in found if row["ok"] for key, value in row.items()}
        if not merged:
            continue
        after, layouts, strides = [[site[i] for site in merged.get("prior", ())] for i in range(3)]
        ran = "real" if merged["real"] else "fake"
        size = "×".join(map(str, merged["input"]))
        differences = [f"{row['difference']:.1g}" if row["ok"] and row["real"] else "" for row in found]
        cells = [name, merged.get("sites", ""), merged.get("tap", "")]
        cells += [", ".join(map(str, values)) for values in (after, dict.fromkeys(layouts), strides)]
        lines.append("| " + " | ".join(map(str, [*cells, size, ran, *differences])) + " |")
    return "\n".join(lines) + "\n"


def counted(values: Iterable[str]) -> str:
    return ", ".join(f"`{value}` {n}" for value, n in Counter(values).most_common())


if __name__ == "__main__":
    main()
