"""QuAC inside pipelines of diffusers that exist: preserved, with the q of their image, saved and loaded."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMScheduler,
    LDMSuperResolutionPipeline,
    MarigoldDepthPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionUpscalePipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)

import quac_plugins as quac
from quac_plugins.core.quality.brisque import brisque
from quac_plugins.diffusers import add_quac
from quac_plugins.images import pictures_of

VAE = {
    "block_out_channels": [16, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 8,
}
UNET = {
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": 16,
    "attention_head_dim": 4,
}
TEXT = torch.linspace(-1, 1, 32).reshape(1, 4, 8)


def conditional(**changes):
    kinds = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    return UNet2DConditionModel(**UNET, **kinds, cross_attention_dim=8, **changes)


def stable(cls, unet, **others):
    vae = AutoencoderKL(**VAE, latent_channels=4)
    nothing = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    return cls(vae=vae, unet=unet, scheduler=DDIMScheduler(), **nothing, **others)


def super_resolution():
    kinds = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    unet = UNet2DModel(**UNET, **kinds, in_channels=6, out_channels=3)
    return LDMSuperResolutionPipeline(VQModel(**VAE, latent_channels=3), unet, DDIMScheduler())


def upscale():
    unet = conditional(in_channels=7, num_class_embeds=1000)
    return stable(StableDiffusionUpscalePipeline, unet, low_res_scheduler=DDPMScheduler())


def img2img():
    return stable(StableDiffusionImg2ImgPipeline, conditional(), image_encoder=None, requires_safety_checker=False)


def pix2pix():
    unet = conditional(in_channels=8)
    return stable(StableDiffusionInstructPix2PixPipeline, unet, image_encoder=None, requires_safety_checker=False)


def marigold():
    pipe = MarigoldDepthPipeline(
        unet=conditional(in_channels=8),
        vae=AutoencoderKL(**VAE, latent_channels=4),
        scheduler=DDIMScheduler(),
        text_encoder=None,
        tokenizer=None,
        prediction_type="depth",
        default_processing_resolution=32,
    )
    pipe.empty_text_embedding = TEXT
    return pipe


PIPELINES = {f.__name__: f for f in (super_resolution, upscale, img2img, pix2pix, marigold)}
GUIDED = ("upscale", "img2img", "pix2pix")


@pytest.fixture
def build():
    def make(name):
        torch.manual_seed(0)
        pipe = PIPELINES[name]()
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


@pytest.fixture
def moved_pipe(build):
    """A pipeline whose activations are not as they were created."""

    def make(name, quac_options=None):
        pipe = add_quac(build(name), {"where": "all"} if quac_options is None else quac_options)
        torch.manual_seed(1)
        with torch.no_grad():
            for tensor in quac.adapter_state(pipe.unet).values():
                tensor.add_(0.2 * torch.randn(tensor.shape))
        return pipe

    return make


def run(name, pipe, image, count=1, **options):
    """What a pipeline makes of an image, or of several."""
    images = len(image) if isinstance(image, (list, torch.Tensor)) else 1
    arguments = {"image": image, "num_inference_steps": 2, "output_type": "np", **options}
    if name in GUIDED:
        embeds = TEXT.expand(images, -1, -1)
        arguments |= {"prompt_embeds": embeds, "negative_prompt_embeds": -embeds, "num_images_per_prompt": count}
    if name == "marigold":
        arguments |= {"ensemble_size": 1}
    seeds = [torch.Generator().manual_seed(i) for i in range(images * count)]
    out = pipe(**arguments, generator=seeds if images * count > 1 else seeds[0])
    return np.asarray(out.prediction if name == "marigold" else out.images)


@pytest.mark.parametrize("name", PIPELINES)
def test_at_first_it_makes_what_it_made(name, build, photograph):
    image = photograph(size=(32, 32))
    expected = run(name, build(name), image)
    pipe = add_quac(build(name), {"where": "all"})
    assert np.array_equal(run(name, pipe, image), expected)
    assert isinstance(pipe, type(build(name)))


@pytest.mark.parametrize("name", PIPELINES)
def test_q_is_that_of_the_image(name, moved_pipe, photograph):
    pipe, image = moved_pipe(name), photograph(size=(32, 32))
    found = run(name, pipe, image)
    q = brisque(pictures_of(image)[0].pixels[None])
    assert np.array_equal(run(name, pipe, image, q=q), found)
    assert not np.allclose(run(name, pipe, image, q=-q), found, atol=1e-3)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", GUIDED)
def test_guidance_and_several_images_of_a_prompt_take_the_q_of_their_image(name, count, moved_pipe, photograph):
    """Every row of the batch is called with the q of the image whose latent it holds."""
    pipe, rows = moved_pipe(name), []
    images = [photograph(n, (32, 32)) for n in ("astronaut", "coffee")]
    q = torch.cat([brisque(pictures_of(image)[0].pixels[None]) for image in images])
    act = pipe.unet.get_submodule(quac.injection_of(pipe.unet).sites[0].name)
    act.register_forward_hook(lambda module, args, out: rows.append(module.context.current(args[0], "")))
    run(name, pipe, images, count)
    times = {"upscale": 2, "img2img": 2, "pix2pix": 3}[name]
    for seen in rows:
        assert torch.equal(seen, q.repeat(times * count, 1))
    assert rows


@pytest.mark.parametrize("name", ["upscale", "pix2pix", "img2img"])
def test_each_of_several_images_is_made_as_if_alone(name, moved_pipe, photograph):
    pipe = moved_pipe(name)
    images = [photograph(n, (32, 32)) for n in ("astronaut", "coffee")]
    both = run(name, pipe, images)
    alone = run(name, pipe, images[0])
    np.testing.assert_allclose(both[0], alone[0], atol=2e-3)


@pytest.mark.parametrize("name", PIPELINES)
def test_saved_and_loaded_it_makes_the_same(name, moved_pipe, photograph, tmp_path):
    pipe, image = moved_pipe(name), photograph(size=(32, 32))
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == type(pipe).quac_host.__name__
    assert index["unet"][0] == "quac_plugins.diffusers.models"
    left_out = {part: None for part, component in pipe.components.items() if component is None}
    again = type(pipe).quac_host.from_pretrained(tmp_path, **left_out)
    again.set_progress_bar_config(disable=True)
    if name == "marigold":
        again.empty_text_embedding = TEXT
    with pytest.raises(quac.QualityError, match="call the network through its pipeline"):
        run(name, again, image)
    np.testing.assert_allclose(run(name, add_quac(again), image), run(name, pipe, image), atol=1e-5)
    with pytest.raises(ValueError, match="holds QuAC already"):
        add_quac(again, {"where": "all"})


def test_an_adapter_alone(build, moved_pipe, photograph, hub, tmp_path):
    pipe, image = moved_pipe("super_resolution"), photograph(size=(32, 32))
    quac.save_adapter(pipe.unet, tmp_path)
    quac.push(pipe.unet, "me/adapter")
    for source in (tmp_path, "me/adapter"):
        again = add_quac(build("super_resolution"), adapter=source)
        assert again.unet.config["quac"]["where"] == "all"
        assert np.array_equal(run("", again, image), run("", pipe, image))


def test_tensors_in_either_range_and_latents(moved_pipe, photographs):
    pipe = moved_pipe("super_resolution")
    images = photographs(2, 32)
    np.testing.assert_allclose(
        run("", pipe, 2 * images - 1), run("", pipe, 2 * images - 1, q=brisque(images)), atol=1e-4
    )
    img2img = moved_pipe("img2img")
    with pytest.raises(ValueError, match=r"shape \(4, 16, 16\).*Its quality cannot be measured: give"):
        run("img2img", img2img, torch.rand(1, 4, 16, 16))
    assert run("img2img", img2img, torch.rand(1, 4, 16, 16), q=brisque(images[:1])).shape == (1, 32, 32, 3)


def test_what_has_no_image_to_measure(build, moved_pipe, photograph):
    unconditional = DDIMPipeline(UNet2DModel(block_out_channels=(32,), down_block_types=("DownBlock2D",),
                                             up_block_types=("UpBlock2D",)), DDIMScheduler())  # fmt: skip
    with pytest.raises(TypeError, match="DDIMPipeline has not an argument 'image'"):
        add_quac(unconditional)
    with pytest.raises(TypeError, match="needs a pipeline of diffusers, got UNet2DModel"):
        add_quac(unconditional.unet)
    with pytest.raises(ValueError, match="image is missing"):
        moved_pipe("img2img")(prompt_embeds=TEXT)
    with pytest.raises(ValueError, match=r"in an order of its own.*one image a call"):
        run("marigold", moved_pipe("marigold"), [photograph(size=(32, 32))] * 2)


def test_without_quality_features_nothing_is_asked_for(build, photograph):
    pipe = add_quac(build("super_resolution"), {"activation": "meta_acon", "where": "all"})
    assert run("", pipe, photograph(size=(32, 32))).shape[0] == 1


def test_a_network_that_was_made_with_quac_is_guided_too(build, photograph):
    from quac_plugins.diffusers import add_to_model

    pipe = build("upscale")
    add_to_model(pipe.unet, {"where": "all"})
    assert pipe.unet.config["quac"]["expand_q"] == "error"
    add_quac(pipe)
    assert pipe.unet.config["quac"]["expand_q"] == "tile"
    assert run("upscale", pipe, photograph(size=(32, 32)), 2).shape[0] == 2


def test_another_pipeline_around_the_same_network(moved_pipe, photograph):
    """diffusers hands on networks of the very class in a signature alone, so that ours is passed along."""
    pipe, image = moved_pipe("img2img"), photograph(size=(32, 32))
    with pytest.raises(ValueError, match="expected"):
        StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    again = add_quac(StableDiffusionImg2ImgPipeline.from_pipe(pipe, unet=pipe.unet))
    again.set_progress_bar_config(disable=True)
    assert again.unet is pipe.unet
    assert np.array_equal(run("img2img", again, image), run("img2img", pipe, image))


def test_q_is_that_of_the_image_as_the_pipeline_sees_it(moved_pipe, photograph):
    """diffusers does not turn what a camera turned."""
    pipe, turned = moved_pipe("img2img"), photograph(size=(32, 32))
    turned.getexif()[274] = 6
    assert np.array_equal(run("img2img", pipe, turned), run("img2img", pipe, photograph(size=(32, 32))))


def test_another_pipeline_of_its_own_class(moved_pipe, photograph):
    pipe, image = moved_pipe("img2img"), photograph(size=(32, 32))
    again = type(pipe).from_pipe(pipe)
    again.set_progress_bar_config(disable=True)
    assert again.unet is pipe.unet
    assert np.array_equal(run("img2img", again, image), run("img2img", pipe, image))


def test_a_compiled_network_is_refused(build):
    pipe = build("img2img")
    pipe.unet = torch.compile(pipe.unet)
    with pytest.raises(TypeError, match="the unet is inside a OptimizedModule: add QuAC first, then compile"):
        add_quac(pipe)


def test_pickled_it_is_the_same(moved_pipe, photograph):
    pipe, image = moved_pipe("super_resolution"), photograph(size=(32, 32))
    for again in (pickle.loads(pickle.dumps(pipe)), copy.deepcopy(pipe)):
        assert np.array_equal(run("", again, image), run("", pipe, image))


def test_quality_by_hand_has_a_row_for_each_image(moved_pipe, photograph):
    pipe, image = moved_pipe("img2img"), photograph(size=(32, 32))
    for quality in (torch.rand(2, 36), torch.rand(1, 7), np.zeros((1, 36)), torch.ones(1, 36, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"q must be a floating point tensor \(1, 36\), a row for each"):
            run("img2img", pipe, image, q=quality)


def test_a_bright_tensor_is_read_as_its_pipeline_reads_it(moved_pipe, photographs):
    """Latent super-resolution takes every tensor to be in [−1, 1], also one without a negative number."""
    pipe, bright = moved_pipe("super_resolution"), 0.5 + 0.5 * photographs(1, 32)
    signed = 2 * bright - 1
    assert float(signed.min()) >= 0
    np.testing.assert_allclose(run("", pipe, signed), run("", pipe, signed, q=brisque(bright)), atol=1e-4)


def test_an_error_leaves_the_pipeline_as_it_was(build):
    pipe = build("super_resolution")
    with pytest.raises(ValueError, match="quac: where="):
        add_quac(pipe, {"where": "nowhere"})
    assert type(pipe) is LDMSuperResolutionPipeline
    assert type(pipe.unet) is UNet2DModel
