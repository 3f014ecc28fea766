"""Images as users of a pipeline give them, as tensors, and back again.

Each picture is its own tensor (3, H, W), so that a batch may hold several sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from torch import Tensor

OUTPUTS = ("pil", "np", "pt", "latent")
_TRANSPARENT = ("LA", "La", "PA", "RGBA", "RGBa")


@dataclass
class Picture:
    """One image.

    Attributes:
        pixels: (3, H, W), RGB in [0, 1], float32.
        alpha: transparency of a PIL image, which goes back onto what is made of it.
    """

    pixels: Tensor
    alpha: PIL.Image.Image | None = None


def pictures_of(image: Any, upright: bool = True) -> list[Picture]:
    """Every image of what a user gave.

    Args:
        image: a PIL image of any mode but floats (16 bits are read as such), an array (H, W), (H, W, C) or
            (B, H, W, C), a tensor (H, W), (C, H, W) or (B, C, H, W), or a list of these; C is 1 or 3. Floats lie in
            [0, 1]; integers are uint8 or uint16, whose largest value is 1.
        upright: turn PIL images the way up that their camera noted.

    Raises:
        TypeError: it is none of these.
        ValueError: a shape or a range is another; there is NaN or infinity; there is no image. The message says in
            which image.

    Example:
        >>> [tuple(picture.pixels.shape) for picture in pictures_of(np.zeros((2, 8, 6, 3), np.uint8))]
        [(3, 8, 6), (3, 8, 6)]
    """
    found = [
        picture for one in (image if isinstance(image, (list, tuple)) else [image]) for picture in _read(one, upright)
    ]
    if not found:
        raise ValueError("there is no image")
    for index, picture in enumerate(found):
        where = f"image {index}" if len(found) > 1 else "the image"
        if not picture.pixels.numel():
            raise ValueError(f"{where} is empty: {tuple(picture.pixels.shape[1:])} pixels")
        if not bool(torch.isfinite(picture.pixels).all()):
            raise ValueError(f"{where} holds NaN or infinity")
        low, high = (float(edge) for edge in torch.aminmax(picture.pixels))
        if low < -1e-3 or high > 1 + 1e-3:
            hint = "; images in [-1, 1] become so by (x + 1) / 2" if low >= -1.001 and high <= 1.001 else ""
            raise ValueError(f"{where} lies in [{low:.3g}, {high:.3g}]; floats must be in [0, 1]{hint}")
        picture.pixels = picture.pixels.clamp(0, 1)
    return found


def _read(image: Any, upright: bool) -> list[Picture]:
    if isinstance(image, PIL.Image.Image):
        return [_of_pil(PIL.ImageOps.exif_transpose(image) if upright else image)]
    if isinstance(image, (np.ndarray, Tensor)):
        return [Picture(pixels) for pixels in _of_numbers(image)]
    raise TypeError(f"image must be a PIL image, an array, a tensor or a list of these, got {type(image).__name__}")


def _of_pil(image: PIL.Image.Image) -> Picture:
    if image.mode == "F":
        raise ValueError("the image holds floats (PIL mode F), which have no agreed range; give an array in [0, 1]")
    clear = image.info.get("transparency")
    if image.mode == "I" or image.mode.startswith("I;16"):
        deep = np.asarray(image)
        if deep.size and (deep.min() < 0 or deep.max() > 65535):
            raise ValueError(
                f"the image (PIL mode {image.mode}) holds integers from {deep.min()} to {deep.max()}, which have no "
                "agreed range but that of 16 bits, 0 to 65535; give an array in [0, 1]"
            )
        seen = PIL.Image.fromarray(np.where(deep == clear, 0, 255).astype(np.uint8)) if clear is not None else None
        return Picture(_of_array(deep.astype(np.uint16)), seen)
    alpha = None
    if image.mode in _TRANSPARENT or clear is not None:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        alpha = image.getchannel("A")
    return Picture(_of_array(np.asarray(image.convert("RGB"))), alpha)


def _of_array(array: np.ndarray) -> Tensor:
    """(H, W) or (H, W, C) as (3, H, W)."""
    if array.dtype in (np.uint8, np.uint16):
        array = array.astype(np.float32) / np.iinfo(array.dtype).max
    pixels = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    pixels = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
    return pixels.expand(3, -1, -1).contiguous()


def _of_numbers(image: np.ndarray | Tensor) -> list[Tensor]:
    """The images of an array (channels last) or a tensor (channels first)."""
    kind = "an array" if isinstance(image, np.ndarray) else "a tensor"
    array: Any = image
    if isinstance(image, Tensor):
        array = (image.float() if image.dtype == torch.bfloat16 else image).detach().cpu().numpy()
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if not (np.issubdtype(array.dtype, np.floating) or array.dtype in (np.uint8, np.uint16)):
        raise TypeError(f"{kind} of images must be floating point in [0, 1], uint8 or uint16, got {image.dtype}")
    channels = {3: 2, 4: 3}.get(array.ndim) if kind == "an array" else {3: 0, 4: 1}.get(array.ndim)
    if array.ndim != 2 and (channels is None or array.shape[channels] not in (1, 3)):
        wanted = "(H, W), (H, W, C) or (B, H, W, C)" if kind == "an array" else "(H, W), (C, H, W) or (B, C, H, W)"
        raise ValueError(f"{kind} of images must be {wanted} with C of 1 or 3, got {tuple(array.shape)}")
    if kind == "a tensor" and array.ndim > 2:
        array = np.moveaxis(array, -3, -1)
    return [_of_array(one) for one in (array if array.ndim == 4 else [array])]


def give_back(pictures: Sequence[Picture], output_type: str) -> Any:
    """Images in the form that a user asked for.

    Args:
        pictures: of any sizes.
        output_type: ``"pil"``, a list; ``"np"``, (B, H, W, 3), or else tensors, (B, 3, H, W), and a list of such
            without B where the sizes differ.
    """
    if output_type == "pil":
        return [_to_pil(picture) for picture in pictures]
    tensors = [picture.pixels for picture in pictures]
    if output_type == "np":
        arrays = [pixels.permute(1, 2, 0).cpu().numpy() for pixels in tensors]
        return np.stack(arrays) if len({a.shape for a in arrays}) == 1 else arrays
    return torch.stack(tensors) if len({t.shape for t in tensors}) == 1 else tensors


def _to_pil(picture: Picture) -> PIL.Image.Image:
    pixels = (picture.pixels.permute(1, 2, 0).cpu().numpy() * 255).round().astype(np.uint8)
    image = PIL.Image.fromarray(pixels)
    if picture.alpha is not None:
        image.putalpha(picture.alpha)
    return image
