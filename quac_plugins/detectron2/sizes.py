"""How large the images of an ImageList are: noted on its tensor, which is all that a backbone gets."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from detectron2.structures import ImageList

from quac_plugins.core.quality.padding import note_sizes

_MARK = "_quac_notes_sizes"


def note_image_sizes() -> None:
    """Let every ImageList note its sizes from now on; it computes what it did before.

    detectron2 has no place to hook into between the padding and the backbone.
    """
    if getattr(ImageList.__init__, _MARK, False):
        return
    original = ImageList.__init__

    @functools.wraps(original)
    def noting(self: ImageList, tensor: torch.Tensor, image_sizes: Any) -> None:
        original(self, tensor, image_sizes)
        if torch.jit.is_tracing() or torch.jit.is_scripting():
            return
        with contextlib.suppress(TypeError, ValueError):  # a list that holds something else than images of these sizes
            note_sizes(tensor, image_sizes)

    setattr(noting, _MARK, True)
    ImageList.__init__ = noting
