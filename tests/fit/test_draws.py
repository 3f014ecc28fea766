import functools
import multiprocessing
import random

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from skimage import data
from torch import nn

from quac_plugins.degradations import CORRUPTIONS, corrupt, image_seed
from quac_plugins.evaluate.preprocessing import Crop, data_config
from quac_plugins.fit.draws import held_out, make_draws
from quac_plugins.fit.sources import FewImages, few_images

SIZE = (32, 48)
ARRAYS = ("clean", "degraded", "view", "image", "kind", "severity")


@pytest.fixture(scope="module")
def few():
    """Three photographs of different sizes, one of them upright."""
    images = [data.astronaut()[::4, ::5], data.chelsea()[::3, ::3], data.coffee()[::5, ::5].transpose(1, 0, 2)]
    return FewImages([np.ascontiguousarray(image) for image in images], names=["a.png", "b/c.png", "d.png"])


def paired(few):
    """The photographs with negatives of them: what was cut and mirrored alike stays a negative."""
    return FewImages(few.clean, [255 - image for image in few.clean], few.names)


def same(one, other):
    assert one.kinds == other.kinds
    for name in ARRAYS:
        assert np.array_equal(getattr(one, name), getattr(other, name)), name


def some(few, indices):
    return FewImages([few.clean[i] for i in indices], names=[few.names[i] for i in indices])


def of_image(drawn, index):
    """The views and the pictures of one image."""
    return drawn.clean[drawn.image == index], drawn.degraded[drawn.image[drawn.view] == index]


def noisy(image, *, rng):
    return image + rng.integers(0, 2, image.shape, np.uint8)


def noisy_by_globals(image):
    noise = np.random.randint(0, 2, image.shape) + random.randint(0, 2) + torch.randint(0, 2, image.shape).numpy()
    return (image.astype(int) + noise).clip(0, 255).astype(np.uint8)


def fails(image):
    raise KeyError("oh")


# What is drawn


def test_shapes_and_indices(few):
    drawn = make_draws(
        few, SIZE, corruptions=["fog", "contrast"], severities=[1, 3, 5], views=4, draws=2, clean_share=0.2
    )
    assert drawn.clean.shape == (12, *SIZE, 3)
    assert drawn.degraded.shape == (60, *SIZE, 3)
    assert drawn.clean.dtype == drawn.degraded.dtype == np.uint8
    assert drawn.view.dtype == drawn.image.dtype == drawn.kind.dtype == np.int64
    assert drawn.image.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert drawn.kinds == ["fog", "contrast", "clean"]
    for kind, times in enumerate([2, 2, 1]):
        assert np.bincount(drawn.view[drawn.kind == kind], minlength=12).tolist() == [times] * 12
    assert len(drawn) == 60


def test_a_picture_is_the_corruption_of_its_view_at_the_severities_in_turn(few):
    drawn = make_draws(few, SIZE, corruptions="contrast,gaussian_noise", severities=(2, 4, 5), views=2, draws=3, seed=7)
    for view in range(len(drawn.clean)):
        for kind, name in enumerate(drawn.kinds):
            pictures = drawn.degraded[(drawn.view == view) & (drawn.kind == kind)]
            key = f"{few.names[drawn.image[view]]}\0{view % 2}"
            expected = {
                corrupt(drawn.clean[view], name, s, image_seed(7, name, s, f"{key}\0{draw}")).tobytes()
                for draw in range(3)
                for s in (2, 4, 5)
            }
            assert {picture.tobytes() for picture in pictures} <= expected
            assert len({picture.tobytes() for picture in pictures}) == 3
    contrasts = drawn.degraded[drawn.kind == 0].reshape(6, 3, -1)
    assert len({tuple(np.argsort(one.std(axis=1))) for one in contrasts.astype(float)}) > 1  # not always 2 first


def test_one_severity_may_be_given_as_a_number(few):
    for severity in (4, np.int64(4), [4], (s for s in [4])):
        drawn = make_draws(few, SIZE, corruptions="fog", severities=severity)
        same(drawn, make_draws(few, SIZE, corruptions=["fog"], severities=[4]))


