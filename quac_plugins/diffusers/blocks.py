"""diffusers' residual blocks with an activation module for each of their activations.

A ``ResnetBlock2D`` calls one module, ``nonlinearity``, three times: after each of its two norms and on the embedding of
the timestep. Parameters for every channel need modules of their own. They become children of the norms, ``norm1.act``
and ``norm2.act``, so that all parameters keep their names and diffusers' own ``forward`` runs as it is.
"""

from __future__ import annotations

import copy
from typing import TypeVar

from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


class ActGroupNorm(nn.GroupNorm):
    """A group norm and the activation after it, ``act``."""

    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H, W)."""
        return self.act(super().forward(input))


class EmbeddingActivation(nn.Module):
    """The activation of the timestep's embedding (B, C); feature maps pass, since their norms have activated them."""

    def __init__(self, act: nn.Module):
        super().__init__()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        """(B, C) activated, (B, C, H, W) as it is."""
        return self.act(x) if x.ndim == 2 else x


def with_activations(model: M) -> M:
    """Give the residual blocks inside a model a module for each of their activations, in place.

    Blocks whose timestep scales between norm and activation (``time_embedding_norm="scale_shift"``) stay as they are:
    their one module serves all of its places.

    Args:
        model: any model of diffusers.

    Returns:
        The model, which computes what it did.

    Example:
        >>> from diffusers import UNet2DModel
        >>> unet = UNet2DModel(block_out_channels=(32, 32), down_block_types=("DownBlock2D",) * 2,
        ...                    up_block_types=("UpBlock2D",) * 2)
        >>> with_activations(unet).down_blocks[0].resnets[0].norm2.act
        SiLU()
    """
    for block in model.modules():
        if not isinstance(block, ResnetBlock2D) or block.time_embedding_norm != "default":
            continue
        norms = (block.norm1, block.norm2)
        if isinstance(block.nonlinearity, EmbeddingActivation) or any(type(norm) is not nn.GroupNorm for norm in norms):
            continue
        for norm in norms:
            norm.__class__ = ActGroupNorm
            norm.act = copy.deepcopy(block.nonlinearity)
        block.nonlinearity = EmbeddingActivation(block.nonlinearity)
    return model
