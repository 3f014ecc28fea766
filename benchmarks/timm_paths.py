"""Whether every way through a network of timm sees alike what is put in; over one host of each of timm's modules.

    python benchmarks/timm_paths.py                  # to benchmarks/results/timm_paths.{json,md}
    python benchmarks/timm_paths.py test_byobnet tresnet_m --suffix _qacon

A prior whose modules are not the identity is put behind every stage, or activations that are not those of the host in
their place. ``forward``, ``forward_features`` with ``forward_head``, ``forward_intermediates``, each kind of
``features_only`` (list, hook, getter, fx) and a training step with gradient checkpointing must each run every one of
the prior's modules once, and give the same features and logits. The wrappers of timm are tried around the network with
the prior, and ``NAME_ddp`` is built with ``features_only=True``. Ways that the base itself does not have, or in which
it gives other features than in another, say nothing and are left out.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import re
import time
import traceback
import warnings
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import timm
import torch
from tables import write_tables
from torch import Tensor

import quac_plugins as quac
from quac_plugins.core.activations import ChannelActivation
from quac_plugins.core.prior.fdm import FDM

RESULTS = Path(__file__).parent / "results"
CLASSES = ("list", "hook", "getter", "fx")
SIDE = 64


class Model:
    """A network with what a suffix puts in, none of which is the identity, and which counts how often a prior runs."""

    def __init__(self, base: str, images: Tensor, suffix: str = "", **kwargs: Any):
        torch.manual_seed(0)
        self.net = timm.create_model(base + suffix, **kwargs).eval()
        self.images, self.ran = images, Counter[str]()
        for name, module in self.net.named_modules():
            if isinstance(module, FDM):  # the first place is the first, by whatever name
                last: Any = module.body[-1]
                change(str(self.sites.index(name.rpartition(".")[0])), last.bias, 0.3)
                module.register_forward_hook(lambda *_, name=name: self.ran.update([name]))
            elif isinstance(module, ChannelActivation):
                for parameter in (module.p1, module.p2, module.fc3.bias):
                    change(re.sub(r"^(body|model|graph_module)\.", "", name).replace(".", "_"), parameter, 0.1)

    @property
    def sites(self) -> list[str]:
        """After which modules there is a prior, or in the place of which there are activations."""
        record = quac.injection_of(self.net)
        return [site.name for site in (record.prior or record).sites]

    @property
    def priors(self) -> list[str]:
        """Names of the prior's modules."""
        return [name for name, module in self.net.named_modules() if isinstance(module, FDM)]

    def once(self, way: str, call: Any, least: list[str] | None = None) -> Any:
        """What ``call`` returns; an error if a module of the prior does not run just once."""
        self.ran.clear()
        found = call()
        wrong = {name: self.ran[name] for name in (self.priors if least is None else least) if self.ran[name] != 1}
        if wrong:
            raise AssertionError(f"{way}: the prior runs {wrong} times")
        return found


def change(key: str, parameter: Any, amount: float) -> None:
    """Add numbers that are the same for a key."""
    noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
    parameter.requires_grad_(True).data.add_(noise, alpha=amount)


def same(way: str, found: Any, expected: Any) -> None:
    pairs = list(zip(flat(found), flat(expected), strict=True))
    for i, (one, other) in enumerate(pairs):
        if one.shape != other.shape or not torch.allclose(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max())):
            raise AssertionError(f"{way}: tensor {i} of {len(pairs)} differs")


def alike(found: Any, expected: Any) -> bool:
    try:
        same("", found, expected)
    except (AssertionError, ValueError):
        return False
    return True


def flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for part in values for tensor in flat(part)]


def attempt(call: Any) -> Any:
    """None if a way is not there."""
    try:
        return call()
    except Exception:
        return None


