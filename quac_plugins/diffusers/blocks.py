"""diffusers' residual blocks and feed-forward layers with an activation module for each of their activations.

A ``ResnetBlock2D`` calls one module, ``nonlinearity``, three times: after each of its two norms and on the embedding of
the timestep. Parameters for every channel need modules of their own. They become children of the norms, ``norm1.act``
and ``norm2.act``, so that all parameters keep their names and diffusers' own ``forward`` runs as it is. A transformer's
``GELU`` is a projection and its activation in one: the latter becomes a child, ``act``. Gates (GEGLU) are left alone.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from diffusers.models.activations import GELU
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


class ActGroupNorm(nn.GroupNorm):
    """A group norm and the activation after it, ``act``."""

    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        """Normalize and activate (B, C, H, W); the shape stays."""
        return self.act(super().forward(input))


class ActGELU(GELU):
    """A projection and the activation after it, ``act``."""

    act: nn.Module

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Project and activate (B, N, C) → (B, N, inner)."""
        return self.act(self.proj(hidden_states))


class EmbeddingActivation(nn.Module):
    """A block's ``nonlinearity`` in two: ``embedding`` for the timestep's (B, C), ``maps`` for feature maps.

    Args:
        act: the host's activation.
        maps: the host's activation too, or the identity where the norms activate the feature maps.
    """

    def __init__(self, act: nn.Module, maps: nn.Module):
        super().__init__()
        self.embedding = act
        self.maps = maps

    def forward(self, x: Tensor) -> Tensor:
        """Activate (B, C) by ``embedding`` or (B, C, H, W) by ``maps``; the shape stays."""
        return self.embedding(x) if x.ndim == 2 else self.maps(x)


def with_activations(model: M) -> M:
    """Give residual blocks and feed-forward layers inside a model a module for each of their activations, in place.

    Where the timestep scales between norm and activation (``time_embedding_norm="scale_shift"``) the norms cannot hold
    them: there one module, ``nonlinearity.maps``, serves both places of a block, with parameters for each width.

    Args:
        model: any model of diffusers.

    Returns:
        The model, with the same outputs.

    Example:
        >>> from diffusers import UNet2DModel
        >>> unet = UNet2DModel(block_out_channels=(32, 32), down_block_types=("DownBlock2D",) * 2,
        ...                    up_block_types=("UpBlock2D",) * 2)
        >>> with_activations(unet).down_blocks[0].resnets[0].norm2.act
        SiLU()
    """
    for block in list(model.modules()):
        if type(block) is GELU:
            layer: Any = block
            layer.act = nn.GELU(layer.approximate)
            layer.__class__ = ActGELU
        if not isinstance(block, ResnetBlock2D) or isinstance(block.nonlinearity, EmbeddingActivation):
            continue
        norms, act = (block.norm1, block.norm2), block.nonlinearity
        if block.time_embedding_norm != "default" or any(type(norm) is not nn.GroupNorm for norm in norms):
            block.nonlinearity = EmbeddingActivation(act, copy.deepcopy(act))
            continue
        for norm in norms:
            norm.__class__ = ActGroupNorm
            norm.act = copy.deepcopy(act)
        block.nonlinearity = EmbeddingActivation(act, nn.Identity())
    return model


def without_activations(model: M) -> M:
    """Undo :func:`with_activations`, in place; blocks whose activations were replaced stay as they are.

    Example:
        >>> from diffusers import UNet2DModel
        >>> unet = UNet2DModel(block_out_channels=(32, 32), down_block_types=("DownBlock2D",) * 2,
        ...                    up_block_types=("UpBlock2D",) * 2)
        >>> type(without_activations(with_activations(unet)).down_blocks[0].resnets[0].norm1).__name__
        'GroupNorm'
    """
    for block in list(model.modules()):
        if isinstance(block, ActGELU) and type(block.act) is nn.GELU:
            del block.act
            block.__class__ = GELU  # type: ignore[assignment]
        if isinstance(block, ResnetBlock2D) and isinstance(block.nonlinearity, EmbeddingActivation):
            plain, norms = block.nonlinearity.embedding, (block.norm1, block.norm2)
            acts = [norm.act for norm in norms if isinstance(norm, ActGroupNorm)] or [block.nonlinearity.maps]
            if any(type(act) is not type(plain) for act in acts):
                continue
            for module in norms:
                norm: Any = module
                if isinstance(norm, ActGroupNorm):
                    del norm.act
                    norm.__class__ = nn.GroupNorm  # type: ignore[assignment]
            block.nonlinearity = plain
    return model
