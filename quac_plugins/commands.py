"""The commands of ``quac``: options in, one call, results out.

Results go to standard output, everything else to standard error. Exit codes: 0 all is well, 2 the arguments or the
files they name are wrong, 3 the results are there but some images could not be read.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import rich.console
import typer

from quac_plugins.parsing import key_values, numbers

if TYPE_CHECKING:
    from quac_plugins.evaluate import EvaluationReport

__all__ = ["app"]

WRONG, UNREADABLE = 2, 3
_OURS = re.compile(r"_qacon(\.|$)")
_PICTURES = (".png", ".svg", ".pdf", ".jpg", ".jpeg", ".webp")

app = typer.Typer(
    help="Quality-adaptive activations: what there is, and how well it does.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class What(str, Enum):
    """What ``quac list`` lists."""

    models = "models"
    quality = "quality"
    activations = "activations"
    corruptions = "corruptions"


@app.command("evaluate")
def evaluate_command(
    model: Annotated[str, typer.Argument(help="A timm name, such as resnet50_qacon.a1_in1k, hf-hub:… or local-dir:…")],
    data: Annotated[Path, typer.Option(help="A directory of folders of classes, or one laid out as ImageNet-C.")],
    base_checkpoint: Annotated[
        Path | None, typer.Option(help="File with the host's weights, in place of downloaded ones.")
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="File with the weights of the whole network.")] = None,
    adapter: Annotated[str | None, typer.Option(help="Adapter to put in: a directory, or org/name.")] = None,
    pretrained: Annotated[
        bool | None,
        typer.Option("--pretrained/--no-pretrained", help="Load timm's weights. By default if no file is given."),
    ] = None,
    model_kwargs: Annotated[
        list[str] | None, typer.Option(help="Arguments of the network: k=v,k2=v2. May be repeated.")
    ] = None,
    num_classes: Annotated[int | None, typer.Option(min=1, help="Of the classifier; a file must agree.")] = None,
    class_map: Annotated[Path | None, typer.Option(help="JSON or text file: folder to class index.")] = None,
    corruptions: Annotated[
        str, typer.Option(help="Names, groups (noise, blur, weather, digital), all, extra or every; comma-separated.")
    ] = "",
    severity: Annotated[
        str | None, typer.Option(help="1 to 5, comma-separated. Default 3; for ImageNet-C all that are there.")
    ] = None,
    clean: Annotated[bool, typer.Option(help="Measure the images without corruption too.")] = True,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many images, spread over classes.")] = None,
    seed: Annotated[int, typer.Option(help="Of the corruptions and the choice of images.")] = 0,
    mean: Annotated[str | None, typer.Option(help="Of the normalization: 0.5 or 0.5,0.5,0.5.")] = None,
    std: Annotated[str | None, typer.Option(help="Likewise.")] = None,
    input_size: Annotated[str | None, typer.Option(help="Side, or height,width.")] = None,
    crop_pct: Annotated[
        float | None,
        typer.Option(help="Crop over resized side. By default the network's, images of its very size as they are."),
    ] = None,
    interpolation: Annotated[str | None, typer.Option(help="Of the resizing: bilinear, bicubic, ….")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …. Default: a GPU if there is one.")] = None,
    amp: Annotated[bool, typer.Option("--amp", help="Mixed precision.")] = False,
    num_workers: Annotated[int, typer.Option(min=0, help="Processes that read and corrupt.")] = 0,
    json: Annotated[Path | None, typer.Option(help="Write the report here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the report here: .png, .svg, .pdf, ….")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Measure top-1 and top-5 of a network, clean and under the corruptions of ImageNet-C.

    Runs on several GPUs or processes with: torchrun --nproc-per-node N -m quac_plugins.cli evaluate …
    """
    with _plain_errors(debug):
        _check_outputs(json, plot)
        means, stds = numbers(mean, float, "--mean"), numbers(std, float, "--std")
        if (means is None) != (stds is None):
            raise ValueError("--mean and --std go together: give both or neither")
        if not all(math.isfinite(value) for value in (*(means or ()), *(stds or ()))):
            raise ValueError("--mean and --std must be finite numbers")
        size = numbers(input_size, int, "--input-size")
        side = size[0] if size and len(size) == 1 else size
        severities = numbers(severity, int, "--severity")
        import torch

        from quac_plugins.evaluate import evaluate
        from quac_plugins.evaluate.model import build_model
        from quac_plugins.evaluate.processes import is_main_process

        torch.manual_seed(seed)
        network = build_model(
            model,
            base_checkpoint=base_checkpoint,
            checkpoint=checkpoint,
            adapter=adapter,
            model_kwargs=key_values(model_kwargs or []),
            num_classes=num_classes,
            input_size=side,
            mean=means,
            std=stds,
            pretrained=pretrained,
        )
        report = evaluate(
            network,
            data,
            corruptions=corruptions,
            severities=severities,
            limit=limit,
            seed=seed,
            batch_size=batch_size,
            mean=means,
            std=stds,
            input_size=side,
            crop_pct=crop_pct,
            interpolation=interpolation,
            device=device or _default_device(),
            amp=amp,
            num_workers=num_workers,
            clean=clean,
            class_map=class_map,
        )
        report.model = model
        if is_main_process():
            _write(report, json, plot)
    if report.unreadable:
        raise typer.Exit(UNREADABLE)


