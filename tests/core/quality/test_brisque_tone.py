"""BRISQUE with tone: the tone against numpy, and what BRISQUE alone cannot tell apart."""

import copy
import warnings

import numpy as np
import pytest
import timm
import torch
from skimage import data
from torch._subclasses.fake_tensor import FakeTensorMode

from quac_plugins import QuACConfig, inject
from quac_plugins.core.quality.brisque import brisque
from quac_plugins.core.quality.brisque_tone import brisque_tone
from quac_plugins.core.quality.given import contexts_of
from quac_plugins.core.quality.registry import quality_names, resolve_quality
from quac_plugins.degradations import corrupt


def by_numpy(images):
    """The 11 numbers, as plainly as can be; (B, 11)."""
    rows = []
    for image in images.double().numpy():
        luminance = 0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2]
        percentiles = np.percentile(luminance, [1, 25, 50, 75, 99], method="linear")
        rows.append([*image.mean((1, 2)), *image.std((1, 2)), *percentiles])
    return torch.tensor(rows)


def tone(images):
    return brisque_tone(images)[:, 36:]


def pictures(size):
    crops = [getattr(data, name)()[: size[0], : size[1], :3] for name in ("astronaut", "coffee", "chelsea", "rocket")]
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 255


@pytest.mark.parametrize("size", [(300, 420), (224, 224), (97, 41), (10, 11), (2, 3), (1, 5), (1, 2), (1, 1)])
def test_tone_equals_numpy(size):
    for images in (pictures(size), torch.rand(3, 3, *size), (torch.rand(3, 3, *size) > 0.8).float()):
        torch.testing.assert_close(tone(images.double()), by_numpy(images), rtol=0, atol=1e-5)
        torch.testing.assert_close(tone(images), by_numpy(images).float(), rtol=0, atol=1e-5)


def test_means_and_deviations_of_float64_are_float64():
    images = torch.rand(2, 3, 50, 60, dtype=torch.float64)
    torch.testing.assert_close(tone(images)[:, :6], by_numpy(images)[:, :6], rtol=0, atol=1e-14)


def test_the_rest_is_brisque(photographs):
    images = photographs(4, 64)
    q = brisque_tone(images)
    assert q.shape == (4, 47)
    assert torch.equal(q[:, :36], brisque(images))


def test_dtypes(photographs):
    images = photographs(2, 64)
    assert brisque_tone(images).dtype == torch.float32
    assert brisque_tone(images.double()).dtype == torch.float64
    torch.testing.assert_close(brisque_tone(images.double()).float(), brisque_tone(images), rtol=1e-5, atol=1e-5)
    for dtype in (torch.float16, torch.bfloat16):
        q = brisque_tone(images.to(dtype))
        assert q.dtype == torch.float32
        assert torch.equal(q, brisque_tone(images.to(dtype).float()))
    expected = brisque_tone(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(brisque_tone(images), expected)


@pytest.mark.parametrize("size", [(40, 56), (33, 31), (1, 1), (224, 224)])
def test_an_image_does_not_depend_on_its_batch(size):
    images = torch.rand(9, 3, *size)
    together = brisque_tone(images)
    assert torch.equal(together, torch.cat([brisque_tone(image[None]) for image in images]))
    assert torch.equal(together, brisque_tone(images.to(memory_format=torch.channels_last)))
    assert torch.equal(together, brisque_tone(images))


def test_grey_equals_rgb():
    grey = torch.from_numpy(data.camera().astype(np.float32) / 255)[None, None]
    assert torch.equal(brisque_tone(grey), brisque_tone(grey.expand(-1, 3, -1, -1)))


@pytest.mark.parametrize("value", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("size", [(24, 24), (1, 1)])
def test_flat_images(value, size):
    q = tone(torch.full((2, 3, *size), value))
    expected = torch.tensor([value] * 3 + [0.0] * 3 + [value] * 5)
    torch.testing.assert_close(q, expected.expand(2, 11), rtol=0, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e30, -3.0])
def test_always_finite_and_in_range(value):
    some = torch.where(torch.rand(1, 3, 32, 32) > 0.9, value, torch.randn(1, 3, 32, 32))
    for images in (some, torch.full((1, 3, 8, 8), value), torch.full((1, 3, 1, 1), value)):
        q = brisque_tone(images)
        assert q.isfinite().all()
        assert ((q[:, 36:] >= 0) & (q[:, 36:] <= 1)).all()


def test_nan_is_black_and_outside_is_clamped(photographs):
    images = photographs(3, 64)
    broken, black = images.clone(), images.clone()
    broken[0, 1, 10:20, 10:20], black[0, :, 10:20, 10:20] = float("nan"), 0
    broken[1, 0, 5:9], black[1, 0, 5:9] = float("inf"), 1
    broken[1, 2, 5:9], black[1, 2, 5:9] = float("-inf"), 0
    broken[2, :, 5:9], black[2, :, 5:9] = -3.0, 0
    before = broken.clone()
    assert torch.equal(brisque_tone(broken), brisque_tone(black))
    torch.testing.assert_close(broken, before, rtol=0, atol=0, equal_nan=True)  # and the images are left alone


def test_images_are_left_alone(photographs):
    images = photographs(2, 64).double().contiguous()
    images[0, 0, 0, 0] = float("nan")
    before = images.clone()
    brisque_tone(images)
    torch.testing.assert_close(images, before, rtol=0, atol=0, equal_nan=True)


def test_empty_batch():
    assert brisque_tone(torch.rand(0, 3, 32, 32)).shape == (0, 47)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (np.zeros((1, 3, 8, 8), np.float32), TypeError, "ndarray"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), TypeError, "torch.uint8.*/ 255"),
        (torch.zeros(3, 8, 8), ValueError, r"3 dimensions: \(3, 8, 8\)"),
        (torch.zeros(1, 4, 8, 8), ValueError, "got 4"),
        (torch.zeros(1, 3, 0, 8), ValueError, r"\(1, 3, 0, 8\)"),
    ],
)
def test_wrong_images_are_named(images, error, message):
    with pytest.raises(error, match=message):
        brisque_tone(images)


