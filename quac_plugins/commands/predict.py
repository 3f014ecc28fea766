"""``quac predict``: a classifier's predictions for pictures, with injected modules and without."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from quac_plugins.commands import console
from quac_plugins.parsing import key_values


def predict_command(
    images: Annotated[list[Path], typer.Argument(help="Pictures.")],
    model: Annotated[str, typer.Option(help="A timm name, such as resnet50.a1_in1k, or hf-hub:….")],
    base_checkpoint: console.BaseCheckpoint = None,
    checkpoint: console.Checkpoint = None,
    adapter: console.Adapter = None,
    pretrained: console.Pretrained = None,
    model_kwargs: console.ModelKwargs = None,
    num_classes: console.NumClasses = None,
    degrade: Annotated[
        str | None, typer.Option(help="Degrade the pictures first: a corruption and a severity, such as fog:3.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Number of classes.")] = 5,
    mean: console.Mean = None,
    std: console.Std = None,
    input_size: console.InputSize = None,
    crop_pct: console.CropPct = None,
    interpolation: console.Interpolation = None,
    device: console.Device = None,
    json: console.Json = None,
    debug: console.Debug = False,
) -> None:
    """Predict the most likely classes of pictures, with the injected modules and without, and tell the quality."""
    with console.plain_errors(debug):
        from quac_plugins.images import read_image

        console.check_outputs(json, None, inputs=[*images, base_checkpoint, checkpoint, *console.files_of(adapter)])
        looks = console.images_of(mean, std, input_size)
        kind, severity = _degradation(degrade)
        pictures = {str(path): _degraded(read_image(path), kind, severity) for path in images}
        import copy

        from quac_plugins.core.inject.record import injection_of
        from quac_plugins.core.inject.surgery import remove
        from quac_plugins.evaluate.building import build_model
        from quac_plugins.evaluate.predict import predict

        network = build_model(
            model, base_checkpoint=base_checkpoint, checkpoint=checkpoint, adapter=adapter, pretrained=pretrained,
            model_kwargs=key_values(model_kwargs or []), num_classes=num_classes, **looks,
        ).to(console.checked_device(device))  # fmt: skip
        host = remove(copy.deepcopy(network)) if injection_of(network) is not None else None
        told = {}
        for name, picture in pictures.items():
            prediction = predict(network, picture, top, host, **looks, crop_pct=crop_pct, interpolation=interpolation)
            told[name] = asdict(prediction)
            typer.echo(_text(name, prediction))
        if json is not None:
            import json as writer

            from quac_plugins.core.files import write_file

            write_file(json, writer.dumps(told, indent=1).encode())


def _degradation(spec: str | None) -> tuple[str | None, int]:
    """Parse a corruption and a severity, such as ``fog:3``."""
    from quac_plugins.degradations import check_severity, corruption_names

    if spec is None:
        return None, 0
    name, _, level = spec.partition(":")
    names = corruption_names(name)
    if len(names) != 1 or not (level or "3").isdigit():
        raise ValueError(f"--degrade takes one corruption and its severity, such as fog:3, got {spec!r}")
    return names[0], check_severity(int(level or 3))


def _degraded(picture: Any, kind: str | None, severity: int) -> Any:
    """Corrupt a picture, at the size that most networks take."""
    if kind is None:
        return picture
    from PIL import Image

    from quac_plugins.degradations import corrupt

    scale = 256 / min(picture.size)
    if scale < 1:
        picture = picture.resize(
            (round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC
        )
    return Image.fromarray(corrupt(picture, kind, severity))


def _text(name: str, prediction: Any) -> str:
    """Return a table: the network's classes beside the host's."""
    lines = [name]
    if prediction.quality:
        said = dict(prediction.quality)
        severity = said.pop("severity", None)
        kinds = ", ".join(f"{kind.replace('_', ' ')} {value:.0f} %" for kind, value in list(said.items())[:3])
        lines.append(f"  quality: {kinds}" + (f"; severity {severity:.1f} of 5" if severity is not None else ""))
    ours = [f"{value:5.1f} %  {label}" for label, value in prediction.classes]
    if prediction.host is None:
        return "\n".join([*lines, *(f"  {line}" for line in ours)])
    theirs = [f"{value:5.1f} %  {label}" for label, value in prediction.host]
    width = max(len(line) for line in (*theirs, "host alone"))
    rows = zip(("host alone", *theirs), ("with what was put in", *ours), strict=True)
    return "\n".join([*lines, *(f"  {left:<{width}}   {right}" for left, right in rows)])
