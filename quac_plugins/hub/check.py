"""Checking the registry's entries: files, hashes, figures, here and on the Hub."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from quac_plugins.core.inject.adapter import check_adapter_files
from quac_plugins.core.naming import split_name
from quac_plugins.evaluate.data import SYNSET
from quac_plugins.evaluate.npz import unpack
from quac_plugins.hub.card import read_metrics, spread
from quac_plugins.hub.fetch import FILES, model_config
from quac_plugins.hub.published import Published
from quac_plugins.registry import KINDS, Entry, data_folder, published

PACKED = "val.npz"
_TOLERANCE = 0.05  # of a figure in percent: the third digit


def check_registry(on_hub: bool = False, data: Path | None = None) -> Iterator[tuple[str, list[str]]]:
    """Yield each entry's name, with a note if it was not measured, and its problems; at last folders without an entry.

    Args:
        on_hub: fetch and check files on the Hub too.
        data: measure the models of these classes again, and compare their figures: folders of classes, or a folder with
            the packed set ``val.npz``.

    Raises:
        ValueError: the packed set is damaged.
    """
    entries = {name: entry for door in KINDS for name, entry in published(door).items()}
    with ExitStack() as stack:
        if data is not None and (data / PACKED).is_file():
            unpacked = stack.enter_context(tempfile.TemporaryDirectory(prefix="quac-check-"))
            data = unpack(data / PACKED, Path(unpacked) / PACKED)
        for name, entry in entries.items():
            fitting = data if data is not None and _is_of(entry, data) else None
            left_out = data is not None and fitting is None
            yield f"{name} (not measured)" if left_out else name, list(_problems(entry, on_hub, fitting))
    for folder in sorted(path for path in data_folder("hub").iterdir() if path.is_dir()):
        if folder.name not in entries:
            yield folder.name, ["hub/ holds it, and no entry of the registry names it"]


def _problems(entry: Entry, on_hub: bool, data: Path | None) -> Iterator[str]:
    import timm

    if entry.kind != "pipeline" and not timm.is_model(entry.architecture):
        yield f"timm knows no {entry.architecture}"
        return
    if entry.kind == "model" and split_name(entry.architecture)[0] == entry.architecture:
        derived = ("num_classes", "in_chans", "global_pool")  # what timm knows from its own config of the weights
        others = ", ".join(sorted(set(entry.model_args) - set(derived)))
        if wrong := "repo and revision" if entry.repo is not None else others and f"model_args {others}":
            yield (
                f"timm itself reads a whole model under a name of its own, compares no hash and takes {wrong} from no "
                f"registry: embed it, with no other model_args than {', '.join(derived)}"
            )
            return
    if entry.repo is None or on_hub:
        try:
            folder = Published(entry.name, entry).folder()
        except (OSError, ValueError) as error:
            yield str(error)
            return
        yield from _folder_problems(entry, folder)
    if entry.repo is None:
        for name in ("README.md", "metrics.json"):
            if not (entry.folder / name).is_file():
                yield f"hub/{entry.name}/{name} is missing"
    if data is not None:
        yield from _accuracy_problems(entry, data)


def _is_of(entry: Entry, data: Path) -> bool:
    """Return whether a model has the classes of the folders of images; pipelines are measured in their training."""
    names = [folder.name for folder in data.iterdir() if folder.is_dir() and folder.name[0] != "."]
    of_imagenet = all(SYNSET.fullmatch(name) for name in names)
    return entry.kind != "pipeline" and of_imagenet == (entry.input.get("num_classes", 1000) == 1000)


def _folder_problems(entry: Entry, folder: Path) -> Iterator[str]:
    for name in FILES[entry.kind]:
        if not (folder / name).is_file():
            yield f"{folder / name} is missing"
            return
    if entry.kind == "adapter":
        try:
            check_adapter_files(folder)
        except ValueError as error:
            yield str(error)
    elif entry.kind == "model":
        told = model_config(folder).get("architecture")
        if told != entry.architecture:
            yield f"its config.json is of {told}"
    metrics = folder / "metrics.json"
    if metrics.is_file() and entry.kind != "pipeline":
        clean = [report.clean["top1"] for report in read_metrics(metrics) if report.clean]
        if clean and "top1" in entry.metrics and abs(spread(clean)[0] - entry.metrics["top1"]) > 5e-3:
            yield f"top1 is {entry.metrics['top1']} in the registry, {spread(clean)[0]:.2f} in metrics.json"


def _accuracy_problems(entry: Entry, data: Path) -> Iterator[str]:
    import timm

    from quac_plugins.evaluate import evaluate

    wanted = entry.metrics.get("val_top1")
    if wanted is None:
        yield "the entry tells no val_top1 to compare with"
        return
    model = timm.create_model(entry.name, pretrained=True).eval()
    report = evaluate(model, data)
    top1 = report.clean["top1"] if report.clean else float("nan")
    if not abs(top1 - wanted) <= _TOLERANCE:
        yield f"top-1 is {top1:.3f} % on {data.name}, the entry says {wanted:.3f}"