@pytest.mark.parametrize("seed", [0, 3])
def test_the_same_again_and_another_with_another_seed(few, seed):
    options = {"corruptions": "gaussian_noise", "severities": [1, 5], "views": 3, "draws": 2, "clean_share": 0.1}
    drawn = make_draws(few, SIZE, seed=seed, **options)
    np.random.random()
    torch.rand(1)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    same(make_draws(few, SIZE, seed=seed, **options), drawn)
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    other = make_draws(few, SIZE, seed=seed + 1, **options)
    assert (other.clean[::3] == drawn.clean[::3]).all()  # the whole images
    for view in (1, 2):
        assert (other.clean[view::3] != drawn.clean[view::3]).any(axis=(1, 2, 3)).all()
    assert (other.degraded != drawn.degraded).any(axis=(1, 2, 3))[:18].all()


def test_a_picture_depends_on_nothing_but_itself(few):
    options = {"severities": [1, 3, 5], "seed": 2}
    drawn = make_draws(few, SIZE, corruptions=["fog", "shot_noise"], views=3, draws=2, **options)
    turned = make_draws(some(few, [2, 0]), SIZE, corruptions=["fog", "shot_noise"], views=3, draws=2, **options)
    for here, there in ((2, 0), (0, 1)):
        for one, other in zip(of_image(drawn, here), of_image(turned, there), strict=True):
            assert (one == other).all()
    more = make_draws(few, SIZE, corruptions=["contrast", "shot_noise"], views=5, draws=4, **options)
    for image in range(3):
        for view in range(3):
            a = drawn.degraded[(drawn.view == 3 * image + view) & (drawn.kind == 1)]
            b = more.degraded[(more.view == 5 * image + view) & (more.kind == 1)]
            assert (a == b[:2]).all()


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(few, workers):
    cheap = {"severities": [2, 4], "views": 3, "draws": 2, "clean_share": 0.1}
    names = ["gaussian_noise", "impulse_noise", "fog", "frost", "elastic_transform", "jpeg_compression"]
    for options in (
        dict(corruptions=names, **cheap),
        {"degrade": noisy, "views": 3, "draws": 2},
        {"degrade": noisy_by_globals, "views": 3, "draws": 2},
        {"degrade": lambda image: 255 - image},  # a forked worker has it already
    ):
        if options.get("degrade") is None or multiprocessing.get_start_method() == "fork":
            same(make_draws(few, SIZE, num_workers=workers, **options), make_draws(few, SIZE, **options))
    same(make_draws(paired(few), SIZE, num_workers=workers), make_draws(paired(few), SIZE))


def test_every_corruption_of_imagenet_c_leaves_the_views_alone(few):
    photo = some(few, [1])
    drawn = make_draws(photo, (64, 64), corruptions=CORRUPTIONS, severities=5)
    assert drawn.kinds == list(CORRUPTIONS)
    assert (drawn.clean == make_draws(photo, (64, 64), degrade=lambda image: image).clean).all()
    assert (drawn.degraded != drawn.clean[drawn.view]).any(axis=(1, 2, 3)).all()


def test_identical_pictures_on_top(few):
    for share in (0.0, 0.1, 0.25, 0.5, 0.8):
        drawn = make_draws(few, SIZE, corruptions="contrast", severities=3, views=2, draws=3, clean_share=share)
        clean = drawn.kind == 1
        assert clean.sum() == round(18 * share / (1 - share))
        assert abs(clean.mean() - share) < 0.03
        assert drawn.kinds == (["contrast", "clean"] if share else ["contrast"])
        assert (drawn.degraded[clean] == drawn.clean[drawn.view[clean]]).all()
        counts = np.bincount(drawn.view[clean], minlength=6)
        assert counts.max() - counts.min() <= 1


# Views


def test_the_first_view_is_the_whole_image(few):
    drawn = make_draws(few, SIZE, degrade=lambda image: image, views=3)
    for image, pixels in enumerate(few.clean):
        height, width = pixels.shape[:2]
        scale = max(SIZE[0] / height, SIZE[1] / width)
        resized = Image.fromarray(pixels).resize(
            (round(width * scale), round(height * scale)), Image.Resampling.BICUBIC
        )
        left, top = (resized.width - SIZE[1]) // 2, (resized.height - SIZE[0]) // 2
        expected = np.asarray(resized.crop((left, top, left + SIZE[1], top + SIZE[0])))
        assert (drawn.clean[3 * image] == expected).all()
    ready = FewImages([np.ascontiguousarray(few.clean[0][:32, :48])], names=["x"])
    assert (make_draws(ready, SIZE, degrade=lambda image: image).clean == ready.clean[0]).all()