@app.command("list")
def list_command(
    pattern: Annotated[str, typer.Argument(help="Wildcards * and ?; without them, a part of the name.")] = "*",
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Only models with weights, with their tags.")
    ] = False,
    what: Annotated[What, typer.Option(help="What to list.")] = What.models,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """List names, one a line: models of this package, quality functions, activations or corruptions."""
    from quac_plugins.parsing import matching

    with _plain_errors(debug):
        names = matching(_names(what, pretrained), pattern)
        typer.echo("".join(f"{name}\n" for name in names), nl=False)
        if not names:
            typer.echo(f"no {what.value} match {pattern!r}", err=True)


def _names(what: What, pretrained: bool) -> list[str]:
    if what is What.corruptions:
        from quac_plugins.degradations import CORRUPTIONS, EXTRA_CORRUPTIONS

        return [*CORRUPTIONS, *EXTRA_CORRUPTIONS]
    import quac_plugins

    if what is What.quality:
        return quac_plugins.quality_names()
    if what is What.activations:
        from quac_plugins.core.activations import ACTIVATIONS

        return sorted(ACTIVATIONS)
    import timm

    return [name for name in timm.list_models(pretrained=pretrained) if _OURS.search(name)]


@contextlib.contextmanager
def _plain_errors(debug: bool) -> Iterator[None]:
    """Turn an error that the user can mend into one line and exit code 2."""
    try:
        yield
    except (BrokenPipeError, NotImplementedError, RecursionError):
        raise
    except (AssertionError, ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        if debug:
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        typer.echo(f"error: {text}", err=True)
        raise typer.Exit(WRONG) from None


def _check_outputs(json: Path | None, plot: Path | None) -> None:
    """Refuse before the work what could not be written after it."""
    for path in (json, plot):
        if path is not None:
            if path.is_dir():
                raise IsADirectoryError(f"{path} is a directory, not a file to write")
            path.parent.mkdir(parents=True, exist_ok=True)
            if not os.access(path.parent, os.W_OK):
                raise PermissionError(f"cannot write into {path.parent}")
    if plot is not None:
        if plot.suffix.lower() not in _PICTURES:
            raise ValueError(f"--plot: {plot.name} must end in one of {', '.join(_PICTURES)}")
        from quac_plugins.evaluate.plot import require_matplotlib

        require_matplotlib()


def _write(report: EvaluationReport, json: Path | None, plot: Path | None) -> None:
    if json is not None:
        report.to_json(json)
    if plot is not None:
        report.plot(plot)
    rich.console.Console(soft_wrap=not sys.stdout.isatty()).print(report.table())
    for path in report.unreadable:
        typer.echo(f"unreadable: {path}", err=True)
    for condition, count in report.nan_outputs.items():
        typer.echo(f"NaN in the output for {count} images ({condition}), counted as wrong", err=True)


def _default_device() -> str:
    import torch

    count = torch.cuda.device_count()
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % count}" if count else "cpu"