def check(base: str, suffix: str = "_ddp", side: int | None = SIDE) -> dict[str, Any]:
    """Try every way; returns a row of the table, with ``problems``."""
    cfg = timm.get_pretrained_cfg(base)
    channels, height, width = cfg.input_size
    if side is not None and not cfg.fixed_input_size:
        height, width = max(side, 32), max(side, 32)
    torch.manual_seed(2)
    images = torch.randn(2, channels, height, width)
    row: dict[str, Any] = {"name": base, "input": list(images.shape[1:]), "ways": [], "problems": []}
    plain = Model(base, images)
    host = attempt(lambda: intermediates(plain.net, images))
    with torch.no_grad():
        plain.net(images)
    ours = Model(base, images, suffix)
    row["sites"] = ours.sites

    def way(name: str, call: Any) -> Any:
        try:
            found = call()
        except Exception as error:
            row["problems"].append(f"{type(error).__name__}: {name}: {str(error).splitlines()[0][:200]}")
            row.setdefault("where", {})[name] = traceback.format_exc().splitlines()[-4:]
            return None
        if found is not NotImplemented:
            row["ways"].append(name)
        return found

    with torch.no_grad():
        logits = way("forward", lambda: ours.once("forward", lambda: ours.net(images)))
        if attempt(lambda: plain.net.forward_head(plain.net.forward_features(images))) is not None:
            way("forward_features", lambda: in_two(ours, images, logits))
    listed = None
    if host is not None:
        listed = way("forward_intermediates", lambda: intermediates(ours.net, images, ours))
    for kind in CLASSES:
        features(base, suffix, kind, images, ours, way, host, listed)
    checkpointing(base, images, plain.net, ours, way, logits)
    return row


def in_two(ours: Model, images: Tensor, logits: Any) -> None:
    features = ours.once("forward_features", lambda: ours.net.forward_features(images))
    same("forward_head", ours.net.forward_head(features), logits)


def intermediates(net: Any, images: Tensor, ours: Model | None = None) -> list[Tensor]:
    with torch.no_grad():
        if ours is None:
            return net.forward_intermediates(images)[1]
        last, found = ours.once("forward_intermediates", lambda: net.forward_intermediates(images))
        same("forward_intermediates (its last)", last, net.forward_features(images))
    return found


def features(
    base: str, suffix: str, kind: str, images: Tensor, ours: Model, way: Any, host: Any, listed: list[Tensor] | None
) -> None:
    """One kind of ``features_only``, put around the network with the prior, and with the prior put into it."""
    options: dict[str, Any] = {"features_only": True, "feature_cls": kind}
    with torch.no_grad():
        plain = attempt(lambda: Model(base, images, **options))
        before = attempt(lambda: plain.net(images)) if plain is not None else None
        if before is None:
            return
        wrapper = type(plain.net)
        indices = plain.net.feature_info.out_indices

        def compare(found: list[Tensor]) -> None:
            if len(found) != len(before):
                raise AssertionError(f"{len(found)} features, {len(before)} of the base")
            for i, (one, two) in enumerate(zip(before, found, strict=True)):
                known = host is not None and listed is not None and indices[i] < len(host)
                if known and alike(one, host[indices[i]]) and not alike(two, listed[indices[i]]):
                    raise AssertionError(f"feature {indices[i]} is not that of forward_intermediates")

        def around() -> Any:
            choices = [{"flatten_sequential": flat} for flat in (False, True)] if kind in ("hook", "list") else [{}]
            for chosen in choices:  # with which timm wraps the base
                whole = attempt(lambda chosen=chosen: wrapper(timm.create_model(base), indices, **chosen))
                if whole is not None and list(whole._modules) == list(plain.net._modules):
                    break
            else:
                return NotImplemented
            net = wrapper(copy.deepcopy(ours).net, indices, **chosen)
            return compare(net.eval()(images))

        def inside() -> None:
            created = Model(base, images, suffix, **options)
            try:
                compare(created.once(kind, lambda: created.net(images)))
            except AssertionError as error:
                raise AssertionError(f"{error}; sites {created.sites}") from None

        way(f"features_only {kind}", inside)
        way(f"{wrapper.__name__}", around)


