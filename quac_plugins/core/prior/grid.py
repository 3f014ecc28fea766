"""The grid of an image's tokens: the image's size over the site's stride; the first layer notes the size.

Blocks take tokens (B, N, C) and not the shape of their picture. So for a prior among tokens, the first layer that sees
the image notes the image's size in the same forward.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from typing import Any

from torch import Tensor, nn

from quac_plugins.core.graphs import compiling
from quac_plugins.core.hooks import SIZE_NAME, remove_hooks, size_pre_hook
from quac_plugins.core.prior.sites import Grid, PriorSite
from quac_plugins.core.private import in_backward

_KEPT = 64  # sizes that a recomputation under activation checkpointing may be of


class ImageSize:
    """The size (H, W) of a network's current images, for each thread; the first layer notes it, priors read it."""

    def __init__(self) -> None:
        self.size: Any = None  # the plain attribute, read while compiling
        self._compiled = False  # the latest note is of compiled code
        self._local = threading.local()
        self._recent: deque[tuple[weakref.ref[Tensor], Grid]] = deque(maxlen=_KEPT)

    def __reduce__(self) -> Any:  # a copy has seen nothing yet
        return type(self), ()

    def note(self, images: Any) -> None:
        """Note the size of images (B, C, H, W); anything else has none."""
        size = tuple(images.shape[-2:]) if isinstance(images, Tensor) and images.ndim == 4 else None
        if compiling():
            self.size, self._compiled = size, True
            return
        size = (int(size[0]), int(size[1])) if size is not None else None  # tensors while torch.jit.trace runs
        self.size, self._compiled, self._local.size = size, False, size
        if size is not None:
            self._recent.append((weakref.ref(images), size))

    def grid(self, site: PriorSite, tokens: Any) -> Grid | None:
        """Return (h, w) of N tokens at a site; None if no known image has a grid of N tokens.

        Raises:
            ValueError: images of several shapes fit.
        """
        if compiling():
            return _grid(site, tokens, self.size)
        if in_backward():  # recomputed in backward, whose forward may not be the last
            # of images that are still needed; where none is, since nothing before the prior is trained, of the last
            sizes: list[Any] = [size for images, size in self._recent if images() is not None] or [self.size]
        else:
            sizes = [getattr(self._local, "size", None)]
            if self._compiled or sizes == [None]:  # another thread's at worst
                sizes.append(self.size)
        grids = {grid for size in sizes if (grid := _grid(site, tokens, size)) is not None}
        if len(grids) > 1:
            shapes = " and ".join(f"{height}×{width}" for height, width in sorted(grids))
            raise ValueError(
                f"the prior after {site.name!r} got {tokens} tokens and cannot tell whether they are {shapes}, since "
                "images of both shapes went through the network before backward, or compiled and not. Call backward "
                "before images of another shape, and compile the whole network"
            )
        return grids.pop() if grids else None


def _grid(site: PriorSite, tokens: Any, size: Any) -> Grid | None:
    if size is None or site.stride < 1:
        return None
    height, width = size
    for grid in ((height // site.stride, width // site.stride), (-(-height // site.stride), -(-width // site.stride))):
        if site.prefix + grid[0] * grid[1] == tokens:
            return grid
    return None


class SizeNote(nn.Module):
    """A child of the first layer that notes the image's size; a module, so that torch.fx keeps the call."""

    _is_impure = True

    def __init__(self, size: ImageSize):
        super().__init__()
        self.size = size

    def forward(self, images: Any, observe: bool = False) -> Any:
        """Return ``images`` unchanged, as the tap does; the layer's hook lets the module ``observe``."""
        if observe:
            self.size.note(images)
        return images

    def attach(self, layer: nn.Module) -> None:
        """Become a child of the layer, and hook its calls."""
        layer.add_module(SIZE_NAME, self)
        layer.register_forward_pre_hook(size_pre_hook, with_kwargs=True)

    @staticmethod
    def detach(layer: nn.Module) -> SizeNote:
        """Undo :meth:`attach` and return the child."""
        remove_hooks(layer, size_pre_hook)
        note = layer.get_submodule(SIZE_NAME)
        assert isinstance(note, SizeNote)
        delattr(layer, SIZE_NAME)
        return note
