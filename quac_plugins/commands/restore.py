"""``quac restore``: degraded pictures in, clean ones out."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Annotated, Any

import typer

from quac_plugins.commands import console

DEFAULT = "restoration_qacon.bsds"  # in the package
_NOTED = ("JPEG", "MPO", "PNG", "WEBP")  # formats whose notes are the camera's alone, not of how the file is laid out
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
    seed: Annotated[int, typer.Option(min=-(2**63), max=2**64 - 1, help="For pipelines that begin with noise.")] = 0,
    device: console.Device = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a result that is there already.")] = False,
    debug: console.Debug = False,
) -> None:
    """Restore a blurred, noisy, hazy, dark or compressed picture."""
    with console.plain_errors(debug):
        picture = _open(image)
        if out.suffix.lower() not in _WRITTEN:
            raise ValueError(f"{out.name} must end in one of {', '.join(_WRITTEN)}")
        console.check_output("the result", out, [image])
        if out.is_file() and not overwrite:
            raise FileExistsError(f"{out} is there already; give another file, or --overwrite")
        console.check_outputs(None, compare, "--compare", inputs=[image, out])
        where = console.checked_device(device)
        import torch

        from quac_plugins.diffusers import QuACRestorationPipeline
        from quac_plugins.images import pictures_of

        pipe = QuACRestorationPipeline.from_pretrained(model).to(where)
        generator = torch.Generator().manual_seed(seed)
        restored = pipe(picture, num_inference_steps=steps, generator=generator, tile_size=tile_size).images[0]
        _save(restored, out, picture)
        typer.echo(f"wrote {out} ({restored.width}×{restored.height})", err=True)
        if compare is not None:
            from quac_plugins.evaluate.comparison_plot import draw_comparison

            pipe.set_progress_bar_config(disable=True)
            before, after = (pictures_of(path)[0].pixels for path in (picture, restored))
            draw_comparison(compare, pipe, before, after, tile_size)
            typer.echo(f"wrote {compare}", err=True)


def _open(path: Path) -> Any:
    """Read a picture, turned as its EXIF says, in the colours of its profile."""
    from PIL import ImageOps

    from quac_plugins.images import open_image

    with open_image(path) as image:
        upright = ImageOps.exif_transpose(image)
        if image.format not in _NOTED:
            upright.info.pop("exif", None)
        if image.format != "MPO":  # a photograph with its previews
            _tell_of_others(image, path)
        return _in_rgb(upright)


def _tell_of_others(image: Any, path: Path) -> None:
    """Tell that a file holds more pictures than the first; later ones may be broken."""
    try:
        frames = getattr(image, "n_frames", 1)
    except Exception:  # decoders of broken files raise anything
        return
    if frames > 1:
        typer.echo(f"{path} holds {frames} pictures; the first is restored", err=True)


def _in_rgb(image: Any) -> Any:
    """Return a picture whose profile, if it has one, is an RGB profile: others do not describe the written file.

    A picture of 8 bits a colour is converted; otherwise the profile is dropped, and the numbers stay.
    """
    from PIL import ImageCms

    profile = image.info.get("icc_profile")
    if not profile or profile[16:20] == b"RGB ":
        return image
    del image.info["icc_profile"]
    if image.mode == "L" and "transparency" in image.info:
        image = image.convert("LA")
    inks = image.getchannel("L") if image.mode == "LA" else image
    if inks.mode not in ("CMYK", "L"):
        return image
    try:
        ink_profile = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted: Any = ImageCms.profileToProfile(inks, ink_profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):  # a broken profile says nothing
        return image
    if image.mode == "LA":
        converted.putalpha(image.getchannel("A"))
    converted.info = {key: value for key, value in image.info.items() if key != "icc_profile"}
    return converted


def _save(image: Any, path: Path, like: Any) -> None:
    """Save a picture with the colour profile and the notes of the degraded one."""
    from PIL import Image

    from quac_plugins.core.files import write_file

    if image.mode == "RGBA" and path.suffix.lower() in (".jpg", ".jpeg", ".bmp"):  # which have no transparency
        ground = Image.new("RGB", image.size, "white")
        ground.paste(image, mask=image.getchannel("A"))
        image = ground
    buffer = io.BytesIO()
    kind = Image.registered_extensions()[path.suffix.lower()]
    options: dict[str, Any] = {"icc_profile": like.info.get("icc_profile")}
    if kind in ("JPEG", "WEBP"):
        options["quality"] = 95
    notes: dict[str, Any] = {}
    if "dpi" in like.info:
        notes["dpi"] = like.info["dpi"]
    if kind in _NOTED and like.info.get("exif"):
        notes["exif"] = like.getexif()
    try:
        image.save(buffer, format=kind, **options, **notes)
    except Exception:  # notes of another format may be too long for this one, or make no sense
        if not notes:
            raise
        buffer = io.BytesIO()
        image.save(buffer, format=kind, **options)
        typer.echo(f"{path}: {' and '.join(notes)} could not be written into it", err=True)
    write_file(path, buffer.getvalue())
