"""How large the images of an ImageList are: noted on its tensor, which is all that a backbone gets.

While a detector is traced or exported its sizes are no numbers: then q is that of the padded tensor, which is said.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from typing import Any

import torch
from detectron2.structures import ImageList
from torch import nn

from quac_plugins.core.hooks import remove_hooks
from quac_plugins.core.inject import injection_of
from quac_plugins.core.quality.padding import note_sizes

_MARK = "_quac_notes_sizes"
_TRACED = "_quac_traced_images"  # attribute of an ImageList's tensor while it is traced


def is_traced() -> bool:
    """Whether a detector is being traced or exported now, rather than run or compiled for running."""
    return torch.jit.is_tracing() or getattr(torch.compiler, "is_exporting", bool)()


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
        if is_traced() or torch.jit.is_scripting():
            setattr(tensor, _TRACED, True)
            return
        with contextlib.suppress(TypeError, ValueError):  # a list that holds something else than images of these sizes
            note_sizes(tensor, image_sizes)

    setattr(noting, _MARK, True)
    ImageList.__init__ = noting


def watch_traces(backbone: nn.Module) -> None:
    """Warn when a backbone that computes q is traced with a whole detector."""
    if _warn not in backbone._forward_pre_hooks.values():
        backbone.register_forward_pre_hook(_warn)
    record = injection_of(backbone)
    assert record is not None
    record.removed = _watch_no_more


def _warn(backbone: nn.Module, args: tuple) -> None:
    """Hook of a backbone."""
    if is_traced() and args and getattr(args[0], _TRACED, False):
        warnings.warn(
            f"the {type(backbone).__name__} is traced with its detector, and a trace knows the images' sizes no more: "
            "the quality features of the traced detector are of the padded tensor. Give it images that need no padding "
            "(of the traced size, whose sides size_divisibility divides), one size in a batch",
            stacklevel=2,
        )


def _watch_no_more(backbone: nn.Module) -> None:
    remove_hooks(backbone, _warn)
