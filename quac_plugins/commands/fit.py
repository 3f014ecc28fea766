"""``quac fit-prior`` and ``quac fit-qacon``: fit what is put into a frozen host, and save it as an adapter."""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quac_plugins.commands import common
from quac_plugins.commands.student import build_student, labelled_files
from quac_plugins.parsing import key_values, numbers

if TYPE_CHECKING:
    from torch import nn

STATES = ".fit"  # inside the adapter's folder, while a fit is unfinished


class Amp(str, Enum):
    """Mixed precision."""

    no = "no"
    bf16 = "bf16"
    fp16 = "fp16"


Name = Annotated[
    str, typer.Argument(help="A timm name, such as resnet50.a1_in1k (_qacon or _ddp may be left out), or hf-hub:….")
]
Out = Annotated[Path, typer.Option(help="Folder for the adapter and its report.")]
Images = Annotated[Path | None, typer.Option(help="A folder of clean photographs; no labels.")]
Pairs = Annotated[
    tuple[Path, Path] | None,
    typer.Option(help="Two folders of the same pictures, in place of --images.", metavar="DEGRADED CLEAN"),
]
Corruptions = Annotated[
    str | None,
    typer.Option(help="Names, groups (noise, blur, weather, digital), all, extra or every; comma-separated."),
]
Severity = Annotated[str, typer.Option(help="1 to 5; several, comma-separated, are mixed.")]
Limit = Annotated[int | None, typer.Option(min=1, help="At most so many images.")]
Views = Annotated[int | None, typer.Option(min=1, help="Crops and flips of each image.")]
Draws = Annotated[int | None, typer.Option(min=1, help="Degraded pictures of each view and corruption.")]
Steps = Annotated[int | None, typer.Option(min=1)]
Rate = Annotated[float | None, typer.Option(help="Highest learning rate.")]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Pictures a step, over all processes.")]
Deep = Annotated[
    list[str] | None,
    typer.Option(help="Places whose features are compared too: stages, none, names. May be repeated."),
]
HeldOut = Annotated[float, typer.Option(help="Share of the images that judge which state is kept.")]
Seed = Annotated[int, typer.Option(help="Of everything that is drawn.")]
AmpOption = Annotated[Amp, typer.Option(help="Mixed precision.")]
Adapter = Annotated[str | None, typer.Option(help="Begin with this adapter, and keep what it holds.")]
Resume = Annotated[
    bool, typer.Option("--resume/--no-resume", help="Go on with an unfinished fit in the folder of --out.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an adapter that is there already.")]
Curve = Annotated[Path | None, typer.Option(help="Draw the held-out loss here: .png, .svg, .pdf, ….")]


