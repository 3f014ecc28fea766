"""Run a classifier over the images of a directory, clean and corrupted, and count."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from quac_plugins.degradations import CORRUPTIONS, EXTRA_CORRUPTIONS, check_severity, corruption_names
from quac_plugins.evaluate.data import CLEAN, ImageDirectory, Item
from quac_plugins.evaluate.images import CorruptedImages, Job, worker_init
from quac_plugins.evaluate.lending import describe_network, lent
from quac_plugins.evaluate.outcomes import NAN, UNREAD, interleaved, judge, name_of, outcomes_of, scores_of
from quac_plugins.evaluate.preprocessing import Crop, data_config, normalized, sources_of
from quac_plugins.evaluate.report import EvaluationReport, software_versions
from quac_plugins.processes import process_group
from quac_plugins.progress import Show, progress_bar

__all__ = ["evaluate"]

Condition = tuple[str, int]


def evaluate(
    model: nn.Module,
    data: str | Path,
    *,
    corruptions: str | Iterable[str] = (),
    severities: int | Iterable[int] | None = None,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 32,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    input_size: int | Sequence[int] | None = None,
    crop_pct: float | None = None,
    interpolation: str | None = None,
    device: str | torch.device | None = None,
    amp: bool | torch.dtype | None = None,
    num_workers: int = 0,
    clean: bool = True,
    class_map: str | Path | Mapping[str, int] | None = None,
    outcomes: bool = True,
    progress: bool = True,
) -> EvaluationReport:
    """Measure top-1 and top-5 of a classifier, on clean images and under corruptions.

    An image is resized and cropped by the model's timm data config, corrupted at that resolution as in ImageNet-C
    (Hendrycks and Dietterich, ICLR 2019), and normalized. Its noise depends on the seed and its name alone, so the
    numbers do not depend on the batch size, the workers or the processes (up to rounding in the network itself). Under
    `torchrun` every process takes its share of the images and returns the whole report. The model's modes and device
    and the generators of torch and numpy are restored.

    Args:
        model: a network from float images (B, 3, H, W) to logits (B, C).
        data: a directory of folders of classes; or one laid out as ImageNet-C, whose corrupted images are read.
        corruptions: names or sets of `quac_plugins.degradations.corruption_names`. For ImageNet-C: the corruptions to
            read; none means all of the directory.
        severities: one or several, from 1 to 5. None: 3, and for ImageNet-C all of the directory.
        limit: the largest number of images, from as many classes as possible; equal images for every corruption.
        seed: the seed of the corruptions and of the choice of images.
        batch_size: the number of images in a forward pass.
        mean: the mean of the normalization. None here, and for the four arguments below: the model's own value.
        std: the standard deviation of the normalization.
        input_size: the side of a square, (H, W) or (3, H, W).
        crop_pct: the side of the crop over the side of the resized image. None: the model's own value, but an image of
            the network's size, as in ImageNet-C, stays unchanged.
        interpolation: the interpolation of the resizing.
        device: the device of the run. None: the model's device.
        amp: a dtype for `torch.autocast`; True means float16 on a GPU and bfloat16 elsewhere.
        num_workers: the number of processes that read and corrupt.
        clean: whether to measure the images without corruption too.
        class_map: folder → class index, or a file with this mapping.
        outcomes: whether the report keeps the prediction for each image: about 8 bytes of JSON for each image and
            condition.
        progress: whether to show a bar, if standard error is a terminal and `rich` is installed.

    Returns:
        The report. A file that cannot be read is left out of the counts and listed in ``unreadable``; a row of logits
        with a NaN counts as wrong and is counted in ``nan_outputs``.

    Raises:
        FileNotFoundError: the directory or the class map does not exist.
        ImportError: corruptions are requested, and `imagecorruptions` is not installed.
        ValueError: an argument is out of range, there are no images, or a class is none of the model's.
        TypeError: the model returns no logits.

    Example:
        >>> import pathlib, tempfile, timm
        >>> from PIL import Image
        >>> model = timm.create_model("test_resnet", num_classes=2)
        >>> with tempfile.TemporaryDirectory() as root:
        ...     for name in ("black", "white"):
        ...         folder = pathlib.Path(root, name)
        ...         folder.mkdir()
        ...         Image.new("RGB", (200, 180), name).save(folder / "image.png")
        ...     report = evaluate(model, root, corruptions="contrast", severities=[1, 3])
        >>> report.clean["n"], sorted(report.corruptions["contrast"]), report.unreadable
        (2, ['1', '3'], [])
    """
    if batch_size < 1 or num_workers < 0:
        raise ValueError("batch_size must be at least 1 and num_workers at least 0")
    start = time.perf_counter()
    wrapped = getattr(model, "module", None)  # of DataParallel and DistributedDataParallel
    inner = wrapped if isinstance(wrapped, nn.Module) else model
    num_classes = getattr(inner, "num_classes", None)
    settings: dict[str, Any] = {"mean": mean, "std": std, "input_size": input_size, "crop_pct": crop_pct}
    settings["interpolation"] = interpolation
    config, sources = data_config(inner, **settings), sources_of(inner, settings)
    network = describe_network(inner)
    directory = ImageDirectory(data, num_classes, class_map)
    conditions = _conditions(directory, corruptions, severities, clean)
    chosen = directory.limited(limit, seed)
    with process_group() as processes, lent(model, device) as where, progress_bar(progress) as show:
        autocast = _autocast_dtype(amp, where)
        shares = {c: list(processes.share(chosen[c if directory.is_imagenet_c else CLEAN])) for c in conditions}
        jobs = _jobs(shares, apply=not directory.is_imagenet_c)
        images = CorruptedImages(jobs, Crop(config, keep_ready=crop_pct is None), config["input_size"][-2:], seed)
        loader = DataLoader(
            images,  # type: ignore[arg-type]
            batch_size=batch_size,
            num_workers=num_workers,
            worker_init_fn=worker_init,
            generator=torch.Generator(),
            pin_memory=where.type == "cuda",
        )
        rows = {c: np.full((len(share), 2), UNREAD, dtype=np.int32) for c, share in shares.items()}
        unreadable = _judge_all(model, loader, jobs, rows, config, where, _autocast(autocast, where), show)
        parts = processes.gather((rows, unreadable))
        device = _device(where)
    rows_of = {c: interleaved([part[0][c] for part in parts]) for c in conditions}
    total = {c: scores_of(rows_of[c]) for c in conditions}
    nan = {name_of(c): int((rows_of[c][:, 0] == NAN).sum()) for c in conditions}
    corrupted = {c: total[c] for c in conditions if c != CLEAN}
    items = {c: chosen[c if directory.is_imagenet_c else CLEAN] for c in conditions}
    return EvaluationReport(
        model=_name(inner),
        clean=total.get(CLEAN),
        corruptions={
            name: {str(s): corrupted[n, s] for n, s in corrupted if n == name}
            for name in dict.fromkeys(n for n, _ in corrupted)
        },
        unreadable=sorted({path for part in parts for path in part[1]}),
        nan_outputs={name: count for name, count in nan.items() if count},
        seed=seed,
        severities=sorted({severity for _, severity in corrupted}),
        limit=limit,
        data=str(data),
        layout="imagenet-c" if directory.is_imagenet_c else "classes",
        preprocessing={**config, "keep_ready": crop_pct is None, "from": sources},
        versions=software_versions(),
        seconds=round(time.perf_counter() - start, 3),
        network=network,
        device=device,
        precision=_precision(inner, autocast),
        outcomes=outcomes_of(items, rows_of) if outcomes else {},
    )


def _conditions(
    directory: ImageDirectory, corruptions: str | Iterable[str], severities: int | Iterable[int] | None, clean: bool
) -> list[Condition]:
    if isinstance(severities, int):
        severities = [severities]
    levels = None if severities is None else list(dict.fromkeys(check_severity(s) for s in severities))
    if not directory.is_imagenet_c:
        names = corruption_names(corruptions)
        levels = [3] if levels is None else levels
        if names and not levels:
            raise ValueError("corruptions are asked for, but no severity")
        if not names and not clean:
            raise ValueError("nothing to measure: no corruptions, and clean images are left out")
        return [CLEAN] * clean + [(name, severity) for name in names for severity in levels]
    known = CORRUPTIONS + EXTRA_CORRUPTIONS
    ordered = sorted(directory.conditions, key=lambda c: (known.index(c[0]) if c[0] in known else len(known), c))
    present = list(dict.fromkeys(name for name, _ in ordered))
    words = corruptions.split(",") if isinstance(corruptions, str) else list(corruptions)
    names = [n for word in words for n in ([word.strip()] if word.strip() in present else corruption_names(word))]
    chosen = [c for c in ordered if (not names or c[0] in names) and (levels is None or c[1] in levels)]
    lacking = [name for name in names if name not in present]
    if lacking or not chosen:
        what = f"no {', '.join(lacking)}" if lacking else f"no severity of {levels}"
        raise ValueError(f"{directory.root} holds {what}; it holds {', '.join(f'{n}/{s}' for n, s in ordered)}")
    return chosen


def _jobs(shares: dict[Condition, list[Item]], apply: bool) -> list[Job]:
    jobs = [Job(item, c, apply, place) for c, items in shares.items() for place, item in enumerate(items)]
    return sorted(jobs, key=lambda job: job.item.key)


def _judge_all(
    model: nn.Module,
    loader: DataLoader,
    jobs: list[Job],
    rows: dict[Condition, np.ndarray],
    config: dict[str, Any],
    device: torch.device,
    autocast: contextlib.AbstractContextManager,
    show: Show,
) -> set[str]:
    """Fill in the outcomes, and return the files that could not be read."""
    unreadable: set[str] = set()
    for place, (pixels, targets, indices, readable) in enumerate(loader, 1):
        show("evaluating", place, len(loader))
        unreadable.update(str(jobs[i].item.path) for i in indices[~readable].tolist())
        if not readable.any():
            continue
        pixels, targets, indices = pixels[readable].to(device), targets[readable], indices[readable]
        with torch.inference_mode(), autocast:
            logits = model(normalized(pixels, model, config))
        for i, row in zip(indices.tolist(), judge(logits, targets), strict=True):
            rows[jobs[i].condition][jobs[i].place] = row
    return unreadable


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _autocast(dtype: torch.dtype | None, device: torch.device) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def _autocast_dtype(amp: bool | torch.dtype | None, device: torch.device) -> torch.dtype | None:
    if isinstance(amp, torch.dtype) or not amp:
        return amp or None
    return torch.float16 if device.type == "cuda" else torch.bfloat16


def _device(device: torch.device) -> str:
    return f"{device.type} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def _precision(model: nn.Module, autocast: torch.dtype | None) -> str:
    kinds = [str(_dtype(model)), *([f"autocast {autocast}"] if autocast is not None else [])]
    return ", ".join(kinds).replace("torch.", "")


def _name(model: nn.Module) -> str:
    config = getattr(model, "pretrained_cfg", None) or {}
    parts = [config.get("architecture"), config.get("tag")]
    return ".".join(part for part in parts if part) or type(model).__name__