def test_the_first_view_is_what_an_evaluation_crops(few):
    config = data_config(timm.create_model("test_resnet"), input_size=64)
    crop = Crop(config, keep_ready=True)
    drawn = make_draws(few, (64, 64), corruptions="fog", severities=1, views=2, crop=crop)
    for image, pixels in enumerate(few.clean):
        expected = crop(Image.fromarray(pixels)).permute(1, 2, 0).numpy()
        assert (drawn.clean[2 * image] == expected).all()
    for wrong, got in (
        (lambda image: torch.zeros(3, 9, 9), r"torch.float32 \(3, 9, 9\)"),
        (lambda image: crop(image).permute(1, 2, 0), r"torch.uint8 \(64, 64, 3\)"),
        (np.asarray, "ndarray"),
    ):
        with pytest.raises(ValueError, match=rf"crop must return a uint8 tensor of shape \(3, 64, 64\), got {got}"):
            make_draws(few, (64, 64), corruptions="fog", severities=1, crop=wrong)


@pytest.mark.parametrize("shape", [(90, 120), (120, 40), (64, 64)])
@pytest.mark.parametrize("size", [(64, 64), (48, 96)])
def test_other_views_are_parts_of_the_image(shape, size):
    """Pixels that hold their own coordinates tell which box a view shows."""
    y, x = np.meshgrid(np.linspace(0, 1, shape[0]), np.linspace(0, 1, shape[1]), indexing="ij")
    map_of_places = (np.stack([y, x, 0 * x], axis=2) * 255).round().astype(np.uint8)
    views = (
        make_draws(FewImages([map_of_places], names=["x"]), size, degrade=noisy, views=60).clean[1:].astype(float) / 255
    )
    mirrored = views[:, 8, 8, 1] > views[:, 8, -8, 1]
    assert 0.2 < mirrored.mean() < 0.8
    heights = (views[:, -1, 8, 0] - views[:, 0, 8, 0]) * shape[0] + 1
    widths = np.abs(views[:, 8, -1, 1] - views[:, 8, 0, 1]) * shape[1] + 1
    assert (heights > 0).all()
    unit = min(shape[0] / size[0], shape[1] / size[1])
    sides = np.sqrt(heights * widths / (size[0] * size[1])) / unit
    assert sides.min() > 0.45
    assert sides.max() < 1.05
    assert sides.max() - sides.min() > 0.3
    aspects = widths / heights / (size[1] / size[0])
    assert aspects.min() > 0.66
    assert aspects.max() < 1.5
    assert aspects.max() / aspects.min() > 1.3


def test_images_are_cut_differently(few):
    twins = FewImages([few.clean[0]] * 2, names=["a", "b"])
    views = make_draws(twins, SIZE, degrade=noisy, views=4).clean.reshape(2, 4, *SIZE, 3)
    assert (views[0] != views[1]).any(axis=(1, 2, 3)).tolist() == [False, True, True, True]


# Pairs


@pytest.mark.parametrize("crop", [None, Crop(data_config(nn.Identity(), input_size=SIZE, crop_pct=0.9), False)])
def test_pairs_are_cut_and_mirrored_alike(few, crop):
    drawn = make_draws(paired(few), SIZE, views=6, draws=4, clean_share=0.25, crop=crop)
    assert drawn.kinds == ["pairs", "clean"]
    pairs = drawn.kind == 0
    assert drawn.view[pairs].tolist() == [*range(18)]
    difference = drawn.degraded[pairs].astype(int) - (255 - drawn.clean.astype(int))
    assert np.abs(difference).max() <= 2  # rounding in the resizing
    assert (~pairs).sum() == 6
    alone = make_draws(few, SIZE, degrade=noisy, views=6, crop=crop)
    assert (alone.clean == drawn.clean).all()