def test_gradient_reaches_the_images_and_is_finite(photographs):
    for images in (photographs(2, 32), torch.full((1, 3, 16, 16), 0.5), torch.zeros(1, 3, 16, 16)):
        leaf = images.clone().requires_grad_()
        q = brisque_tone(leaf)
        assert torch.equal(q.detach(), brisque_tone(images))
        q.sum().backward()
        assert leaf.grad.isfinite().all()
    images = photographs(1, 10).double()
    images = images.clamp(0.01, 0.99).requires_grad_()  # not at the edges of the clamp
    assert torch.autograd.gradcheck(lambda x: tone(x)[:, :6], images)


def test_compiles_whole_with_the_same_result(photographs):
    torch._dynamo.reset()
    batch = photographs(4, 64)
    # flat ones with the signs of their rounding errors, and values above the range
    images = torch.cat([batch, torch.ones_like(batch[:1]), batch[:1] * 2, torch.full_like(batch[:1], float("nan"))])
    compiled = torch.compile(brisque_tone, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), brisque_tone(images), rtol=1e-5, atol=1e-6)


class Quality(torch.nn.Module):
    def forward(self, images):
        return brisque_tone(images)


@pytest.mark.parametrize("strict", [False, True])
def test_exports_with_a_dynamic_batch_and_size(photographs, strict):
    dim = torch.export.Dim
    dynamic = {0: dim("batch", min=1, max=64), 2: dim("height", min=8, max=512), 3: dim("width", min=8, max=512)}
    program = torch.export.export(Quality(), (photographs(4, 64),), dynamic_shapes=(dynamic,), strict=strict)
    for images in (photographs(4, 64), torch.rand(3, 3, 45, 70)):
        torch.testing.assert_close(program.module()(images), brisque_tone(images), rtol=1e-5, atol=1e-6)


def test_traces(photographs):
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(brisque_tone, photographs(4, 64))
    torch.testing.assert_close(traced(photographs(2, 64)), brisque_tone(photographs(2, 64)), rtol=1e-5, atol=1e-6)


def test_meta_and_fake_tensors(photographs):
    q = brisque_tone(torch.empty(3, 3, 64, 48, device="meta"))
    assert (q.shape, q.device.type) == ((3, 47), "meta")
    with FakeTensorMode():
        assert brisque_tone(torch.empty(3, 3, 64, 48)).shape == (3, 47)
    with torch.device("meta"):
        assert brisque_tone(photographs(2, 64)).device.type == "cpu"  # follows the images, not the default device


def test_has_its_name(photographs):
    assert "brisque_tone" in quality_names()
    found = resolve_quality("brisque_tone")
    assert found.channels == 47
    assert torch.equal(found(photographs(2, 64)), brisque_tone(photographs(2, 64)))
    assert torch.equal(copy.deepcopy(found)(photographs(2, 64)), brisque_tone(photographs(2, 64)))


def test_tone_tells_fog_from_contrast(photographs):
    clean = (photographs(8, 128).permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()

    def corrupted(name):
        images = np.stack([corrupt(image, name, 3, seed) for seed, image in enumerate(clean)])
        return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255

    fog, contrast = brisque_tone(corrupted("fog")), brisque_tone(corrupted("contrast"))
    low, high = 36 + 6, 36 + 10
    assert (fog[:, low] - contrast[:, low]).abs().mean() > 0.05
    assert (fog[:, high] > contrast[:, high]).all()  # fog is bright
    spread = [q[:, 36:39].amax(1) - q[:, 36:39].amin(1) for q in (fog, contrast)]
    assert (spread[0] < spread[1]).all()  # fog is white, low contrast keeps the colour of the picture


def test_drives_a_network(photographs):
    model = timm.create_model("test_resnet", num_classes=5)
    inject(model, QuACConfig(quality="brisque_tone", init="paper", norm="layer"))
    images = photographs(2, 64)
    assert model.eval()(images).shape == (2, 5)
    (context,) = contexts_of(model)
    assert context.channels == 47
    assert context.q.shape == (2, 47)
    model.train()(images).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    model.eval()(images)
    plain = context.q
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(images)
    assert torch.equal(context.q, plain)
