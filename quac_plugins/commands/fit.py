"""``quac fit-prior`` and ``quac fit-qacon``: fit what is put into a frozen host, and save it as an adapter."""

from __future__ import annotations

import contextlib
import inspect
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import fields, replace
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quac_plugins.commands import console
from quac_plugins.commands.fit_network import build_network, labelled_files
from quac_plugins.core.naming import split_name
from quac_plugins.parsing import key_values, numbers

if TYPE_CHECKING:
    from torch import nn

    from quac_plugins.fit import Data

STATES = ".fit"  # inside the adapter's folder, while a fit is unfinished


class Amp(str, Enum):
    """Mixed precision."""

    no = "no"
    bf16 = "bf16"
    fp16 = "fp16"


def _shared(
    model: Annotated[
        str, typer.Argument(help="A timm name, such as resnet50.a1_in1k (_qacon or _ddp may be left out), or hf-hub:….")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the adapter and its report.")],
    data: Annotated[Path | None, typer.Option(help="A folder of clean photographs; no labels.")] = None,
    images: Annotated[Path | None, typer.Option(hidden=True)] = None,
    pairs: Annotated[
        tuple[Path, Path] | None,
        typer.Option(help="Two folders of the same pictures, in place of --data.", metavar="DEGRADED CLEAN"),
    ] = None,
    base_checkpoint: console.BaseCheckpoint = None,
    checkpoint: console.Checkpoint = None,
    pretrained: console.Pretrained = None,
    model_kwargs: console.ModelKwargs = None,
    num_classes: console.NumClasses = None,
    adapter: Annotated[str | None, typer.Option(help="Begin with this adapter, and keep what it holds.")] = None,
    corruptions: Annotated[
        str | None,
        typer.Option(help="Names, groups (noise, blur, weather, digital), all, extra or every; comma-separated."),
    ] = None,
    severities: Annotated[
        str | None, typer.Option(help="1 to 5; several, comma-separated, are mixed. Default: 3; all for margins.")
    ] = None,
    severity: console.OldSeverity = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Largest number of images.")] = None,
    views: Annotated[int | None, typer.Option(min=1, help="Number of crops and flips of each image.")] = None,
    draws: Annotated[int | None, typer.Option(min=1, help="Number of pictures of each view and corruption.")] = None,
    deep: Annotated[
        list[str] | None,
        typer.Option(help="Places whose features are compared too: stages, none, names. May be repeated."),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Number of steps.")] = None,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Pictures a step, over all processes.")] = None,
    held_out: Annotated[
        float | None,
        typer.Option(help="Share of the images that judge which state is kept. Default: a fifth; of margins a tenth."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of all draws.")] = 0,
    mean: console.Mean = None,
    std: console.Std = None,
    input_size: console.InputSize = None,
    crop_pct: console.CropPct = None,
    interpolation: console.Interpolation = None,
    device: console.Device = None,
    amp: Annotated[Amp, typer.Option(help="Mixed precision.")] = Amp.no,
    num_workers: console.NumWorkers = 0,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Go on with an unfinished fit in the folder of --out.")
    ] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an adapter that is there already.")] = False,
    json: console.Json = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the held-out loss here: .png, .svg, .pdf, ….")] = None,
    debug: console.Debug = False,
) -> None:
    """The options of both commands."""


def _command(function: Callable[..., None]) -> Callable[..., None]:
    """Make a command with the shared options, which its function gets as ``shared``, and with its own options."""
    both = inspect.signature(_shared, eval_str=True).parameters
    extra = dict(inspect.signature(function, eval_str=True).parameters)
    del extra["shared"]

    def command(**options: Any) -> None:
        shared = SimpleNamespace(**{name: options.pop(name) for name in both})
        with console.plain_errors(shared.debug):
            shared.data = console.new_option("--images", shared.images, "--data", shared.data)
            _check(shared, options.get("class_map"))
            function(shared, **options)

    parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in (*both.values(), *extra.values())]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    command.__doc__ = function.__doc__
    return command