def checkpointing(base: str, images: Tensor, plain: Any, ours: Model, way: Any, logits: Any) -> None:
    if attempt(lambda: train(plain, images)) is None:
        return

    def run() -> None:
        ours.ran.clear()
        found = train(ours.net, images)
        lazy = [name for name in ours.priors if ours.ran[name] < 1]
        if lazy:
            raise AssertionError(f"the prior does not run after {lazy}")
        same("logits", found, logits)
        missing = [n for n, p in ours.net.named_parameters() if "quac_prior" in n and p.grad is None]
        if missing:
            raise AssertionError(f"no gradient for {missing[:2]}")

    way("checkpointing", run)


def train(net: Any, images: Tensor) -> Any:
    net.set_grad_checkpointing(True)  # in eval mode: the same numbers, and timm asks torch.jit.is_scripting() alone
    found = net(images)
    sum(tensor.float().mean() for tensor in flat(found)).backward()
    net.set_grad_checkpointing(False)
    return [tensor.detach() for tensor in flat(found)]


def smallest() -> list[str]:
    """The name of fewest parameters of each of timm's modules, the small ones first."""
    table = json.loads((RESULTS / "timm_coverage.json").read_text())
    sizes = {r["name"].removesuffix("_qacon"): r.get("parameters", 0) for r in table["rows"] if "parameters" in r}
    names = []
    for module in timm.list_modules():  # one of them is ours
        ours = [name for name in timm.list_models(module=module) if name in sizes and not name.endswith("_ddp")]
        if ours:
            names.append(min(ours, key=lambda name: sizes[name]))
    return sorted(names, key=lambda name: sizes[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="by default the smallest of each of timm's modules")
    parser.add_argument("--suffix", choices=["_ddp", "_qacon"], default="_ddp", help="what is put in")
    parser.add_argument("--out", type=Path, default=RESULTS / "timm_paths", help="rows of other hosts there stay")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    names, file = smallest(), args.out.with_suffix(".json")
    rows = {(r["suffix"], r["name"]): r for r in (json.loads(file.read_text())["rows"] if file.exists() else ())}
    for name in args.names or names:
        start = time.perf_counter()
        try:
            row = check(name, args.suffix)
        except Exception:
            try:
                row = check(name, args.suffix, None)
            except Exception as error:
                row = {"name": name, "problems": [f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"]}
                row["where"] = {"all": traceback.format_exc().splitlines()[-4:]}
        row |= {"suffix": args.suffix, "seconds": round(time.perf_counter() - start, 1)}
        rows[args.suffix, name] = row
        print(json.dumps(row), flush=True)
        versions = {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__}
        order = sorted(rows.values(), key=lambda r: (r["suffix"], names.index(r["name"]) if r["name"] in names else -1))
        write_tables(args.out, {"versions": versions, "rows": order}, markdown(order, versions, names))


def markdown(rows: list[dict[str, Any]], versions: dict[str, str], names: list[str]) -> str:
    lines = [
        "# Whether every way through a network of timm sees alike what is put in",
        "",
        "`python benchmarks/timm_paths.py`; " + ", ".join(f"{k} {v}" for k, v in versions.items()) + ".",
    ]
    for suffix, what in (("_ddp", "a degradation prior"), ("_qacon", "quality-adaptive activations")):
        ours = [row for row in rows if row["suffix"] == suffix]
        if not ours:
            continue
        good = sum(not row["problems"] for row in ours)
        lines += [
            "",
            f"**`{suffix}`, {what}: {good} of {len(ours)}** hosts, the smallest of each of timm's modules.",
            "",
        ]
        lines += ["| host | sites | ways alike | problems |", "|---|---|---|---|"]
        for row in ours:
            sites = row.get("sites", [])
            shown = ", ".join(sites if len(sites) < 8 else [*sites[:3], "…", f"{sites[-1]} ({len(sites)} in all)"])
            problems = "; ".join([*row["problems"], *row.get("notes", [])]).replace("|", "/")
            lines.append(f"| {row['name']} | {shown} | {', '.join(row.get('ways', ()))} | {problems} |")
        if left := sorted(set(names) - {row["name"] for row in ours}):
            lines += ["", f"Not tried: {', '.join(left)}."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
