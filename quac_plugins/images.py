"""Reading pictures in all their forms: one set of rules for fits, evaluations, restorers and doors.

| what | rule |
|---|---|
| file | its first frame; one that cannot be decoded is an OSError that names it |
| PIL image | of any mode; grey, palettes, inks and Lab become RGB; floats (mode F) have no agreed range: ValueError |
| array | (H, W), (H, W, 1) or (H, W, 3): grey or RGB, channels last |
| tensor | (H, W), (1, H, W) or (3, H, W): channels first |
| numbers | uint8; uint16 and 16-bit PIL modes, whose largest value is white; floats in [0, 1], but for rounding |
| EXIF | turned the way up that the camera noted, unless ``upright=False``: evaluations do as torchvision and timm do |
| alpha | beside the colours (:class:`Picture`), or left out where colours alone are wanted |
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

EXTENSIONS = {".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp", ".gif"}
"""How the names of image files end."""
OUTPUTS = ("pil", "np", "pt", "latent")
_TRANSPARENT = ("LA", "La", "PA", "RGBA", "RGBa")
_ROUNDING = 1e-3  # what resizing in floats may leave beyond [0, 1]


@dataclass
class Picture:
    """One image.

    Attributes:
        pixels: (3, H, W), RGB in [0, 1], float32.
        alpha: the transparency of a PIL image, which results get too.
    """

    pixels: Tensor
    alpha: Image.Image | None = None


def pictures_of(image: Any, upright: bool = True) -> list[Picture]:
    """Read every image of a user's argument; each is its own tensor, since sizes may differ.

    Args:
        image: an image of the forms in the module's table, several of them with one more axis in front, or a list.
        upright: whether PIL images are turned as their EXIF says.

    Raises:
        TypeError: the argument has another type.
        ValueError: a shape or a range is wrong, or there is no image. The message names the image.

    Example:
        >>> [tuple(picture.pixels.shape) for picture in pictures_of(np.zeros((2, 8, 6, 3), np.uint8))]
        [(3, 8, 6), (3, 8, 6)]
    """
    items = image if isinstance(image, (list, tuple)) else [image]
    stacks = [isinstance(item, (np.ndarray, Tensor)) and item.ndim == 4 for item in items]
    alone = [item for stack, several in zip(items, stacks, strict=True) for item in (stack if several else [stack])]
    if not alone:
        raise ValueError("there is no image")
    pictures = []
    for index, item in enumerate(alone):
        numbers, alpha = _read(item, f"image {index}" if len(alone) > 1 else "the image", upright)
        if numbers.dtype in (np.uint8, np.uint16):
            numbers = numbers.astype(np.float32) / np.iinfo(numbers.dtype).max
        pixels = torch.from_numpy(np.ascontiguousarray(numbers)).permute(2, 0, 1)
        pictures.append(Picture(pixels.clamp(0, 1).expand(3, -1, -1).contiguous(), alpha))
    return pictures


def to_uint8(image: Any, where: str = "the image", upright: bool = True) -> np.ndarray:
    """Return one image as a new uint8 array (H, W, 3) in RGB, without its transparency.

    Args:
        image: a PIL image, an array or a tensor of the forms in the module's table.
        where: the name of the image in messages.
        upright: whether a PIL image is turned as its EXIF says.

    Raises:
        TypeError: the image has another type or dtype.
        ValueError: the image has a wrong shape or range.

    Example:
        >>> to_uint8(torch.ones(3, 2, 5)).shape, to_uint8(np.full((1, 1), 0.2)).tolist()
        ((2, 5, 3), [[[51, 51, 51]]])
    """
    numbers = _eight_bits(_read(image, where, upright)[0])
    return np.array(np.broadcast_to(numbers, (*numbers.shape[:2], 3)), order="C")


def to_rgb(image: Image.Image, where: str = "the image", upright: bool = True) -> Image.Image:
    """Convert a PIL image to 8-bit RGB; arguments and errors are the same as in :func:`to_uint8`."""
    colours = _of_pil(image, where, upright)[0]
    return Image.fromarray(_eight_bits(colours)).convert("RGB") if isinstance(colours, np.ndarray) else colours


def read_image(path: str | os.PathLike[str], upright: bool = False) -> Image.Image:
    """Read an image file as 8-bit RGB, transparency dropped.

    Args:
        path: the file.
        upright: turn the image as its EXIF says; torchvision and timm, and so evaluations, do not.

    Raises:
        OSError: if the file cannot be read or decoded, whatever the decoder raised.
    """
    with open_image(path) as image:
        return to_rgb(image, upright=upright)


@contextlib.contextmanager
def open_image(path: str | os.PathLike[str]) -> Iterator[Image.Image]:
    """Yield the first frame of an image file, decoded, in its own mode, while the file is open.

    Raises:
        FileNotFoundError: the file does not exist.
        OSError: the file cannot be decoded, or reading inside the context fails; the message names the file.
    """
    if not Path(path).is_file():  # a pipe would be waited for
        what = (
            "is a folder" if os.path.isdir(path) else "is no regular file" if os.path.exists(path) else "is not there"
        )
        raise FileNotFoundError(f"there is no picture {os.fspath(path)}: it {what}")
    try:
        with Image.open(path) as image:
            image.load()
            yield image
    except Exception as error:  # decoders of broken files raise anything, from SyntaxError to struct.error
        raise OSError(f"cannot read {os.fspath(path)}: {type(error).__name__}: {error}") from error


def give_back(pictures: Sequence[Picture], output_type: str) -> Any:
    """Return images in the form that a user asked for.

    Args:
        pictures: images of any sizes.
        output_type: ``"pil"``, a list; ``"np"``, (B, H, W, 3); or anything else, tensors (B, 3, H, W). If the sizes
            differ, a list of arrays or tensors without B.
    """
    if output_type == "pil":
        return [_to_pil(picture) for picture in pictures]
    tensors = [picture.pixels for picture in pictures]
    if output_type == "np":
        arrays = [pixels.permute(1, 2, 0).cpu().numpy() for pixels in tensors]
        return np.stack(arrays) if len({a.shape for a in arrays}) == 1 else arrays
    return torch.stack(tensors) if len({t.shape for t in tensors}) == 1 else tensors


def _to_pil(picture: Picture) -> Image.Image:
    image = Image.fromarray(_eight_bits(picture.pixels.permute(1, 2, 0).cpu().numpy()))
    if picture.alpha is not None:
        image.putalpha(picture.alpha)
    return image


def _eight_bits(numbers: np.ndarray) -> np.ndarray:
    if numbers.dtype == np.uint16:
        return (numbers / 257).round().astype(np.uint8)
    return numbers if numbers.dtype == np.uint8 else (numbers.clip(0, 1) * 255).round().astype(np.uint8)


def _read(image: Any, where: str, upright: bool) -> tuple[np.ndarray, Image.Image | None]:
    """Read an image as uint8, uint16 or floats in [0, 1], of shape (H, W, 1) or (H, W, 3), and its transparency."""
    if isinstance(image, Image.Image):
        colours, alpha = _of_pil(image, where, upright)
        numbers = np.asarray(colours)
        return (numbers if numbers.ndim == 3 else numbers[..., None]), alpha
    if isinstance(image, Tensor):
        kind, channel = "a tensor must have the shape (H, W), (1, H, W) or (3, H, W)", 0
        array = (image.float() if image.is_floating_point() else image).detach().cpu().numpy()
    elif isinstance(image, np.ndarray):
        kind, channel = (
            "an array must have the shape (H, W), (H, W, 1) or (H, W, 3), channels last and without alpha",
            -1,
        )
        array = image.astype(image.dtype.newbyteorder("="), copy=False)
    else:
        raise TypeError(
            f"{where} is of type {type(image).__name__}; expected an array, a tensor or a PIL image, alone, in a list "
            "or in a tuple (image, label)"
        )
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[channel] not in (1, 3)) or 0 in array.shape:
        raise ValueError(f"{where} has the shape {tuple(image.shape)}; {kind}")
    if np.issubdtype(array.dtype, np.floating):
        array = array.astype(np.float32, copy=False)
        _check_range(array, where)
    elif array.dtype not in (np.uint8, np.uint16):
        raise TypeError(
            f"{where} is of dtype {image.dtype}; expected uint8 in 0..255, uint16 or float in [0, 1]: convert it"
        )
    return (array[..., None] if array.ndim == 2 else np.moveaxis(array, channel, -1)), None


def _check_range(array: np.ndarray, where: str) -> None:
    low, high = float(array.min()), float(array.max())
    if low >= -_ROUNDING and high <= 1 + _ROUNDING:  # not so for NaN
        return
    hint = "; those in [-1, 1] become so by (x + 1) / 2" if low >= -1 - _ROUNDING and high <= 1 + _ROUNDING else ""
    raise ValueError(
        f"{where} has values from {low:.4g} to {high:.4g}; images of floats must be in [0, 1]: give them without "
        f"normalization, and values in 0..255 as uint8{hint}"
    )


def _of_pil(image: Image.Image, where: str, upright: bool) -> tuple[Image.Image | np.ndarray, Image.Image | None]:
    """Convert a PIL image to RGB, or one of 16 bits to grey numbers (H, W), and return its transparency too."""
    if image.mode == "F":
        raise ValueError(f"{where} is a PIL image of floats (PIL mode F), which have no agreed range; give an array")
    image = ImageOps.exif_transpose(image) if upright else image
    clear, alpha = image.info.get("transparency"), None
    if image.mode == "I" or image.mode.startswith("I;16"):
        deep = np.asarray(image)
        if deep.size and (deep.min() < 0 or deep.max() > 65535):
            raise ValueError(
                f"{where} (PIL mode {image.mode}) holds integers from {deep.min()} to {deep.max()}, which have no "
                "agreed range but that of 16 bits, 0 to 65535; give an array in [0, 1]"
            )
        alpha = Image.fromarray(np.where(deep == clear, 0, 255).astype(np.uint8)) if clear is not None else None
        return deep.astype(np.uint16), alpha
    if image.mode in _TRANSPARENT or clear is not None:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        alpha = image.getchannel("A")
    return image.convert("RGB"), alpha


def image_files(folder: Path, once: bool = True) -> list[Path]:
    """Return the image files below a folder, sorted; hidden files and folders are left out.

    Links are followed, but never in circles: each folder is entered once. Every picture appears once, under its own
    name rather than a link's name; a picture linked into the folders of two classes belongs to both.

    Args:
        folder: the folder.
        once: False returns a file under each of its names, for uses in which names matter, as in pairs.
    """
    entered = folders_above(folder)
    waiting, later = deque([folder]), deque[Path]()  # links after folders, so that a picture has its own name
    files: list[Path] = []
    links: list[Path] = []
    while waiting or later:
        directory = waiting.popleft() if waiting else later.popleft()
        if directory is not folder:
            if (place := identity(directory)) in entered:
                continue
            entered.add(place)
        try:
            entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
        except OSError as error:
            warnings.warn(f"the pictures in {directory} are left out, since it cannot be read: {error}", stacklevel=2)
            continue
        for entry in entries:
            path = directory / entry.name
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                (later if entry.is_symlink() else waiting).append(path)
            elif path.suffix.lower() in EXTENSIONS:
                (links if entry.is_symlink() else files).append(path)
    paths: dict[tuple[int, int] | Path, Path] = {}
    for path in (*sorted(files), *sorted(links)):
        paths.setdefault(identity(path) if once else path, path)
    return sorted(paths.values())


def folders_above(folder: Path) -> set[tuple[int, int] | Path]:
    """Return the identities of a folder and of the folders above it."""
    real = folder.resolve()
    return {identity(place) for place in (real, *real.parents)}


def identity(path: Path) -> tuple[int, int] | Path:
    """Return a value that all names of one file or folder share; a broken link has its own."""
    try:
        status = path.stat()
    except OSError:
        return path
    return status.st_dev, status.st_ino
