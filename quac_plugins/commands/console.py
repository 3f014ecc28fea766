"""The shared parts of the commands: options, errors in one line, checks of output files."""

from __future__ import annotations

import contextlib
import math
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from quac_plugins.core.deprecated import warn_of
from quac_plugins.core.files import same_file
from quac_plugins.parsing import numbers

T = TypeVar("T")
WRONG, UNREADABLE, INTERRUPTED = 2, 3, 130
_PICTURES = (".png", ".svg", ".pdf", ".jpg", ".jpeg", ".webp")

Model = Annotated[str, typer.Argument(help="A timm name, such as resnet50_qacon.a1_in1k, hf-hub:… or local-dir:…")]
Adapter = Annotated[str | None, typer.Option(help="Adapter to load: a directory, a published name, or org/name.")]
BaseCheckpoint = Annotated[Path | None, typer.Option(help="File with the host's weights, in place of downloaded ones.")]
Checkpoint = Annotated[Path | None, typer.Option(help="File with the weights of the whole network.")]
Pretrained = Annotated[
    bool | None,
    typer.Option("--pretrained/--no-pretrained", help="Load timm's weights. Default: only if no file is given."),
]
ModelKwargs = Annotated[list[str] | None, typer.Option(help="Arguments of the network: k=v,k2=v2. May be repeated.")]
NumClasses = Annotated[int | None, typer.Option(min=1, help="Number of classes; a file must have the same number.")]
ClassMap = Annotated[Path | None, typer.Option(help="JSON or text file: folder to class index.")]
Mean = Annotated[str | None, typer.Option(help="Mean of the normalization: 0.5 or 0.5,0.5,0.5.")]
Std = Annotated[str | None, typer.Option(help="Standard deviation of the normalization: 0.5 or 0.5,0.5,0.5.")]
InputSize = Annotated[str | None, typer.Option(help="Size of the network's images: side, or height,width.")]
CropPct = Annotated[
    float | None,
    typer.Option(help="Side of the crop over resized side. Default: the network's; images of its size stay unchanged."),
]
Interpolation = Annotated[str | None, typer.Option(help="Interpolation of the resizing: bilinear, bicubic, ….")]
Device = Annotated[str | None, typer.Option(help="Device: cpu, cuda, cuda:1, …. Default: a GPU if there is one.")]
NumWorkers = Annotated[int, typer.Option(min=0, help="Number of processes that read and corrupt.")]
Json = Annotated[Path | None, typer.Option(help="File of the report.")]
Plot = Annotated[Path | None, typer.Option(help="File of a figure of the report: .png, .svg, .pdf, ….")]
OldSeverity = Annotated[str | None, typer.Option("--severity", hidden=True)]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@contextlib.contextmanager
def plain_errors(debug: bool) -> Iterator[None]:
    """Turn an error that the user can mend into one line and exit code 2, and a warning into one line."""
    try:
        with warnings.catch_warnings():
            if not debug:
                warnings.showwarning = _show_warning  # type: ignore[assignment]
                warnings.filterwarnings("default", r"--\S+ is deprecated", DeprecationWarning)  # else Python hides it
            yield
    except (BrokenPipeError, NotImplementedError, RecursionError, typer.Exit):
        raise
    except (AssertionError, ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        if debug:
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        typer.echo(f"error: {text}", err=True)
        raise typer.Exit(WRONG) from None


def new_option(old: str, old_value: T | None, new: str, value: T | None) -> T | None:
    """Return the value of an option by its new name or, with a warning, by its old one."""
    if old_value is None:
        return value
    if value is not None:
        raise ValueError(f"{old} is the old name of {new}; give {new} alone")
    warn_of(old, new)
    return old_value


def _show_warning(message: Warning | str, *where: Any) -> None:
    typer.echo(f"warning: {' '.join(str(message).split())}", err=True)


def images_of(mean: str | None, std: str | None, input_size: str | None) -> dict[str, Any]:
    """Parse mean, std and input_size for `quac_plugins.evaluate`."""
    means, stds = numbers(mean, float, "--mean"), numbers(std, float, "--std")
    if (means is None) != (stds is None):
        raise ValueError("--mean and --std go together: give both or neither")
    if not all(math.isfinite(value) for value in (*(means or ()), *(stds or ()))):
        raise ValueError("--mean and --std must be finite numbers")
    size = numbers(input_size, int, "--input-size")
    return {"mean": means, "std": stds, "input_size": size[0] if size and len(size) == 1 else size}


def check_outputs(
    json: Path | None, plot: Path | None, option: str = "--plot", inputs: Iterable[Path | None] = ()
) -> None:
    """Refuse, before the work, outputs that could not be written after it, or would replace an unrelated file.

    Args:
        json: the file of a report, which may replace an earlier report.
        plot: the file of a figure.
        option: the name of the figure's option.
        inputs: files, and folders of pictures, that the command reads, or writes elsewhere.

    Raises:
        OSError, ValueError: see :func:`check_output`.
    """
    inputs = list(inputs)
    if json is not None:
        check_output("--json", json, inputs)
        if json.is_file() and json.stat().st_size and not _REPORT.search(_head(json)):
            raise FileExistsError(f"--json: {json} is there already, and is no report; give another file, or delete it")
    if plot is not None:
        check_output(option, plot, [*inputs, json])
        if plot.suffix.lower() not in _PICTURES:
            raise ValueError(f"{option}: {plot.name} must end in one of {', '.join(_PICTURES)}")
        if (
            plot.is_file() and plot.stat().st_size and b"atplotlib" not in plot.read_bytes()
        ):  # which signs what it draws
            raise FileExistsError(
                f"{option}: {plot} is there already, and is no figure of ours; give another file, or delete it"
            )
        from quac_plugins.evaluate.plot import require_matplotlib

        require_matplotlib()


def check_output(option: str, path: Path, inputs: Iterable[Path | None]) -> None:
    """Refuse a file that cannot be written, or that is one of the inputs, by any name or link.

    Raises:
        OSError: the path is a folder, or its folder can neither be made nor written into.
        ValueError: the file is an input, or lies among the input pictures.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{option}: {path} is a directory, not a file to write")
    for path_in in inputs:
        if path_in is None or (path.exists() and not path.is_file()):  # a device is no file that could be lost
            continue
        if path_in.is_dir():
            from quac_plugins.images import EXTENSIONS

            inside = Path(os.path.realpath(path_in)) in Path(os.path.realpath(path)).parents
            if inside and path.suffix.lower() in EXTENSIONS:
                raise ValueError(f"{option}: {path} would be one of the pictures in {path_in}; give another place")
        elif same_file(path, path_in):
            raise ValueError(f"{option}: {path} would replace {path_in}, which is needed itself; give another file")
    check_folder(Path(os.path.realpath(path)).parent)


def files_of(adapter: str | None) -> list[Path]:
    """Return the files of an adapter in a local folder, which no output may replace."""
    from quac_plugins.core.inject.adapter_files import CONFIG_NAME, WEIGHTS_NAME

    return [Path(adapter) / name for name in (CONFIG_NAME, WEIGHTS_NAME)] if adapter is not None else []


_REPORT = re.compile(rb'"(model|what)"\s*:')


def _head(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(1 << 16)


def check_folder(folder: Path) -> None:
    """Make a folder and refuse one that cannot be written into."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(f"{folder} is no folder, nor can it be made: a file is in its place") from error
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"cannot write into {folder}")


def tell_unreadable(paths: Iterable[str]) -> None:
    """Print a line for each unreadable file."""
    for path in paths:
        typer.echo(f"unreadable: {path}", err=True)


def checked_device(device: str | None) -> str:
    """Return a usable device; None: this process's GPU or the CPU. ValueError for a device that does not work."""
    import torch

    from quac_plugins.processes import default_device

    if device is None:
        return default_device()
    try:
        if torch.device(device).type == "meta":
            raise ValueError("it holds no numbers")
        torch.empty(1, device=device)
    except Exception as error:  # each kind of device has errors of its own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"--device {device!r} cannot be used: {reason}") from error
    return device