def fit_prior_command(
    model: Name,
    out: Out,
    images: Images = None,
    pairs: Pairs = None,
    base_checkpoint: common.BaseCheckpoint = None,
    checkpoint: common.Checkpoint = None,
    pretrained: common.Pretrained = None,
    model_kwargs: common.ModelKwargs = None,
    num_classes: common.NumClasses = None,
    adapter: Adapter = None,
    corruptions: Corruptions = None,
    severity: Annotated[
        str | None, typer.Option(help="1 to 5; several, comma-separated, are mixed. Default: all for margins, else 3.")
    ] = None,
    limit: Limit = None,
    views: Views = None,
    draws: Draws = None,
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
    deep: Deep = None,
    steps: Steps = None,
    lr: Rate = None,
    batch_size: BatchSize = None,
    held_out: HeldOut = 0.2,
    seed: Seed = 0,
    mean: common.Mean = None,
    std: common.Std = None,
    input_size: common.InputSize = None,
    crop_pct: common.CropPct = None,
    interpolation: common.Interpolation = None,
    device: common.Device = None,
    amp: AmpOption = Amp.no,
    num_workers: common.NumWorkers = 0,
    resume: Resume = True,
    overwrite: Overwrite = False,
    json: common.Json = None,
    plot: Curve = None,
    debug: common.Debug = False,
) -> None:
    """Fit a degradation prior inside a frozen network on a few photographs, and save it as an adapter.

    Runs on several GPUs or processes with: torchrun --nproc-per-node N -m quac_plugins.cli fit-prior …
    """
    from quac_plugins.degradations import corruption_names

    with common.plain_errors(debug):
        _check(out, images, pairs, corruptions, overwrite)
        inputs = [images, *(pairs or ()), base_checkpoint, checkpoint, *common.files_of(adapter)]
        common.check_outputs(json, plot, inputs=[*inputs, *common.files_of(str(out))])
        if routed is False and top_k is not None:
            raise ValueError("--top-k is for a routed prior, and --single asks for one module")
        if routed and pairs is not None:
            raise ValueError("--routed needs corruptions to tell apart, and --pairs bring none")
        prior: dict[str, Any] = _given(site=_one_or_several(site), fdm=fdm, fdm_act=fdm_act, top_k=top_k)
        said = [*prior, *(["routed" if routed else "single"] if routed is not None else [])]
        options = key_values(model_kwargs or [])
        other = {"fdm", "fdm_act", "fdm_width", "top_k"} & {*prior, *options}
        if not other and prior.get("site", options.get("site", "norms")) == "norms":
            prior["fdm"] = "margin"  # what any of these says is of other modules
        names = corruption_names("all" if corruptions is None else corruptions) if pairs is None else []
        if routed or (routed is None and len(names) > 1):
            prior["experts"] = names
        looks = common.images_of(mean, std, input_size)
        network = build_student(
            model, {"prior"}, adapter=adapter, prior=prior, said=said, model_kwargs=key_values(model_kwargs or []),
            seed=seed, base_checkpoint=base_checkpoint, checkpoint=checkpoint, pretrained=pretrained,
            num_classes=num_classes, **looks,
        )  # fmt: skip
        _fit(
            "fit_prior", network, images, limit=limit,
            out=out, overwrite=overwrite, resume=resume, json=json, plot=plot, steps=steps, lr=lr,
            batch_size=batch_size, amp=amp.value, deep=_deep(deep), severity=numbers(severity, int, "--severity"),
            views=views, draws=draws, held_out=held_out, seed=seed, crop_pct=crop_pct, interpolation=interpolation,
            device=common.checked_device(device), num_workers=num_workers, pairs=pairs,
            corruptions=corruptions, **looks,
        )  # fmt: skip


def fit_qacon_command(
    model: Name,
    out: Out,
    images: Images = None,
    pairs: Pairs = None,
    base_checkpoint: common.BaseCheckpoint = None,
    checkpoint: common.Checkpoint = None,
    pretrained: common.Pretrained = None,
    model_kwargs: common.ModelKwargs = None,
    num_classes: common.NumClasses = None,
    adapter: Adapter = None,
    corruptions: Corruptions = None,
    severity: Severity = "3",
    limit: Limit = None,
    views: Views = None,
    draws: Draws = None,
    labels: Annotated[
        bool, typer.Option("--labels", help="The images lie in folders of classes: learn from their labels too.")
    ] = False,
    label_weight: Annotated[float, typer.Option(help="Weight of the labels.")] = 1.0,
    class_map: common.ClassMap = None,
    with_prior: Annotated[
        bool, typer.Option("--with-prior", help="Fit the degradation prior too; one is put in if there is none.")
    ] = False,
    deep: Deep = None,
    steps: Steps = None,
    lr: Rate = None,
    batch_size: BatchSize = None,
    held_out: HeldOut = 0.2,
    seed: Seed = 0,
    mean: common.Mean = None,
    std: common.Std = None,
    input_size: common.InputSize = None,
    crop_pct: common.CropPct = None,
    interpolation: common.Interpolation = None,
    device: common.Device = None,
    amp: AmpOption = Amp.no,
    num_workers: common.NumWorkers = 0,
    resume: Resume = True,
    overwrite: Overwrite = False,
    json: common.Json = None,
    plot: Curve = None,
    debug: common.Debug = False,
) -> None:
    """Distil a network into its quality-adaptive activations on degraded photographs, and save them as an adapter.

    Options of the activations go into --model-kwargs: activation=qswish,where=all. Runs on several GPUs or processes
    with: torchrun --nproc-per-node N -m quac_plugins.cli fit-qacon …
    """
    with common.plain_errors(debug):
        _check(out, images, pairs, corruptions, overwrite)
        inputs = [images, *(pairs or ()), base_checkpoint, checkpoint, class_map, *common.files_of(adapter)]
        common.check_outputs(json, plot, inputs=[*inputs, *common.files_of(str(out))])
        if labels and images is None:
            raise ValueError("--labels needs --images, a folder of folders of classes")
        looks = common.images_of(mean, std, input_size)
        network = build_student(
            model, {"quac", "prior"} if with_prior else {"quac"}, adapter=adapter,
            model_kwargs=key_values(model_kwargs or []), seed=seed, base_checkpoint=base_checkpoint,
            checkpoint=checkpoint, pretrained=pretrained, num_classes=num_classes, **looks,
        )  # fmt: skip
        source: Any = images
        extra: dict[str, Any] = {"with_prior": with_prior}
        if labels and images is not None:
            source, limit = labelled_files(images, network, limit, seed, class_map), None
            extra["label_weight"] = label_weight
        _fit(
            "fit_qacon", network, source, limit=limit,
            out=out, overwrite=overwrite, resume=resume, json=json, plot=plot, steps=steps, lr=lr,
            batch_size=batch_size, amp=amp.value, deep=_deep(deep), severity=numbers(severity, int, "--severity"),
            views=views, draws=draws, held_out=held_out, seed=seed, crop_pct=crop_pct, interpolation=interpolation,
            device=common.checked_device(device), num_workers=num_workers, pairs=pairs,
            corruptions=corruptions, **looks, **extra,
        )  # fmt: skip


