"""BRISQUE against OpenCV's, on photographs; and that it is finite, batched, and compiles everywhere."""

import copy
import warnings

import cv2
import numpy as np
import pytest
import torch
from skimage import data
from torch._subclasses.fake_tensor import FakeTensorMode

from quac_plugins.core.quality.brisque import brisque
from quac_plugins.core.quality.registry import resolve_quality

SHAPES = [0, 2, 6, 10, 14, 18, 20, 24, 28, 32]
MEANS = [3, 7, 11, 15, 21, 25, 29, 33]


def photograph(name, size=None):
    picture = getattr(data, name)()
    picture = picture if picture.ndim == 3 else np.repeat(picture[..., None], 3, axis=-1)
    return np.ascontiguousarray(picture[: size and size[0], : size and size[1]])


def degraded(picture, how):
    if how == "noise":
        noise = np.random.default_rng(0).normal(0, 25, picture.shape)
        return np.clip(picture + noise, 0, 255).round().astype(np.uint8)
    if how == "blur":
        return cv2.GaussianBlur(picture, (0, 0), 3)
    if how == "jpeg":
        return cv2.imdecode(cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 10])[1], cv2.IMREAD_COLOR)
    if how == "saturated":
        return np.clip(picture.astype(int) * 2 - 60, 0, 255).astype(np.uint8)
    return picture


def tensor(picture):
    return torch.from_numpy(picture.astype(np.float32) / 255).permute(2, 0, 1)[None]


def reference(picture):
    assert hasattr(cv2.quality, "QualityBRISQUE_computeFeatures"), (
        "cv2 is not the contrib build (another opencv package may have overwritten it): "
        "reinstall opencv-contrib-python-headless"
    )
    return cv2.quality.QualityBRISQUE_computeFeatures(np.ascontiguousarray(picture[..., ::-1])).ravel()


def relative_error(actual, expected):
    # means of products cross zero, so theirs is taken relative to the spread they are a difference of
    scale = np.abs(expected) + 1e-6
    for i in MEANS:
        scale[i] = max(scale[i], np.sqrt(max(expected[i + 1], expected[i + 2])))
    return np.abs(actual - expected) / scale


@pytest.fixture(scope="module")
def batch():
    pictures = [photograph(name, (96, 112)) for name in ("astronaut", "coffee", "chelsea", "rocket")]
    return torch.cat([tensor(picture) for picture in pictures])


