"""Example arguments of diffusers' networks, as far as their configs tell them."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel, UNet2DModel


def example_of(model: Any) -> dict[str, Any] | None:
    """Return small arguments for a UNet or a known transformer; None where only the user knows them.

    Example:
        >>> unet = UNet2DModel(in_channels=4, block_out_channels=(32, 32), down_block_types=("DownBlock2D",) * 2,
        ...                    up_block_types=("UpBlock2D",) * 2)
        >>> {name: getattr(value, "shape", value) for name, value in example_of(unet).items()}
        {'sample': torch.Size([1, 4, 16, 16]), 'timestep': 1}
    """
    config = model.config
    if isinstance(model, SD3Transformer2DModel):
        side = 2 * config.patch_size
        return {"hidden_states": torch.zeros(1, config.in_channels, side, side), **_text(config)}
    if isinstance(model, FluxTransformer2DModel):
        guidance = {"guidance": torch.ones(1)} if config.guidance_embeds else {}
        places = {"img_ids": torch.zeros(6, 3), "txt_ids": torch.zeros(4, 3)}
        return {"hidden_states": torch.zeros(1, 6, config.in_channels), **_text(config), **places, **guidance}
    if not isinstance(model, (UNet2DModel, UNet2DConditionModel)):
        return None
    side = 8 * 2 ** (len(config.block_out_channels) - 1)
    example: dict[str, Any] = {"sample": torch.zeros(1, config.in_channels, side, side), "timestep": 1}
    if (labels := _labels(config)) is not None:
        example["class_labels"] = labels
    if isinstance(model, UNet2DConditionModel):
        width = config.encoder_hid_dim or _first(config.cross_attention_dim)
        example["encoder_hidden_states"] = torch.zeros(1, 4, width)
        if config.addition_embed_type == "text_time":
            text = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            example["added_cond_kwargs"] = {"text_embeds": torch.zeros(1, text), "time_ids": torch.zeros(1, 6)}
    return example


def _text(config: Any) -> dict[str, Any]:
    """Return a transformer's arguments beside the latents: a prompt of four tokens, and the timestep."""
    return {
        "encoder_hidden_states": torch.zeros(1, 4, config.joint_attention_dim),
        "pooled_projections": torch.zeros(1, config.pooled_projection_dim),
        "timestep": torch.ones(1),
    }


def _labels(config: Any) -> torch.Tensor | None:
    if config.class_embed_type in ("projection", "simple_projection"):
        return torch.zeros(1, config.projection_class_embeddings_input_dim)
    if config.class_embed_type == "timestep" or (config.class_embed_type is None and config.num_class_embeds):
        return torch.zeros(1, dtype=torch.long)
    return None


def _first(value: Any) -> int:
    return value[0] if isinstance(value, (list, tuple)) else value
