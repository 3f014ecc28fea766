"""``quac restore``: degraded pictures in, clean ones out."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Annotated, Any

import typer

from quac_plugins.commands import common

DEFAULT = "restoration_qacon.bsds"  # in the package
_WRITTEN = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")


def restore_command(
    image: Annotated[Path, typer.Argument(help="The degraded picture.")],
    out: Annotated[Path, typer.Argument(help="Where it goes, 8 bits a colour: .png, .jpg, .webp, .tif, .bmp.")],
    model: Annotated[
        str, typer.Option(help="A restoration pipeline: a published name, a directory, or org/name on the Hub.")
    ] = DEFAULT,
    steps: Annotated[int, typer.Option(min=1, help="Of the way from the degraded image to the clean one.")] = 1,
    compare: Annotated[
        Path | None, typer.Option(help="Draw before and after, the difference, q and the activations here.")
    ] = None,
    tile_size: Annotated[int, typer.Option(min=8, help="Largest side that goes through the network at once.")] = 512,
    seed: Annotated[int, typer.Option(help="For pipelines that begin with noise.")] = 0,
    device: common.Device = None,
    debug: common.Debug = False,
) -> None:
    """Restore a blurred, noisy, hazy, dark or compressed picture."""
    with common.plain_errors(debug):
        common.check_outputs(None, compare, "--compare")
        if out.suffix.lower() not in _WRITTEN:
            raise ValueError(f"{out.name} must end in one of {', '.join(_WRITTEN)}")
        if out.is_dir():
            raise IsADirectoryError(f"{out} is a directory, not a file to write")
        common.check_folder(out.parent)
        picture = _open(image)
        import torch

        from quac_plugins.diffusers import QuACRestorationPipeline
        from quac_plugins.diffusers.images import pictures_of

        pipe = QuACRestorationPipeline.from_pretrained(model).to(device or common.default_device())
        generator = torch.Generator().manual_seed(seed)
        restored = pipe(picture, num_inference_steps=steps, generator=generator, tile_size=tile_size).images[0]
        _save(restored, out, picture.info.get("icc_profile"))
        typer.echo(f"wrote {out} ({restored.width}×{restored.height})", err=True)
        if compare is not None:
            from quac_plugins.evaluate.comparison_plot import draw_comparison

            pipe.set_progress_bar_config(disable=True)
            before, after = (pictures_of(one)[0].pixels for one in (picture, restored))
            draw_comparison(compare, pipe, before, after)
            typer.echo(f"wrote {compare}", err=True)


def _open(path: Path) -> Any:
    """A picture the way up that its camera noted."""
    from PIL import Image, ImageOps

    if not path.is_file():
        raise FileNotFoundError(f"there is no picture {path}")
    try:
        with Image.open(path) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    except Exception as error:  # decoders of broken files raise anything
        raise OSError(f"cannot read {path}: {type(error).__name__}: {error}") from error


def _save(image: Any, path: Path, profile: bytes | None) -> None:
    """With the colour profile of what was restored, without which its colours are others."""
    from PIL import Image

    from quac_plugins.evaluate.report import write_beside

    if image.mode == "RGBA" and path.suffix.lower() in (".jpg", ".jpeg"):  # which have no transparency
        ground = Image.new("RGB", image.size, "white")
        ground.paste(image, mask=image.getchannel("A"))
        image = ground
    buffer = io.BytesIO()
    kind = Image.registered_extensions()[path.suffix.lower()]
    image.save(buffer, format=kind, icc_profile=profile, **({"quality": 95} if kind in ("JPEG", "WEBP") else {}))
    write_beside(path, buffer.getvalue())