@pytest.fixture(params=["plain", "native"])
def kernels(request, monkeypatch):
    monkeypatch.setenv("QUAC_KERNELS", request.param)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "BRISQUE could not be compiled")
        yield


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("how", ["clean", "noise", "blur", "jpeg", "saturated"])
@pytest.mark.parametrize("name", ["astronaut", "coffee", "chelsea", "rocket", "camera"])
def test_equals_opencv_on_photographs(name, how):
    picture = photograph(name)
    picture = degraded(picture[: picture.shape[0] // 2 * 2, : picture.shape[1] // 2 * 2].copy(), how)
    actual, expected = brisque(tensor(picture))[0].numpy(), reference(picture)
    assert relative_error(actual, expected).max() < 2e-3
    assert np.median(np.abs(actual - expected) / np.abs(expected)) < 1e-4
    # a shape is found on the same grid; float32 sums may move it by one step
    assert np.abs(actual - expected)[SHAPES].max() < 1.1e-3


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("size", [(223, 224), (224, 223), (181, 333), (64, 48), (7, 9), (5, 5), (3, 3)])
def test_equals_opencv_at_other_sizes(size):
    for name in ("chelsea", "coffee", "astronaut"):
        picture = photograph(name)[100:, 100:][: size[0], : size[1]]
        actual, expected = brisque(tensor(picture))[0].numpy(), reference(picture)
        known = np.isfinite(expected)  # a side without samples is NaN in the reference
        assert relative_error(actual, expected)[known].max() < 5e-3
        assert np.isfinite(actual).all()


def test_float_images_are_read_as_8_bit(batch):
    expected = brisque(batch)
    slightly_off = batch + (torch.rand_like(batch) - 0.5) * (0.8 / 255)
    assert torch.equal(brisque(slightly_off), expected)
    mean, std = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    assert torch.equal(brisque((batch - mean) / std * std + mean), expected)


def test_grey_images_equal_opencv_and_equal_rgb():
    picture = data.camera()
    grey = torch.from_numpy(picture.astype(np.float32) / 255)[None, None]
    assert torch.equal(brisque(grey), brisque(grey.expand(-1, 3, -1, -1)))
    expected = cv2.quality.QualityBRISQUE_computeFeatures(picture).ravel()
    assert relative_error(brisque(grey)[0].numpy(), expected).max() < 1e-3


def test_dtypes(batch):
    expected = brisque(batch)
    assert expected.dtype == torch.float32
    double = brisque(batch.double())
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), expected)
    for dtype in (torch.float16, torch.bfloat16):
        q = brisque(batch.to(dtype))
        assert q.dtype == torch.float32
        assert torch.equal(q, brisque(batch.to(dtype).float()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(brisque(batch), expected)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("size", [(40, 56), (33, 31), (1, 1), (224, 224)])
def test_an_image_does_not_depend_on_its_batch(size):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(9, 3, *size, generator=generator)
    together = brisque(images)
    alone = torch.cat([brisque(image[None]) for image in images])
    assert torch.equal(together, alone)
    assert torch.equal(brisque(images.to(memory_format=torch.channels_last)), together)


@pytest.mark.parametrize("name", ["astronaut", "rocket"])
def test_one_pass_finds_the_sums_of_the_expression(name, monkeypatch):
    image, found = tensor(photograph(name)), []
    threads = torch.get_num_threads()
    for choice, count in (("plain", 1), ("native", 1), ("native", 3)):
        monkeypatch.setenv("QUAC_KERNELS", choice)
        torch.set_num_threads(count)
        found.append(brisque(image.double()))
    torch.set_num_threads(threads)
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)
    assert torch.equal(found[1], found[2])


def test_empty_batch():
    assert brisque(torch.rand(0, 3, 32, 32)).shape == (0, 36)


ODD_IMAGES = {
    "black": torch.zeros(1, 3, 32, 32),
    "white": torch.ones(1, 3, 32, 32),
    "grey": torch.full((1, 3, 32, 32), 0.5),
    "red": torch.tensor([1.0, 0.0, 0.0])[None, :, None, None].expand(1, 3, 20, 24),
    "1x1": torch.rand(1, 3, 1, 1),
    "2x3": torch.rand(1, 3, 2, 3),
    "5x5": torch.rand(1, 3, 5, 5),
    "1x40": torch.rand(1, 3, 1, 40),
    "40x1": torch.rand(1, 3, 40, 1),
    "ramp": torch.linspace(0, 1, 40).expand(1, 3, 40, 40),
    "two values": (torch.rand(1, 1, 32, 32) > 0.5).float().expand(1, 3, 32, 32),
    "a dot": torch.nn.functional.pad(torch.ones(1, 3, 1, 1), (20, 20, 20, 20)),
    "a hole": 1 - torch.nn.functional.pad(torch.ones(1, 3, 1, 1), (20, 20, 20, 20)),
    "out of range": torch.randn(1, 3, 32, 32) * 100,
    "nan": torch.full((1, 3, 32, 32), float("nan")),
    "inf": torch.full((1, 3, 32, 32), float("inf")),
    "some nan and inf": torch.where(torch.rand(1, 3, 32, 32) > 0.9, float("nan"), torch.randn(1, 3, 32, 32) / 0),
}


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", ODD_IMAGES)
def test_always_finite_and_in_range(name):
    q = brisque(ODD_IMAGES[name])
    assert q.shape == (1, 36)
    assert q.isfinite().all()
    assert ((q[:, SHAPES] >= 0.2) & (q[:, SHAPES] <= 10)).all()
    variances = [i for i in range(36) if i not in SHAPES + MEANS]
    assert (q[:, variances] >= 0).all()


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("value", [0.0, 50 / 255, 0.5, 180 / 255, 250 / 255, 1.0])
@pytest.mark.parametrize("size", [(24, 24), (63, 65), (255, 33), (7, 9), (1, 1)])
def test_constant_image(size, value):
    """What rounding leaves of it says nothing, least of all whether the sides are odd."""
    expected = torch.zeros(36)
    expected[SHAPES] = 10.0
    assert torch.equal(brisque(torch.full((2, 3, *size), value)), expected.expand(2, 36))


def test_a_single_pixel_is_not_constant():
    """Among the rounding errors that this level leaves."""
    images = torch.full((1, 3, 2048, 2048), 180 / 255)
    images[..., 200, 300] += 1 / 255
    assert 1e-7 < brisque(images)[0, 1] < 1e-2


def test_nan_is_black_and_outside_is_clamped(batch):
    broken, black = batch.clone(), batch.clone()
    broken[0, 1, 10:20, 10:20] = float("nan")
    black[0, :, 10:20, 10:20] = 0
    broken[1, :, 5:9], black[1, :, 5:9] = float("inf"), 1
    broken[2, :, 5:9], black[2, :, 5:9] = -3.0, 0
    assert torch.equal(brisque(broken), brisque(black))


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (np.zeros((1, 3, 8, 8), np.float32), TypeError, "ndarray"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), TypeError, "torch.uint8.*/ 255"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.int64), TypeError, "torch.int64"),
        (torch.zeros(3, 8, 8), ValueError, r"3 dimensions: \(3, 8, 8\)"),
        (torch.zeros(1, 4, 8, 8), ValueError, "got 4"),
        (torch.zeros(1, 8, 8, 3), ValueError, r"got 8: images \(1, 8, 8, 3\)"),
        (torch.zeros(1, 3, 0, 8), ValueError, r"\(1, 3, 0, 8\)"),
    ],
)
def test_wrong_images_are_named(images, error, message):
    with pytest.raises(error, match=message):
        brisque(images)


