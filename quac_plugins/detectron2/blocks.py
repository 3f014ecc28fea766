"""detectron2's ResNet blocks with their activations as modules, so that they can be replaced.

detectron2 calls ``F.relu_``. The classes below compute the same with the same parameter names, so its checkpoints load.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock, DeformBottleneckBlock
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


class _Activations:
    """A block whose activations are children named ``acts``."""

    acts: tuple[str, ...]

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.add_activations()

    def add_activations(self) -> None:
        """Give the block its activation modules."""
        for name in self.acts:
            setattr(self, name, nn.ReLU(inplace=True))


class ActBasicStem(_Activations, BasicStem):
    """The stem; its activation is ``act1``."""

    acts = ("act1",)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, C, H, W) to (B, out_channels, H/4, W/4)."""
        return F.max_pool2d(self.act1(self.conv1(x)), kernel_size=3, stride=2, padding=1)


class ActBasicBlock(_Activations, BasicBlock):
    """The block of ResNet-18 and 34; its activations are ``act1`` and, after the sum, ``act2``."""

    acts = ("act1", "act2")

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, H/stride, W/stride)."""
        out = self.conv2(self.act1(self.conv1(x)))
        shortcut = self.shortcut(x) if self.shortcut is not None else x
        return self.act2(out + shortcut)


class ActBottleneckBlock(_Activations, BottleneckBlock):
    """The block of ResNet-50 and deeper; its activations are ``act1``, ``act2`` and, after the sum, ``act3``."""

    acts = ("act1", "act2", "act3")

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, H/stride, W/stride)."""
        out = self.conv3(self.act2(self.conv2(self.act1(self.conv1(x)))))
        shortcut = self.shortcut(x) if self.shortcut is not None else x
        return self.act3(out + shortcut)


class ActDeformBottleneckBlock(_Activations, DeformBottleneckBlock):
    """The bottleneck with a deformable convolution in the middle; it needs detectron2's compiled operators."""

    acts = ("act1", "act2", "act3")

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, H/stride, W/stride)."""
        out = self.act1(self.conv1(x))
        offset = self.conv2_offset(out)
        if self.deform_modulated:
            first, second, mask = torch.chunk(offset, 3, dim=1)
            out = self.conv2(out, torch.cat((first, second), dim=1), mask.sigmoid())
        else:
            out = self.conv2(out, offset)
        out = self.conv3(self.act2(out))
        shortcut = self.shortcut(x) if self.shortcut is not None else x
        return self.act3(out + shortcut)


_CLASSES: dict[type[nn.Module], Any] = {
    BasicStem: ActBasicStem,
    BasicBlock: ActBasicBlock,
    BottleneckBlock: ActBottleneckBlock,
    DeformBottleneckBlock: ActDeformBottleneckBlock,
}


def with_activations(module: M) -> M:
    """Turn detectron2's own stems and blocks inside a module into the classes of this file, in place.

    Subclasses of detectron2's classes stay unchanged.

    Example:
        >>> from detectron2.modeling.backbone.resnet import BottleneckBlock
        >>> block = with_activations(BottleneckBlock(64, 64, bottleneck_channels=16))
        >>> type(block).__name__, block.act3
        ('ActBottleneckBlock', ReLU(inplace=True))
    """
    for block in module.modules():
        cls = _CLASSES.get(type(block))
        if cls is not None:
            block.__class__ = cls
            block.add_activations()  # type: ignore[operator]
    return module