def test_pairs_from_files(tmp_path, photographs):
    stack = (photographs(3, 96) * 255).byte().permute(0, 2, 3, 1).numpy()
    for name, pixels in zip(("one", "two", "three"), stack, strict=True):
        for kind, image in (("clean", pixels), ("dark", pixels // 2)):
            (tmp_path / kind).mkdir(exist_ok=True)
            Image.fromarray(image).save(tmp_path / kind / f"{name}.png")
    drawn = make_draws(few_images(pairs=(tmp_path / "dark", tmp_path / "clean")), SIZE, views=5)
    assert np.abs(drawn.degraded.astype(int) - drawn.clean / 2).mean() < 0.6  # rounding, and overshoot cut off at 255


# A function of the user


def test_a_function_of_the_user(few):
    asked = []

    def invert(image):
        asked.append((image.shape, image.dtype, image.flags.c_contiguous, image.flags.writeable))
        image[:] = 255 - image
        return image

    drawn = make_draws(few, SIZE, degrade=invert, severities=4, views=2, draws=2)
    assert drawn.kinds == ["degrade"]
    assert len(drawn) == 12
    assert set(asked) == {((*SIZE, 3), np.dtype(np.uint8), True, True)}
    assert (drawn.degraded == 255 - drawn.clean[drawn.view]).all()


@pytest.mark.parametrize(
    "result",
    [
        lambda image: image / 255,
        lambda image: (image / 255).astype(np.float32),
        Image.fromarray,
        lambda image: torch.from_numpy(image).permute(2, 0, 1),
        lambda image: torch.from_numpy(image).permute(2, 0, 1) / 255,
    ],
)
def test_what_a_function_may_return(few, result):
    drawn = make_draws(few, SIZE, degrade=result)
    assert (drawn.degraded == drawn.clean).all()
    grey = make_draws(few, SIZE, degrade=lambda image: result(image[..., :1].repeat(3, 2)))
    assert (grey.degraded == drawn.clean[..., :1]).all()


@pytest.mark.parametrize("function", [noisy, noisy_by_globals])
def test_functions_draw_from_seeded_generators(few, function):
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    drawn = make_draws(few, SIZE, degrade=function, views=2, draws=3)
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    same(make_draws(few, SIZE, degrade=function, views=2, draws=3), drawn)
    noise = drawn.degraded.astype(int) - drawn.clean[drawn.view]
    assert len({one.tobytes() for one in noise}) == len(drawn) == 18
    assert (make_draws(few, SIZE, degrade=function, views=2, draws=3, seed=1).degraded != drawn.degraded).any()


def test_which_functions_get_a_generator(few):
    class Noisy:
        def __call__(self, image, rng=None):
            assert isinstance(rng, np.random.Generator)
            return image

    def without(image, **options):
        assert not options
        return image

    for function in (Noisy(), functools.partial(Noisy.__call__, None), without, np.asarray):
        assert (make_draws(few, SIZE, degrade=function).degraded == make_draws(few, SIZE, degrade=without).clean).all()


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_a_function_name_it_and_the_image(few, workers):
    with pytest.raises(
        RuntimeError, match=r"degrade function fails failed on the image a\.png: KeyError: 'oh'"
    ) as caught:
        make_draws(few, SIZE, degrade=fails, num_workers=workers)
    cause = caught.value.__cause__
    assert "in fails" in str(cause) if workers else isinstance(cause, KeyError)


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda image: image[:20], ValueError, r"for the image a\.png is 20×48 \(height×width\), expected 32×48"),
        (lambda image: image.astype(float), ValueError, r"for the image a\.png has values from .* in \[0, 1\]"),
        (lambda image: image.astype(int), TypeError, "for the image a.png is of dtype int64; expected uint8"),
        (lambda image: None, TypeError, "degrade function <lambda> returned for the image a.png is of type NoneType"),
        (lambda image: image[None], ValueError, r"has the shape \(1, 32, 48, 3\)"),
    ],
)
def test_results_that_are_no_image_of_the_size(few, function, error, message):
    with pytest.raises(error, match=message):
        make_draws(few, SIZE, degrade=function)