def _fit(
    kind: str,
    network: nn.Module,
    images: Any,
    *,
    out: Path,
    overwrite: bool,
    resume: bool,
    json: Path | None,
    plot: Path | None,
    deep: Any,
    **options: Any,
) -> None:
    """Fit, write the adapter and its report, and print it."""
    import quac_plugins
    from quac_plugins.evaluate.processes import is_main_process

    states, main = out / STATES, is_main_process()
    if not main:
        warnings.simplefilter("ignore")  # the first process says the same
    elif not resume:
        for state in states.glob("fit-*.pt"):  # and nothing else that may lie there
            state.unlink()
        with contextlib.suppress(OSError):
            states.rmdir()
    try:
        report = getattr(quac_plugins, kind)(network, images, checkpoint=states, deep=deep, **_given(**options))
    except KeyboardInterrupt:
        if main and any(states.glob("fit-*.pt")):
            typer.echo("interrupted; the same command goes on from where it was", err=True)
        raise typer.Exit(common.INTERRUPTED) from None
    if main:
        _save(network, out, states)
        from quac_plugins.fit.report import REPORT_NAME

        typer.echo(str(report))
        common.tell_unreadable(report.unreadable)
        report.to_json(out / REPORT_NAME)
        if json is not None:
            report.to_json(json)
        if plot is not None:
            report.plot(plot)
    if report.diverged:
        if main:
            typer.echo("the loss was not finite: the adapter holds the best state before; try a lower --lr", err=True)
        raise typer.Exit(1)
    if report.unreadable:
        raise typer.Exit(common.UNREADABLE)


def _save(network: nn.Module, out: Path, states: Path) -> None:
    """Write the adapter; what cannot be written is not lost."""
    from quac_plugins import save_adapter

    try:
        save_adapter(network, out)
    except OSError as error:
        if any(states.glob("fit-*.pt")):
            kept = f"the fit is kept in {states}, and the same command goes on from there"
        else:
            kept = f"it is in {save_adapter(network, Path(tempfile.mkdtemp(prefix='quac-fit-')))} instead"
        raise OSError(f"{error}; {kept}") from error


def _check(
    out: Path, images: Path | None, pairs: tuple[Path, Path] | None, corruptions: str | None, overwrite: bool
) -> None:
    """Refuse before the work what would be refused after it."""
    if (images is None) == (pairs is None):
        raise ValueError(f"give either --images or --pairs, got {'neither' if images is None else 'both'}")
    if pairs is not None and corruptions is not None:
        raise ValueError("--pairs are degraded already: leave --corruptions out")
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"--out: {out} is a file, not a folder")
    from quac_plugins.core.inject.saved import CONFIG_NAME, WEIGHTS_NAME
    from quac_plugins.fit.report import REPORT_NAME

    there = [name for name in (CONFIG_NAME, WEIGHTS_NAME, REPORT_NAME) if (out / name).exists()]
    if there and not overwrite:
        raise FileExistsError(f"{out} holds {there[0]} already; give another folder, or --overwrite")
    common.check_folder(out)


def _given(**options: Any) -> dict[str, Any]:
    return {key: value for key, value in options.items() if value is not None}


def _one_or_several(values: list[str] | None) -> str | list[str] | None:
    return values[0] if values is not None and len(values) == 1 else values or None


def _deep(values: list[str] | None) -> str | list[str] | None:
    return None if values == ["none"] else _one_or_several(values) or "stages"
