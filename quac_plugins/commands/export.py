"""``quac export``: a network as a file that runs without this package."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quac_plugins.commands import console
from quac_plugins.parsing import key_values

if TYPE_CHECKING:
    from torch import Tensor, nn


def export_command(
    model: console.Model,
    out: Annotated[Path, typer.Option(help="File to write.")],
    format: Annotated[str, typer.Option(help="onnx, torch-export or torchscript.")] = "onnx",
    base_checkpoint: console.BaseCheckpoint = None,
    checkpoint: console.Checkpoint = None,
    adapter: console.Adapter = None,
    pretrained: console.Pretrained = None,
    model_kwargs: console.ModelKwargs = None,
    num_classes: console.NumClasses = None,
    mean: console.Mean = None,
    std: console.Std = None,
    input_size: console.InputSize = None,
    images: Annotated[
        Path | None, typer.Option(help="Picture or folder of pictures to compare on, the first four. Default: made up.")
    ] = None,
    dynamic_size: Annotated[bool, typer.Option("--dynamic-size", help="Take images of any height and width.")] = False,
    opset: Annotated[int, typer.Option(min=18, help="Opset of ONNX.")] = 18,
    tolerance: Annotated[
        float, typer.Option(min=0, help="What the outputs may differ by, relative to their largest value.")
    ] = 1e-4,
    debug: console.Debug = False,
) -> None:
    """Write a network as ONNX, torch.export or TorchScript for batches of any size, and compare the file with it."""
    with console.plain_errors(debug):
        files = [base_checkpoint, checkpoint, images, *console.files_of(adapter)]
        console.check_output("--out", out, files)
        preprocessing = console.images_of(mean, std, input_size)
        from quac_plugins.deploy import FORMATS, export, require_onnx

        if format not in FORMATS:
            raise ValueError(f"--format: {format!r} is none of {', '.join(FORMATS)}")
        if format == "onnx":
            require_onnx()
        from quac_plugins.evaluate.building import build_model

        network = build_model(
            model,
            base_checkpoint=base_checkpoint,
            checkpoint=checkpoint,
            adapter=adapter,
            model_kwargs=key_values(model_kwargs or []),
            num_classes=num_classes,
            pretrained=pretrained,
            **preprocessing,
        )
        example = _batch(network, images, preprocessing)
        done = export(
            network, out, format=format, example=example, dynamic_size=dynamic_size, opset=opset, tolerance=tolerance
        )
        typer.echo(f"wrote {done}", err=True)


def _batch(network: nn.Module, images: Path | None, preprocessing: dict) -> Tensor:
    """Return up to four pictures as the network's input."""
    import torch

    from quac_plugins.deploy import pictures
    from quac_plugins.evaluate.preprocessing import Crop, data_config, normalized
    from quac_plugins.images import image_files, read_image

    config = data_config(network, **preprocessing)
    if images is None:
        pixels = pictures(2, config["input_size"][-2:])
    else:
        files = [images] if images.is_file() else image_files(images)[:4] if images.is_dir() else []
        if not files:
            raise FileNotFoundError(f"--images: there are no pictures in {images}")
        crop = Crop(config, keep_ready=True)
        pixels = torch.stack([crop(read_image(file)) for file in files])
    return normalized(pixels, network, config)