def test_a_function_that_cannot_be_sent_to_workers(few, monkeypatch):
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda: "spawn")
    with pytest.raises(
        ValueError, match=r"cannot be sent to worker processes \(.*\): define it at the top of a module"
    ):
        make_draws(few, SIZE, degrade=lambda image: image, num_workers=1)


def test_corruptions_and_several_functions_by_name(few):
    own = {"noisy": noisy, "dark": lambda image: image // 4}
    drawn = make_draws(few, SIZE, corruptions="fog,contrast", severities=[1, 5], degrade=own, views=2, draws=2)
    assert drawn.kinds == ["fog", "contrast", "noisy", "dark"]
    assert set(drawn.severity[drawn.kind < 2].tolist()) == {1, 5}
    assert not drawn.severity[drawn.kind >= 2].any()
    alone = {
        "fog": make_draws(few, SIZE, corruptions="fog", severities=[1, 5], views=2, draws=2),
        "noisy": make_draws(few, SIZE, degrade={"noisy": noisy}, views=2, draws=2),
    }
    for kind, other in alone.items():
        assert (drawn.degraded[drawn.kind == drawn.kinds.index(kind)] == other.degraded).all()
    dark = drawn.kind == 3
    assert (drawn.degraded[dark] == drawn.clean[drawn.view[dark]] // 4).all()


# Arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "pairs of images, or else corruptions, degrade, or both; got none"),
        ({"corruptions": "fog"}, "corruptions are asked for, but no severity"),
        ({"corruptions": "fgo", "severities": 3}, "unknown corruption 'fgo'. Did you mean fog"),
        ({"corruptions": "fog", "severities": [3, 6]}, "severity must be an integer from 1 to 5, got 6"),
        ({"degrade": "fog"}, "degrade must be a function from image to image, or several by name, got 'fog'"),
        ({"degrade": {"rain": "fog"}}, "degrade must be a function from image to image, or several by name"),
        ({"degrade": {"fog": noisy}}, "'fog'.*: this name is taken"),
        ({"degrade": noisy, "views": 0}, "views must be at least 1, got 0"),
        ({"degrade": noisy, "draws": 0}, "draws must be at least 1, got 0"),
        ({"degrade": noisy, "num_workers": -1}, "num_workers must be at least 0, got -1"),
        ({"degrade": noisy, "clean_share": 1.0}, "clean_share must be at least 0 and below 1, got 1.0"),
        ({"degrade": noisy, "clean_share": -0.1}, "clean_share must be at least 0"),
        ({"degrade": noisy, "size": (0, 4)}, r"size must be \(height, width\) with sides from 1 on, got \(0, 4\)"),
        ({"degrade": noisy, "size": (3, 32, 32)}, r"size must be \(height, width\) .*, got \(3, 32, 32\)"),
    ],
)
def test_arguments_out_of_range(few, options, message):
    with pytest.raises(ValueError, match=message):
        make_draws(few, **{"size": SIZE, **options})


def test_images_and_names(few):
    with pytest.raises(ValueError, match="pairs beside others"):
        make_draws(paired(few), SIZE, corruptions="fog", severities=1)
    with pytest.raises(ValueError, match="no images to draw from"):
        make_draws(FewImages([]), SIZE, degrade=noisy)
    for names in ([], ["a"], ["a", "a", "b"]):
        with pytest.raises(ValueError, match="3 images need as many different names"):
            make_draws(FewImages(few.clean, names=names), SIZE, degrade=noisy)


# Holding out


def test_holding_out():
    for count in range(2, 60):
        for share in (0.01, 0.2, 0.5, 0.99):
            train, held = held_out(count, share)
            assert sorted(train + held) == [*range(count)]
            assert (train, held) == (sorted(train), sorted(held))
            assert train
            assert 1 <= len(held) <= max(1, round(count * share + 1e-9))
    assert held_out(1) == ([0], [])
    assert held_out(10, seed=1) == held_out(10, seed=1)
    assert len({tuple(held_out(10, seed=seed)[1]) for seed in range(10)}) > 5
    for wrong in (0, -1):
        with pytest.raises(ValueError, match=f"an image at least, got n_images={wrong}"):
            held_out(wrong)
    for share in (0, 1, -0.5, float("nan")):
        with pytest.raises(ValueError, match="share must be above 0 and below 1"):
            held_out(4, share)