@_command
def fit_prior_command(
    shared: Any,
    site: Annotated[
        list[str] | None, typer.Option(help="After which layers: norms, auto, stages, a name, a glob. May be repeated.")
    ] = None,
    fdm: Annotated[
        str | None,
        typer.Option(
            help="Kind of the modules: see quac list --what priors. Default: margin; light at another --site."
        ),
    ] = None,
    fdm_act: Annotated[str | None, typer.Option(help="Activation in them: relu, gelu, …, or qacon and others.")] = None,
    routed: Annotated[
        bool | None,
        typer.Option(
            "--routed/--single", help="One module for each corruption, and a gate. Default: if there are several."
        ),
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Modules that an image is sent to, if routed.")] = None,
    budget: Annotated[
        float | None,
        typer.Option(min=0, help="An experiment: a share of multiply-adds for modules beside margins, such as 0.13."),
    ] = None,
) -> None:
    """Fit a degradation prior inside a frozen network on a few photographs, and save it as an adapter.

    Runs on several GPUs or processes with: torchrun --nproc-per-node N -m quac_plugins.cli fit-prior …
    """
    if routed is False and top_k is not None:
        raise ValueError("--top-k is for a routed prior, and --single asks for one module")
    if routed and shared.pairs is not None:
        raise ValueError("--routed needs corruptions to tell apart, and --pairs bring none")
    prior: dict[str, Any] = _said(site=_one_or_several(site), fdm=fdm, fdm_act=fdm_act, top_k=top_k)
    said = [*prior, *(["routed" if routed else "single"] if routed is not None else [])]
    options = key_values(shared.model_kwargs or [])
    other = {"fdm", "fdm_act", "fdm_width", "top_k"} & {*prior, *options}
    if not other and prior.get("site", options.get("site", "norms")) == "norms":
        prior["fdm"] = "margin"  # what any of these says is of other modules
    data = _data(shared)
    if routed or (routed is None and len(data.names) > 1):
        prior["experts"] = data.names
    if not budget:
        _fit("fit_prior", _network(shared, {"prior"}, prior=prior, said=said), data, shared)
        return
    if "fdm" not in prior or other:
        raise ValueError("--budget chooses the modules: leave --site, --fdm, --fdm-act and --top-k out")
    if "_ddp" in split_name(shared.model)[1]:
        shared.model = shared.model.replace("_ddp", "", 1)  # the fit puts in what it chooses
    from quac_plugins import PriorConfig

    _fit("fit_prior", _network(shared, set(), said=said), data, shared, budget=budget, config=PriorConfig(**prior))


@_command
def fit_qacon_command(
    shared: Any,
    labels: Annotated[
        bool, typer.Option("--labels", help="The images lie in folders of classes: learn from their labels too.")
    ] = False,
    label_weight: Annotated[float, typer.Option(help="Weight of the labels.")] = 1.0,
    class_map: console.ClassMap = None,
    with_prior: Annotated[
        bool, typer.Option("--with-prior", help="Fit the degradation prior too; one is put in if there is none.")
    ] = False,
) -> None:
    """Distil a network into its quality-adaptive activations on degraded photographs, and save them as an adapter.

    Options of the activations go into --model-kwargs: activation=qswish,where=all. Runs on several GPUs or processes
    with: torchrun --nproc-per-node N -m quac_plugins.cli fit-qacon …
    """
    if labels and shared.data is None:
        raise ValueError("--labels needs --data, a folder of folders of classes")
    data = _data(shared)
    network = _network(shared, {"quac", "prior"} if with_prior else {"quac"})
    if labels:
        files = labelled_files(shared.data, network, shared.limit, shared.seed, class_map)
        data = replace(data, images=files, limit=None)
    _fit("fit_qacon", network, data, shared, with_prior=with_prior, label_weight=label_weight if labels else None)


def _data(shared: Any) -> Data:
    """Return the data of the fit from the options."""
    from quac_plugins.fit import Data

    read = vars(shared) | console.images_of(shared.mean, shared.std, shared.input_size) | {"images": shared.data}
    levels = console.new_option("--severity", shared.severity, "--severities", shared.severities)
    read["severities"] = numbers(levels, int, "--severities")
    names = {field.name for field in fields(Data)}
    return Data(**_said(**{name: value for name, value in read.items() if name in names}))


def _network(shared: Any, wanted: set[str], **prior: Any) -> nn.Module:
    names = ("adapter", "seed", "base_checkpoint", "checkpoint", "pretrained", "num_classes")
    options = {name: getattr(shared, name) for name in names}
    options |= console.images_of(shared.mean, shared.std, shared.input_size)
    return build_network(shared.model, wanted, model_kwargs=key_values(shared.model_kwargs or []), **options, **prior)


def _fit(kind: str, network: nn.Module, data: Data, shared: Any, **options: Any) -> None:
    """Fit, write the adapter and its report, and print it."""
    import quac_plugins
    from quac_plugins.processes import is_main_process

    states, main = shared.out / STATES, is_main_process()
    if not main:
        warnings.simplefilter("ignore")  # the first process says the same
    elif not shared.resume:
        for state in states.glob("fit-*.pt"):  # and nothing else that may lie there
            state.unlink()
        with contextlib.suppress(OSError):
            states.rmdir()
    deep = None if shared.deep == ["none"] else _one_or_several(shared.deep) or "stages"
    options |= {"steps": shared.steps, "lr": shared.lr, "batch_size": shared.batch_size, "amp": shared.amp.value}
    device = console.checked_device(shared.device)
    try:
        fit = getattr(quac_plugins, kind)
        report = fit(network, data, checkpoint=states, deep=deep, device=device, **_said(**options))
    except KeyboardInterrupt:
        if main and any(states.glob("fit-*.pt")):
            typer.echo("interrupted; the same command goes on from where it was", err=True)
        raise typer.Exit(console.INTERRUPTED) from None
    if main:
        _save(network, shared.out, states)
        from quac_plugins.fit.report import REPORT_NAME

        typer.echo(str(report))
        console.tell_unreadable(report.unreadable)
        report.to_json(shared.out / REPORT_NAME)
        if shared.json is not None:
            report.to_json(shared.json)
        if shared.plot is not None:
            report.plot(shared.plot)
    if report.diverged:
        if main:
            typer.echo("the loss was not finite: the adapter holds the best state before; try a lower --lr", err=True)
        raise typer.Exit(1)
    if report.unreadable:
        raise typer.Exit(console.UNREADABLE)


def _save(network: nn.Module, out: Path, states: Path) -> None:
    """Write the adapter; if the folder cannot be written, keep the fit elsewhere."""
    from quac_plugins import save_adapter

    try:
        save_adapter(network, out)
    except OSError as error:
        if any(states.glob("fit-*.pt")):
            kept = f"the fit is kept in {states}, and the same command goes on from there"
        else:
            kept = f"it is in {save_adapter(network, Path(tempfile.mkdtemp(prefix='quac-fit-')))} instead"
        raise OSError(f"{error}; {kept}") from error


def _check(shared: Any, class_map: Path | None) -> None:
    """Check, before the work, the options and outputs that would fail after it."""
    data, pairs, out = shared.data, shared.pairs, shared.out
    if (data is None) == (pairs is None):
        raise ValueError(f"give either --data or --pairs, got {'neither' if data is None else 'both'}")
    if pairs is not None and shared.corruptions is not None:
        raise ValueError("--pairs are degraded already: leave --corruptions out")
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"--out: {out} is a file, not a folder")
    from quac_plugins.core.inject.adapter_files import CONFIG_NAME, WEIGHTS_NAME
    from quac_plugins.fit.report import REPORT_NAME

    existing = [name for name in (CONFIG_NAME, WEIGHTS_NAME, REPORT_NAME) if (out / name).exists()]
    if existing and not shared.overwrite:
        raise FileExistsError(f"{out} holds {existing[0]} already; give another folder, or --overwrite")
    console.check_folder(out)
    inputs = [data, *(pairs or ()), shared.base_checkpoint, shared.checkpoint, class_map]
    inputs += [*console.files_of(shared.adapter), *console.files_of(str(out))]
    console.check_outputs(shared.json, shared.plot, inputs=inputs)


def _said(**options: Any) -> dict[str, Any]:
    return {key: value for key, value in options.items() if value is not None}


def _one_or_several(values: list[str] | None) -> str | list[str] | None:
    return values[0] if values is not None and len(values) == 1 else values or None