def test_gradient_reaches_the_images_and_is_finite(batch):
    for images in (batch, torch.full((1, 3, 16, 16), 0.5), torch.zeros(1, 3, 16, 16), torch.rand(1, 1, 1, 1)):
        leaf = images.clone().requires_grad_()
        q = brisque(leaf)
        assert torch.equal(q.detach(), brisque(images))
        q.sum().backward()
        assert leaf.grad.isfinite().all()
    leaf = batch.clone().requires_grad_()
    brisque(leaf)[:, 1].sum().backward()
    assert leaf.grad.abs().max() > 0


def test_gradient_descends(batch):
    # the variance of the coefficients falls along its gradient: rounding passes gradients straight through
    leaf = batch.clone().requires_grad_()
    before = brisque(leaf)[:, 1].sum()
    before.backward()
    step = leaf.grad.sign() / 255
    assert brisque((batch - step).clamp(0, 1))[:, 1].sum() < before


# compiled and exported it is in test_brisque_tone.py, whose first 36 numbers are these


def test_traces(batch):
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(brisque, batch)
    torch.testing.assert_close(traced(batch[:2]), brisque(batch[:2]), rtol=1e-5, atol=1e-6)


def test_meta_and_fake_tensors(batch):
    q = brisque(torch.empty(3, 3, 64, 48, device="meta"))
    assert q.shape == (3, 36)
    assert q.device.type == "meta"
    with FakeTensorMode():
        q = brisque(torch.empty(3, 3, 64, 48))
        assert q.shape == (3, 36)
    with torch.device("meta"):
        assert brisque(torch.empty(3, 3, 64, 48)).device.type == "meta"
        assert brisque(batch).device.type == "cpu"  # follows the images, whatever the default device
    assert brisque(batch).isfinite().all()  # nothing fake is left behind


def test_has_its_name(batch):
    found = resolve_quality("brisque")
    assert found.channels == 36
    assert torch.equal(found(batch), brisque(batch))
    assert torch.equal(copy.deepcopy(found)(batch), brisque(batch))
