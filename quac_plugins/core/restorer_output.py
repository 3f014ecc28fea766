"""Reading the output of an image restorer, in any form that restorers return."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def as_tensor(output: Any, restorer: str, batch: int) -> Tensor:
    """Convert a restorer's output to a floating point tensor (B, 3, H, W); TypeError if it has an unknown form."""
    if not isinstance(output, (Tensor, np.ndarray, list, tuple)) and hasattr(output, "images"):
        output = output.images
    if isinstance(output, (list, tuple)):
        output = _stacked(output, restorer, batch)
    if isinstance(output, np.ndarray):
        if output.ndim != 4 or output.shape[-1] != 3:
            raise ValueError(f"{restorer} returned an array of shape {output.shape}; expected ({batch}, H, W, 3)")
        if output.dtype != np.uint8 and not np.issubdtype(output.dtype, np.floating):
            raise TypeError(
                f"{restorer} returned an array of {output.dtype}; expected floating point in [0, 1], or uint8"
            )
        dtype = np.float64 if output.dtype == np.float64 else np.float32
        numbers = torch.from_numpy(output.astype(dtype)).permute(0, 3, 1, 2)
        return numbers / 255 if output.dtype == np.uint8 else numbers
    if not isinstance(output, Tensor):
        raise TypeError(
            f"{restorer} returned {type(output).__name__}; expected a tensor (B, 3, H, W), an array (B, H, W, 3), a "
            "list of PIL images, or an object with one of these as .images"
        )
    if not output.is_floating_point():
        raise TypeError(
            f"{restorer} returned a tensor of {output.dtype}; expected floating point in [0, 1]: divide by 255"
        )
    return output


def _stacked(pictures: Sequence[Any], restorer: str, batch: int) -> np.ndarray:
    """Stack a list of PIL images or arrays (H, W, 3) to one array (B, H, W, 3)."""
    arrays = [np.asarray(p.convert("RGB")) if hasattr(p, "convert") else p for p in pictures]
    others = sorted({type(a).__name__ for a in arrays if not isinstance(a, np.ndarray)})
    if others:
        raise TypeError(
            f"{restorer} returned a {type(pictures).__name__} that holds {', '.join(others)}; expected PIL images or "
            "arrays (H, W, 3), or a tensor (B, 3, H, W) that is not in a list"
        )
    if len(arrays) != batch:
        raise ValueError(f"{restorer} returned {len(arrays)} images for a batch of {batch}")
    dtypes = sorted({str(a.dtype) for a in arrays})
    if len(dtypes) > 1:
        raise TypeError(f"{restorer} returned images of {' and '.join(dtypes)} in one list; expected one dtype")
    shapes = sorted({a.shape for a in arrays})
    if len(shapes) != 1:
        raise ValueError(f"{restorer} returned images of different shapes, {shapes}; expected one size for a batch")
    return np.stack(arrays)
