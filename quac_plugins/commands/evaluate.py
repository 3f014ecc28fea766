"""``quac evaluate``: how well a network classifies, clean and under corruptions."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import rich.console
import typer

from quac_plugins.commands import console
from quac_plugins.hub.verify import sha256_of
from quac_plugins.parsing import key_values, numbers

if TYPE_CHECKING:
    from quac_plugins.evaluate import EvaluationReport


def evaluate_command(
    model: console.Model,
    data: Annotated[Path, typer.Option(help="A directory of folders of classes, or one laid out as ImageNet-C.")],
    base_checkpoint: console.BaseCheckpoint = None,
    checkpoint: console.Checkpoint = None,
    adapter: console.Adapter = None,
    pretrained: console.Pretrained = None,
    model_kwargs: console.ModelKwargs = None,
    num_classes: console.NumClasses = None,
    class_map: console.ClassMap = None,
    corruptions: Annotated[
        str, typer.Option(help="Names, groups (noise, blur, weather, digital), all, extra or every; comma-separated.")
    ] = "",
    severities: Annotated[
        str | None, typer.Option(help="1 to 5, comma-separated. Default 3; for ImageNet-C all that are there.")
    ] = None,
    severity: console.OldSeverity = None,
    clean: Annotated[bool, typer.Option(help="Measure the images without corruption too.")] = True,
    limit: Annotated[int | None, typer.Option(min=1, help="Largest number of images, spread over classes.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the corruptions and the choice of images.")] = 0,
    mean: console.Mean = None,
    std: console.Std = None,
    input_size: console.InputSize = None,
    crop_pct: console.CropPct = None,
    interpolation: console.Interpolation = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in a forward pass.")] = 32,
    device: console.Device = None,
    amp: Annotated[bool, typer.Option("--amp", help="Mixed precision.")] = False,
    num_workers: Annotated[
        int | None, typer.Option(min=0, help="Processes that read and corrupt. Default: 2, if there are as many cores.")
    ] = None,
    outcomes: Annotated[
        bool, typer.Option(help="Keep what was predicted for each image in the JSON, for paired comparisons.")
    ] = True,
    json: console.Json = None,
    plot: console.Plot = None,
    debug: console.Debug = False,
) -> None:
    """Measure top-1 and top-5 of a network, clean and under the corruptions of ImageNet-C.

    Runs on several GPUs or processes with: torchrun --nproc-per-node N -m quac_plugins.cli evaluate …
    """
    with console.plain_errors(debug):
        inputs = [data, base_checkpoint, checkpoint, class_map, *console.files_of(adapter)]
        console.check_outputs(json, plot, inputs=inputs)
        images = console.images_of(mean, std, input_size)
        levels = numbers(console.new_option("--severity", severity, "--severities", severities), int, "--severities")
        import torch

        from quac_plugins.evaluate import evaluate
        from quac_plugins.evaluate.building import build_model
        from quac_plugins.processes import is_main_process

        torch.manual_seed(seed)
        arguments: dict[str, Any] = {
            "base_checkpoint": base_checkpoint,
            "checkpoint": checkpoint,
            "adapter": adapter,
            "model_kwargs": key_values(model_kwargs or []),
            "num_classes": num_classes,
            "pretrained": pretrained,
        }
        network = build_model(model, **arguments, **images)
        report = evaluate(
            network,
            data,
            corruptions=corruptions,
            severities=levels,
            limit=limit,
            seed=seed,
            batch_size=batch_size,
            crop_pct=crop_pct,
            interpolation=interpolation,
            device=console.checked_device(device),
            amp=amp,
            num_workers=min(2, os.cpu_count() or 1) if num_workers is None else num_workers,
            clean=clean,
            class_map=class_map,
            outcomes=outcomes,
            **images,
        )
        report.model, report.network["given"] = model, _described(arguments)
        if is_main_process():
            _write(report, json, plot)
    if report.unreadable:
        raise typer.Exit(console.UNREADABLE)


def _described(arguments: dict[str, Any]) -> dict[str, Any]:
    """Describe the arguments that made the network: files with hashes, and the adapter by name."""
    files = {
        key: {"path": str(path), "sha256": sha256_of(path)}
        for key in ("base_checkpoint", "checkpoint")
        if (path := arguments[key]) is not None
    }
    adapter = {"name": arguments["adapter"]} if arguments["adapter"] is not None else None
    return {**arguments, **files, "adapter": adapter}


def _write(report: EvaluationReport, json: Path | None, plot: Path | None) -> None:
    rich.console.Console(soft_wrap=not sys.stdout.isatty()).print(report.table())  # first: a disk may be full
    console.tell_unreadable(report.unreadable)
    for condition, count in report.nan_outputs.items():
        typer.echo(f"NaN in the output for {count} images ({condition}), counted as wrong", err=True)
    if json is not None:
        report.to_json(json)
    if plot is not None:
        report.plot(plot)
