"""QuAC inside transformers, on latents (Stable Diffusion 3) and on tokens (Flux), and inside feed-forward layers."""

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    UNet2DConditionModel,
)

import quac_plugins as quac
from quac_plugins.core.quality.brisque import brisque
from quac_plugins.diffusers import add_quac
from quac_plugins.diffusers.models import add_to_model
from quac_plugins.images import pictures_of

SHARED = {
    "num_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 8,
    "pooled_projection_dim": 8,
}
PROMPT = {"prompt_embeds": torch.linspace(-1, 1, 32).reshape(1, 4, 8), "pooled_prompt_embeds": torch.ones(1, 8)}


def around(cls, transformer):
    vae = AutoencoderKL(
        block_out_channels=[16, 32],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        norm_num_groups=8,
        latent_channels=4,
        shift_factor=0.1,
    )
    texts = ("", "_2", "_3") if cls is StableDiffusion3Img2ImgPipeline else ("", "_2")
    nothing = {f"{part}{n}": None for part in ("text_encoder", "tokenizer") for n in texts}
    pipe = cls(transformer=transformer, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(), **nothing)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sd3():
    return around(
        StableDiffusion3Img2ImgPipeline,
        SD3Transformer2DModel(
            sample_size=16, patch_size=2, in_channels=4, out_channels=4, caption_projection_dim=32, **SHARED
        ),
    )


def flux():
    return around(
        FluxImg2ImgPipeline,
        FluxTransformer2DModel(
            in_channels=16, num_single_layers=1, axes_dims_rope=(4, 4, 8), guidance_embeds=True, **SHARED
        ),
    )


@pytest.fixture(params=[sd3, flux])
def build(request):
    def make():
        torch.manual_seed(0)
        return request.param()

    return make


@pytest.fixture
def moved_pipe(build):
    pipe = add_quac(build())
    torch.manual_seed(1)
    with torch.no_grad():
        for tensor in quac.adapter_state(pipe.transformer).values():
            tensor.add_(0.2 * torch.randn(tensor.shape))
    return pipe


def run(pipe, image, count=1, **options):
    """Of as many prompts, with an image for all or for each."""
    prompts = {name: value.expand(count, *value.shape[1:]) for name, value in PROMPT.items()}
    arguments = {"image": image, "num_inference_steps": 2, "output_type": "np", **prompts}
    if isinstance(pipe, FluxImg2ImgPipeline):
        arguments |= {"height": 32, "width": 32}
    else:
        arguments |= {f"negative_{name}": -value for name, value in prompts.items()}
    seeds = [torch.Generator().manual_seed(i) for i in range(count)]
    return pipe(**arguments, **options, generator=seeds).images


def test_at_first_it_makes_what_it_made(build, photograph):
    image = photograph(size=(32, 32))
    expected = run(build(), image)
    pipe = add_quac(build())
    assert np.array_equal(run(pipe, image), expected)
    names = [site.name for site in quac.injection_of(pipe.transformer).sites]
    assert any(name.startswith("transformer_blocks.0.ff.net.0") for name in names)
    assert set(quac.remove(pipe.transformer).state_dict()) == set(build().transformer.state_dict())
    assert np.array_equal(run(pipe, image), expected)


def test_q_is_that_of_the_image(moved_pipe, photograph):
    image = photograph(size=(32, 32))
    found, q = run(moved_pipe, image), brisque(pictures_of(image)[0].pixels[None])
    assert np.array_equal(run(moved_pipe, image, q=q), found)
    assert not np.allclose(run(moved_pipe, image, q=-q), found, atol=1e-3)
    if isinstance(moved_pipe, FluxImg2ImgPipeline):
        with pytest.raises(ValueError, match=r"in an order of its own.*one image a call"):
            run(moved_pipe, [image] * 2, 2)
        both = run(moved_pipe, image, 2)
    else:
        both = run(moved_pipe, [image, photograph("coffee", (32, 32))], 2)
    np.testing.assert_allclose(both[0], found[0], atol=2e-3)


def test_saved_and_loaded_it_makes_the_same(moved_pipe, build, photograph, tmp_path):
    image = photograph(size=(32, 32))
    expected = run(moved_pipe, image)
    moved_pipe.save_pretrained(tmp_path / "pipe")
    left_out = {part: None for part, component in moved_pipe.components.items() if component is None}
    again = add_quac(type(moved_pipe).quac_host.from_pretrained(tmp_path / "pipe", **left_out))
    again.set_progress_bar_config(disable=True)
    assert np.array_equal(run(again, image), expected)
    quac.save_adapter(moved_pipe.transformer, tmp_path / "adapter")
    assert np.array_equal(run(add_quac(build(), adapter=tmp_path / "adapter"), image), expected)


def test_another_transformer_needs_an_example():
    torch.manual_seed(0)
    host = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=8, cross_attention_dim=16,
        caption_channels=8, use_additional_conditions=False,
    )  # fmt: skip
    example = {
        "hidden_states": torch.rand(1, 4, 8, 8),
        "encoder_hidden_states": torch.rand(1, 4, 8),
        "timestep": torch.ones(1, dtype=torch.long),
    }
    host.eval()
    with torch.no_grad():
        expected = host(**example, return_dict=False)[0]
        with pytest.raises(RuntimeError, match="give all its arguments, the images first"):
            add_to_model(host)
        found = add_to_model(host, example=example)(**example, q=torch.rand(1, 36), return_dict=False)[0]
    assert torch.equal(found, expected)
    assert [site.name for site in quac.injection_of(host).sites] == ["transformer_blocks.0.ff.net.0.act"]


def test_gates_are_left_alone():
    """A UNet's GEGLU weighs one half of its channels by the other."""
    host = UNet2DConditionModel(
        block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, attention_head_dim=4, cross_attention_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    add_to_model(host, {"where": "all"})
    assert not any("ff.net" in site.name for site in quac.injection_of(host).sites)
