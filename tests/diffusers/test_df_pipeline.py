"""The restoration pipeline, on real photographs: any size, a few steps, saved and loaded as every pipeline."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from PIL import Image

import quac_plugins as quac
from quac_plugins.core.quality.brisque import brisque
from quac_plugins.diffusers import QuACRestorationPipeline


def restored(pipe, image, **options):
    return pipe(image, output_type="pt", **options).images


def test_a_network_that_predicts_the_degradation_restores_in_any_number_of_steps(pipeline, photographs):
    """With the true velocity the path is straight: one step and ten give the clean image."""
    clean = photographs(2, 64)
    degraded = (0.6 * clean + 0.2).clamp(0, 1)
    pipe = pipeline()
    truth = 2 * (degraded - clean)

    def velocity(sample, timestep, return_dict=True, q=None):
        torch.testing.assert_close(sample, 2 * clean - 1 + truth * timestep / 1000)
        return (truth,)

    pipe.unet.forward = velocity
    for steps in (1, 3, 10):
        found = restored(pipe, degraded, num_inference_steps=steps)
        torch.testing.assert_close(found, clean, rtol=0, atol=1e-5)


def test_an_error_that_every_step_makes_is_made_once(pipeline, photographs):
    image, pipe = photographs(1, 64), pipeline()
    pipe.unet.forward = lambda sample, timestep, **kwargs: (torch.full_like(sample, 0.02),)
    expected = (image - 0.01).clamp(0, 1)
    for steps in (1, 10):
        torch.testing.assert_close(restored(pipe, image, num_inference_steps=steps), expected, rtol=0, atol=1e-5)


def test_times_go_from_the_degraded_image_to_the_clean_one(pipeline, photograph):
    pipe, seen = pipeline(), []
    forward = pipe.unet.forward

    def note(sample, timestep, **kwargs):
        seen.append((float(timestep), sample.clone(), kwargs["q"]))
        return forward(sample, timestep, **kwargs)

    pipe.unet.forward = note
    image = photograph()
    restored(pipe, image, num_inference_steps=4)
    assert [t for t, _, _ in seen] == [1000, 750, 500, 250]
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None] / 255
    torch.testing.assert_close(seen[0][1], 2 * pixels - 1)
    for _, _, q in seen:  # once, from the degraded image, and never from what the network makes of it
        torch.testing.assert_close(q, brisque(pixels))


def test_each_image_is_restored_as_if_alone(pipeline, photograph):
    pipe = pipeline()
    images = [photograph("astronaut", (48, 32)), photograph("coffee", (33, 21)), photograph("chelsea", (48, 32))]
    together = restored(pipe, images, num_inference_steps=2)
    for image, found in zip(images, together, strict=True):
        assert found.shape == (3, image.height, image.width)
        torch.testing.assert_close(found, restored(pipe, image, num_inference_steps=2)[0])
    assert [image.size for image in pipe(images).images] == [(48, 32), (33, 21), (48, 32)]


def test_quality_in_the_place_of_that_of_the_images(pipeline, photograph):
    pipe, image = pipeline(), photograph()
    q = pipe.quality_of(restored(pipeline(), image) * 0 + torch.rand(1, 3, 32, 48))
    usual = restored(pipe, image)
    assert not torch.allclose(restored(pipe, image, q=q), usual, atol=1e-4)
    own = pipe.quality_of(torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None] / 255)
    torch.testing.assert_close(restored(pipe, image, q=own), usual)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (2, 3), (97, 35)])
def test_any_size(size, pipeline, photograph):
    found = pipeline()(photograph(size=size), num_inference_steps=2).images[0]
    assert found.size == size


def test_a_small_tile_needs_no_more_to_be_said(pipeline, photograph):
    assert pipeline()([photograph()] * 2, tile_size=16).images[0].size == (48, 32)


def test_tiles_leave_no_seam(pipeline, photograph):
    """Steps across the borders of tiles are no larger than elsewhere, on a gradient and on a photograph."""
    pipe = pipeline()
    gradient = np.broadcast_to(np.linspace(0.2, 0.8, 160)[None, :, None], (96, 160, 3))
    for image in (gradient, photograph(size=(160, 96))):
        whole = restored(pipe, image)
        tiles = restored(pipe, image, tile_size=64, tile_overlap=32)
        steps = [(x[..., 1:] - x[..., :-1]).mean(dim=(0, 1, 2)).abs() for x in (whole, tiles)]  # of columns
        edges = slice(8, -8)  # where the network itself sees its padding
        assert float(steps[1][edges].max()) < 1.5 * float(steps[0][edges].max()) + 1 / 255


def test_the_noise_at_the_start_is_seeded(pipeline, unet, photograph):
    pipe, image = pipeline(start_noise=0.1), photograph()
    seeded = [restored(pipe, image, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(seeded[0], seeded[1])
    assert not torch.equal(seeded[0], seeded[2])
    each = restored(pipe, [image, image], generator=[torch.Generator().manual_seed(seed) for seed in (1, 0)])
    torch.testing.assert_close(each, torch.cat([seeded[2], seeded[0]]))
    quiet = pipeline()
    assert torch.equal(restored(quiet, image), restored(quiet, image, generator=torch.Generator().manual_seed(3)))


def test_a_callback_sees_and_changes_each_step(pipeline, photograph):
    pipe, seen = pipeline(), []

    def note(pipe, step, timestep, tensors):
        seen.append((step, float(timestep), sorted(tensors)))
        return {"latents": torch.zeros_like(tensors["latents"])}

    found = restored(
        pipe,
        photograph(),
        num_inference_steps=3,
        callback_on_step_end=note,
        callback_on_step_end_tensor_inputs=["latents", "q"],
    )
    assert [(step, names) for step, _, names in seen] == [(i, ["latents", "q"]) for i in range(3)]
    assert torch.equal(found, torch.full_like(found, 0.5))


def test_latents_are_what_the_last_step_left(pipeline, photograph):
    pipe, images, seen = pipeline(), [photograph(), photograph(size=(40, 24))], []

    def note(pipe, step, timestep, tensors):
        seen.append(tensors["latents"])
        pipe._interrupt = len(seen) == 3  # in the second image

    given = {"num_inference_steps": 2, "callback_on_step_end": note, "output_type": "latent"}
    found = pipe(images, **given).images
    assert [latents.shape for latents in found] == [latents.shape[1:] for latents in (seen[1], seen[2])]
    assert all(torch.equal(latents, kept[0]) for latents, kept in zip(found, (seen[1], seen[2]), strict=True))
    seen.clear()
    found = pipe(
        [images[0]] * 2, callback_on_step_end=lambda *given: {"latents": 0 * given[3]["latents"]}, output_type="latent"
    )
    assert torch.equal(found.images, torch.zeros(2, 3, *found.images.shape[2:]))


def test_a_callback_of_diffusers_says_itself_what_it_needs(pipeline, photograph):
    class Note(PipelineCallback):
        tensor_inputs = ("latents", "q")

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            seen.append(sorted(callback_kwargs))
            return callback_kwargs

    pipe, seen = pipeline(), []
    for callback in (Note(), MultiPipelineCallbacks([Note()])):
        found = restored(pipe, photograph(), num_inference_steps=2, callback_on_step_end=callback)
        assert torch.equal(found, restored(pipe, photograph(), num_inference_steps=2))
    assert seen == [["latents", "q"]] * 4
    assert pipe.num_timesteps == 2


def test_a_callback_may_call_q_by_its_old_name(pipeline, photograph):
    pipe = pipeline()
    results = [
        restored(
            pipe,
            photograph(),
            num_inference_steps=2,
            callback_on_step_end=lambda pipe, step, t, tensors, name=name: {name: 0 * tensors[name]},
            callback_on_step_end_tensor_inputs=[name],
        )
        for name in ("q", "quality")
    ]
    assert torch.equal(*results)


def test_a_callback_ends_the_call(pipeline, photograph):
    pipe, seen = pipeline(), []

    def end(pipe, step, timestep, tensors):
        seen.append(tensors["latents"])
        pipe._interrupt = step == 1

    found = restored(pipe, photograph(), num_inference_steps=5, callback_on_step_end=end)
    assert len(seen) == 2
    assert pipe.interrupt
    assert torch.equal(found, (seen[-1] / 2 + 0.5).clamp(0, 1))
    whole = restored(pipe, photograph(), num_inference_steps=5)
    assert not pipe.interrupt
    assert not torch.equal(whole, found)


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (3, TypeError, "must return a dict of tensors, got int"),
        ({"sample": torch.zeros(1)}, ValueError, "unknown tensor returned by callback_on_step_end 'sample'"),
        (
            {"latents": torch.zeros(1, 3, 8, 8)},
            ValueError,
            r"'latents' \(1, 3, 8, 8\), expected a tensor \(1, 3, 32, 48\)",
        ),
        ({"latents": None}, ValueError, "returned 'latents' None, expected a tensor"),
        ({"latents": torch.full((1, 3, 32, 48), torch.nan)}, RuntimeError, "the image became NaN or infinity$"),
        ({"latents": torch.full((1, 3, 32, 48), torch.inf)}, RuntimeError, "the image became NaN or infinity$"),
    ],
)
def test_what_a_callback_returns_is_checked(returned, error, message, pipeline, photograph):
    with pytest.raises(error, match=message):
        pipeline()(photograph(), callback_on_step_end=lambda *_: returned)


def test_calls_in_threads_are_each_right(pipeline, photograph):
    pipe = pipeline()
    jobs = [(name, steps) for name in ("astronaut", "coffee") for steps in (1, 4, 7)] * 3
    alone = [restored(pipe, photograph(name), num_inference_steps=steps) for name, steps in jobs]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda job: restored(pipe, photograph(job[0]), num_inference_steps=job[1]), jobs))
    for one, other in zip(found, alone, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_a_call_inside_a_callback(pipeline, photograph):
    pipe = pipeline()

    def call(pipe, step, timestep, tensors):
        pipe(photograph("coffee"), num_inference_steps=2)

    expected = restored(pipe, photograph(), num_inference_steps=3)
    assert torch.equal(restored(pipe, photograph(), num_inference_steps=3, callback_on_step_end=call), expected)


def test_progress_is_shown(pipeline, photograph, capsys):
    pipe = pipeline()
    pipe.set_progress_bar_config(disable=False)
    pipe([photograph(), photograph(size=(20, 20))], num_inference_steps=3)
    assert "6/6" in capsys.readouterr().err


def test_transparency_stays(pipeline, photograph):
    image = photograph()
    image.putalpha(128)
    found = pipeline()(image).images[0]
    assert found.mode == "RGBA"
    assert set(np.asarray(found)[..., 3].flatten()) == {128}


def test_a_network_without_quality(pipeline, plain, unet, photograph):
    assert pipeline(plain())(photograph()).images[0].size == (48, 32)
    pipe = pipeline(unet({"activation": "meta_acon"}))
    assert pipe(photograph()).images[0].size == (48, 32)
    assert pipe.quality_of(torch.rand(1, 3, 32, 32)) is None
    with pytest.raises(ValueError, match="reads no quality features; leave q= out"):
        pipe(photograph(), q=torch.rand(1, 36))


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_saved_and_loaded_it_restores_the_same_bits(variant, pipeline, photograph, tmp_path):
    pipe = pipeline(start_noise=0.05)
    options = {} if variant is None else {"variant": variant, "torch_dtype": torch.float16}
    if variant is not None:
        pipe.to(torch.float16)
    pipe.save_pretrained(tmp_path, variant=variant)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "QuACRestorationPipeline"
    assert index["unet"] == ["quac_plugins.diffusers.models", "QuACUNet2DModel"]
    again = QuACRestorationPipeline.from_pretrained(tmp_path, **options)
    again.set_progress_bar_config(disable=True)
    assert again.config.start_noise == 0.05
    found = [restored(p, photograph(), generator=torch.Generator().manual_seed(0)) for p in (pipe, again)]
    assert torch.equal(*found)


def test_what_is_put_in_later_is_saved(pipeline, plain, photograph, tmp_path):
    from quac_plugins.diffusers import QuACUNet2DModel, add_to_model

    pipe = pipeline(plain())
    add_to_model(pipe.unet, {"init": "paper", "where": "all"})
    pipe.save_pretrained(tmp_path / "with")
    again = DiffusionPipeline.from_pretrained(tmp_path / "with")
    again.set_progress_bar_config(disable=True)
    assert type(again) is QuACRestorationPipeline
    assert type(again.unet) is QuACUNet2DModel
    assert torch.equal(restored(again, photograph()), restored(pipe, photograph()))
    quac.remove(pipe.unet)
    pipe.save_pretrained(tmp_path / "without")
    assert "quac" not in (tmp_path / "without" / "model_index.json").read_text().replace("QuAC", "")


def test_over_the_hub(pipeline, photograph, hub):
    pipe = pipeline()
    pipe.push_to_hub("me/restoration")
    again = QuACRestorationPipeline.from_pretrained("me/restoration")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(restored(again, photograph()), restored(pipe, photograph()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps must be a whole number ≥ 1, got 0"),
        ({"num_inference_steps": 1.5}, "num_inference_steps must be a whole number"),
        ({"output_type": "jpeg"}, "unknown output_type 'jpeg'.*pil, np, pt, latent"),
        ({"tile_size": 1}, "tile_size must be a whole number ≥ 2"),
        ({"tile_size": 64, "tile_overlap": 40}, "tile_overlap must be a whole number from 0 to 32, got 40"),
        ({"q": torch.rand(2, 36)}, r"q must be a floating point tensor \(1, 36\), .* got \(2, 36\)"),
        ({"generator": [torch.Generator()] * 2}, "2 generators were given for 1 images"),
        ({"q": torch.full((1, 36), torch.nan)}, "q holds NaN or infinity"),
        ({"callback_on_step_end_tensor_inputs": ["sample"]}, "unknown callback_on_step_end_tensor_inputs 'sample'"),
    ],
)
def test_an_argument_that_cannot_be(options, message, pipeline, photograph):
    with pytest.raises(ValueError, match=message):
        pipeline()(photograph(), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"callback_on_step_end_tensor_inputs": "latents"}, "must be a list of names, got 'latents'"),
        ({"callback_on_step_end": 3}, "callback_on_step_end must be a function, got int"),
    ],
)
def test_an_argument_of_another_type(options, message, pipeline, photograph):
    with pytest.raises(TypeError, match=message):
        pipeline()(photograph(), **options)


@pytest.mark.parametrize(
    ("scheduler", "error", "message"),
    [
        (DDIMScheduler(), TypeError, "must be a FlowMatchEulerDiscreteScheduler, .* got DDIMScheduler"),
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), ValueError, "invert_sigmas=True does not lead"),
        (FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), ValueError, "stochastic_sampling=True does not"),
        (FlowMatchEulerDiscreteScheduler(shift_terminal=0.1), ValueError, r"shift_terminal=0\.1 does not lead"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_scheduler_that_leads_elsewhere(scheduler, error, message, unet, pipeline, photograph):
    with pytest.raises(error, match=message):
        QuACRestorationPipeline(unet(), scheduler)
    pipe = pipeline()
    pipe.scheduler = scheduler
    with pytest.raises(error, match=message):
        pipe(photograph())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (None, TypeError, "unet must be a UNet2DModel, with QuAC inside or without, got NoneType"),
        (torch.nn.Conv2d(3, 3, 1), TypeError, "got Conv2d"),
        ({"in_channels": 6}, ValueError, "from 3 channels to 3 .*, got in_channels=6 and 3"),
        ({"num_class_embeds": 4}, ValueError, "must take images alone: its config has num_class_embeds=4"),
    ],
    ids=["none", "layer", "channels", "classes"],
)
def test_a_network_that_restores_nothing(changes, error, message, plain):
    network = plain(**changes) if isinstance(changes, dict) else changes
    with pytest.raises(error, match=message):
        QuACRestorationPipeline(network, FlowMatchEulerDiscreteScheduler())


def test_noise_at_the_start_that_cannot_be(pipeline):
    for value in (-1, "a", float("nan"), True):
        with pytest.raises(ValueError, match="start_noise must be a number ≥ 0"):
            pipeline(start_noise=value)


def test_numbers_of_numpy(pipeline, photograph):
    pipe = pipeline()
    expected = restored(pipe, photograph(), num_inference_steps=2)
    assert torch.equal(restored(pipe, photograph(), num_inference_steps=np.int64(2)), expected)


def test_another_pipeline_of_the_same_parts(pipeline, plain, photograph):
    for pipe in (pipeline(), pipeline(plain())):
        again = QuACRestorationPipeline.from_pipe(pipe)
        again.set_progress_bar_config(disable=True)
        assert again.unet is pipe.unet
        assert torch.equal(restored(again, photograph()), restored(pipe, photograph()))


def test_a_photograph_that_was_taken_upright(pipeline, photograph):
    turned, upright = photograph(), photograph().transpose(Image.Transpose.ROTATE_270)
    turned.getexif()[274] = 6
    assert torch.equal(restored(pipeline(), turned), restored(pipeline(), upright))


def test_a_pipeline_is_named_by_a_string_or_a_path():
    from_pretrained = QuACRestorationPipeline.from_pretrained
    assert isinstance(from_pretrained(Path("restoration_qacon.bsds")), QuACRestorationPipeline)
    with pytest.raises(TypeError, match="named by a string or a path, got NoneType"):
        from_pretrained(None)


def test_in_front_of_a_classifier(pipeline, photographs):
    """The pipeline is a restorer that restore_then takes, with the quality of the degraded image."""
    import timm

    model = timm.create_model("test_resnet_qacon", num_classes=5).eval()
    pipe = pipeline()
    both = quac.restore_then(model, lambda images: pipe(images, output_type="pt").images, adapt_to="degraded")
    with torch.no_grad():
        assert both(photographs(2, 64)).shape == (2, 5)


def test_a_scheduler_of_several_kinds(unet, photograph):
    """Shifted times are the scheduler's own affair."""
    pipe = QuACRestorationPipeline(unet(), FlowMatchEulerDiscreteScheduler(shift=3.0))
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe(photograph(), num_inference_steps=3).images[0], Image.Image)
