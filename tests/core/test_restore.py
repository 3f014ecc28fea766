"""A restorer in front of a model: what it gets and returns, whose quality q describes, and that nothing slips by."""

import copy
import io
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from skimage import data
from skimage.restoration import denoise_tv_chambolle
from small_hosts import small_host
from timm.optim import create_optimizer_v2
from torch import nn

import quac_plugins as quac
from quac_plugins import QuACConfig
from quac_plugins.core.quality.brisque import brisque
from quac_plugins.core.quality.given import contexts_of, quality_given
from quac_plugins.core.quality.tap import QualityTap
from quac_plugins.core.restore import RestoreThen, restore_then
from quac_plugins.evaluate import evaluate

SIZE = 64
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Median(nn.Module):
    """A median filter of 3×3, as a network: no parameters, differentiable."""

    def forward(self, images):
        around = F.pad(images, (1, 1, 1, 1), mode="replicate").unfold(2, 3, 1).unfold(3, 3, 1)
        return around.flatten(-2).median(-1).values


class Blend(nn.Module):
    """A small restoration network: the image, plus a learned part."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, images):
        return 0.9 * images + 0.1 * self.conv(images).sigmoid()


def identity(images):
    return images


def total_variation(images):
    return np.stack([denoise_tv_chambolle(image, weight=0.1, channel_axis=-1) for image in images])


def spread(values):
    return torch.tensor(values).reshape(1, -1, 1, 1)


def normalize(images, mean=MEAN, std=STD):
    return (images - spread(mean)) / spread(std)


def host(quality="brisque", name="test_resnet", activation="qacon", mean=MEAN, std=STD, order="rgb", **kwargs):
    """A real network that is in the dark without q: every activation depends on it."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **kwargs)
    config = QuACConfig(
        activation, quality=quality, init="paper", norm="layer", mean=mean, std=std, channel_order=order
    )
    return quac.inject(model, config).eval()


@pytest.fixture
def noisy(photographs):
    clean = photographs(4, SIZE)
    return (clean + 0.1 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)


# -- the model gets what the restorer made


@pytest.mark.parametrize("quality", ["restored", "degraded"])
@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_an_identity_changes_nothing(quality, order, photographs):
    model = host(order=order)
    images = photographs(3, SIZE)
    images = normalize(images.flip(1) if order == "bgr" else images)
    expected = model(images)
    seen = []

    def restorer(rgb):
        seen.append(rgb)
        return rgb

    torch.testing.assert_close(restore_then(model, restorer, quality)(images), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(seen[0], photographs(3, SIZE), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("restorer", "kind"),
    [(Median(), "pt"), (total_variation, "np")],
    ids=["median network", "total variation of skimage"],
)
def test_a_real_restorer_brings_photographs_nearer(restorer, kind, photographs):
    clean = photographs(4, 128)
    noisy = (clean + 0.15 * torch.randn(clean.shape)).clamp(0, 1)
    model = host()
    both = restore_then(model, restorer, restorer_input=kind)
    restored = both.restore(normalize(noisy)) * spread(STD) + spread(MEAN)

    def psnr(images):
        return -10 * (images - clean).square().mean((1, 2, 3)).log10()

    assert (psnr(restored) > psnr(noisy) + 2).all()
    assert not torch.allclose(both(normalize(noisy)), model(normalize(noisy)), atol=1e-3)
    assert torch.equal(both(normalize(noisy)), model(both.restore(normalize(noisy))))


def test_a_plain_host_of_timm(photographs):
    model = timm.create_model("test_resnet", num_classes=5).eval()
    images = normalize(photographs(2, SIZE), (0.5,) * 3, (0.5,) * 3)  # as its pretrained_cfg says
    both = restore_then(model, Median())
    expected = model(normalize(Median()(photographs(2, SIZE)), (0.5,) * 3, (0.5,) * 3))
    torch.testing.assert_close(both(images), expected, atol=1e-4, rtol=1e-4)


def test_a_host_without_a_normalization_takes_images_in_0_1(photographs):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten())
    images = photographs(2, 16)
    both = restore_then(model, identity)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(both(images), model(images))
    with pytest.warns(UserWarning, match=r"images lie in \[-.*mean=…"):
        both(normalize(images))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        both(normalize(images))  # once is enough
        torch.testing.assert_close(
            restore_then(model, identity, mean=MEAN, std=STD)(normalize(images)),
            model(normalize(images)),
            atol=1e-5,
            rtol=1e-5,
        )
        restore_then(model, identity, mean=0.5, std=0.5)(images * 2 - 1)


def test_explicit_normalization_goes_before_the_tap(photographs):
    seen = []
    both = restore_then(host(), lambda rgb: seen.append(rgb) or rgb, mean=0.5, std=0.25, channel_order="bgr")
    both(normalize(photographs(2, SIZE).flip(1), (0.5,), (0.25,)))
    torch.testing.assert_close(seen[0], photographs(2, SIZE), atol=1e-6, rtol=0)


@pytest.mark.parametrize("quac_inside", [True, False])
def test_a_grey_host(quac_inside):
    grey = torch.from_numpy(data.camera()[None, None, 100:196, 100:196] / 255).float()
    model = timm.create_model("test_resnet", in_chans=1, num_classes=5).eval()
    if quac_inside:
        quac.inject(model, QuACConfig(init="paper", norm="layer"))
    images = (grey - 0.5) / 0.5
    seen = []

    def restorer(rgb):
        seen.append(rgb)
        return Median()(rgb) * spread((0.9, 1.0, 1.1))

    for quality in ("restored", "degraded")[: 1 + quac_inside]:
        both = restore_then(model, restorer, quality)
        torch.testing.assert_close(seen.pop() if seen else grey.expand(1, 3, -1, -1), grey.expand(1, 3, -1, -1))
        expected = (Median()(grey) * spread((0.9, 1.0, 1.1))).clamp(0, 1).mean(1, keepdim=True)
        torch.testing.assert_close(both.restore(images) * 0.5 + 0.5, expected, atol=1e-6, rtol=0)
        assert both(images).shape == (1, 5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype, photographs):
    model = host().to(dtype)
    images = normalize(photographs(2, SIZE)).to(dtype)
    seen = []
    both = restore_then(model, lambda rgb: seen.append(rgb.dtype) or rgb, "degraded")
    torch.testing.assert_close(both(images), model(images), atol=0.05, rtol=0.05)
    assert both(images).dtype == dtype
    assert seen[0] == (torch.float64 if dtype == torch.float64 else torch.float32)
    network = Blend().to(torch.bfloat16)  # gets images of its own dtype
    assert restore_then(model, network).restore(images).dtype == dtype


def test_autocast(noisy):
    both = restore_then(host(), Blend(), "degraded")
    plain = both(normalize(noisy))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(both(normalize(noisy)).float(), plain, atol=0.3, rtol=0.1)


# -- q


def watch(model, where="layer2"):
    """Records the q that is current inside the model."""
    seen = []
    (context,) = contexts_of(model)
    model.get_submodule(where).register_forward_hook(lambda layer, args, y: seen.append(context.current(y, where)))
    return seen


def test_q_describes_what_the_network_sees_or_what_came_in(noisy):
    model = host()
    seen = watch(model)
    for quality, expected in (("restored", Median()(noisy)), ("degraded", noisy)):
        both = restore_then(model, Median(), quality)
        both(normalize(noisy))
        assert torch.equal(seen[-1], brisque(expected))
    assert restore_then(model, Median()).adapt_to == "restored"
    assert not torch.equal(seen[-1], seen[-2])


def test_degraded_is_the_same_as_giving_q_by_hand(noisy):
    model = host()
    both = restore_then(model, Median(), "degraded")
    with quac.use_q(model, brisque(noisy)):
        expected = model(both.restore(normalize(noisy)))
    assert torch.equal(both(normalize(noisy)), expected)
    assert not torch.allclose(restore_then(model, Median())(normalize(noisy)), expected)


@pytest.mark.parametrize("quality", ["restored", "degraded"])
def test_q_given_by_hand_goes_first(quality, noisy):
    model = host()
    seen = watch(model)
    both = restore_then(model, Median(), quality)
    given = torch.full((4, 36), 0.5)
    with quac.use_q(both, given):
        both(normalize(noisy))
    assert torch.equal(seen[-1], given)
    both(normalize(noisy))
    assert torch.equal(seen[-1], brisque(noisy if quality == "degraded" else Median()(noisy)))


def test_nothing_stays_given_after_the_call(noisy):
    model = host()
    before = model(normalize(noisy))
    both = restore_then(model, Median(), "degraded")
    both(normalize(noisy))
    (context,) = contexts_of(model)
    assert context.given is None
    assert context.given_q() is None
    assert torch.equal(model(normalize(noisy)), before)
    with pytest.raises(ValueError, match=r"batch|images"):
        both(normalize(noisy)[0])
    assert context.given_q() is None


class Two(nn.Module):
    """Two networks on one image, with quality functions of different width."""

    def __init__(self, cheap, **kwargs):
        super().__init__()
        self.first, self.second = host(), host(cheap, **kwargs)

    def forward(self, images):
        return self.first(images) + self.second(images)


def test_several_contexts_get_each_their_own(noisy, cheap):
    model = Two(cheap)
    seen = watch(model.first), watch(model.second)
    restore_then(model, Median(), "degraded")(normalize(noisy))
    assert torch.equal(seen[0][-1], brisque(noisy))
    torch.testing.assert_close(seen[1][-1], cheap(noisy), atol=1e-6, rtol=1e-5)
    with quality_given([(contexts_of(model)[1], torch.zeros(4, 6))]):  # one by hand, the other measured
        restore_then(model, Median(), "degraded")(normalize(noisy))
    assert torch.equal(seen[0][-1], brisque(noisy))
    assert torch.equal(seen[1][-1], torch.zeros(4, 6))


def test_taps_that_disagree_are_an_error(noisy, cheap):
    model = Two(cheap, mean=(0.5,), std=(0.5,))
    with pytest.raises(ValueError, match=r"taps of the model disagree.*0\.485.*0\.5.*[Gg]ive mean"):
        restore_then(model, identity)
    restore_then(model, identity, mean=MEAN, std=STD)(normalize(noisy))


def test_quac_in_the_restorer_is_left_alone(noisy, cheap):
    class Denoiser(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.act, self.out = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1)

        def forward(self, images):
            return images + 0.1 * self.out(self.act(self.stem(images)))

    restorer = quac.inject(Denoiser(), QuACConfig(quality=cheap, init="paper", norm="layer")).eval()
    both = restore_then(host(), restorer, "degraded").eval()
    with torch.no_grad():
        both(normalize(noisy))
    torch.testing.assert_close(contexts_of(restorer)[0].q, cheap(noisy), atol=1e-6, rtol=1e-5)


def test_threads(noisy, photographs):
    model = host()
    both = restore_then(model, Median(), "degraded")
    images = [normalize(x[None]) for x in [*noisy, *photographs(4, SIZE)]]
    barrier = threading.Barrier(8)

    def work(i):
        torch.set_num_threads(1)
        with torch.no_grad():
            barrier.wait()
            return [both(images[i]) for _ in range(5)]

    with torch.no_grad():
        serial = [both(image) for image in images]
    with ThreadPoolExecutor(8) as pool:
        for i, outputs in enumerate(pool.map(work, range(8))):
            assert all(torch.equal(output, serial[i]) for output in outputs)


# -- what restorers take and return


def pt(images):
    return images.clamp(0.1, 1)


OUTPUTS = {
    "array": lambda images: images,
    "float64": lambda images: images.astype(np.float64),
    "float16": lambda images: images.astype(np.float16),
    "reversed": lambda images: np.ascontiguousarray(images[:, ::-1])[:, ::-1],
    "uint8": lambda images: (images * 255).round().astype(np.uint8),
    "arrays": lambda images: list(images),
    "pil": lambda images: [Image.fromarray((image * 255).round().astype(np.uint8)) for image in images],
    "rgba": lambda images: [
        Image.fromarray((image * 255).round().astype(np.uint8)).convert("RGBA") for image in images
    ],
    "tensor": lambda images: torch.from_numpy(images).permute(0, 3, 1, 2),
}


@pytest.mark.parametrize("wrap", [lambda output: output, lambda output: SimpleNamespace(images=output)])
@pytest.mark.parametrize("kind", OUTPUTS)
def test_outputs(kind, wrap, photographs):
    images = photographs(2, SIZE)
    both = restore_then(host(), lambda x: wrap(OUTPUTS[kind](x)), restorer_input="np")
    torch.testing.assert_close(both.restore(normalize(images)), normalize(images), atol=0.5 / 255 / 0.22, rtol=0)


def test_inputs(photographs):
    images = photographs(2, SIZE)
    seen = []
    for kind in ("pt", "np", "pil"):
        restore_then(host(), lambda x: seen.append(x) or x, restorer_input=kind)(normalize(images))
    tensor, array, pictures = seen
    torch.testing.assert_close(tensor, images, atol=1e-6, rtol=0)
    assert (array.dtype, array.shape) == (np.float32, (2, SIZE, SIZE, 3))
    np.testing.assert_allclose(array, images.permute(0, 2, 3, 1).numpy(), atol=1e-6)
    assert [(p.mode, p.size) for p in pictures] == [("RGB", (SIZE, SIZE))] * 2
    np.testing.assert_allclose(np.stack(pictures) / 255, array, atol=0.51 / 255)


class Pipeline:
    """As the pipelines of diffusers: a prompt first, numbers of steps, an output with .images."""

    def __call__(self, prompt, image=None, num_inference_steps=50, output_type="pil"):
        assert (prompt, num_inference_steps, output_type) == ("a clear photograph", 3, "np")
        return SimpleNamespace(images=np.stack([np.asarray(p.resize((2 * SIZE, 2 * SIZE))) / 255 for p in image]))


def test_a_pipeline_gets_its_image_by_name(photographs):
    kwargs = {"prompt": "a clear photograph", "num_inference_steps": 3, "output_type": "np"}
    both = restore_then(host(), Pipeline(), restorer_input="pil", restorer_kwargs=kwargs)
    images = normalize(photographs(2, SIZE))
    assert both(images).shape == (2, 5)
    assert (both.restore(images) - images).abs().mean() < 0.1
    assert "restorer=Pipeline" in repr(both)


@pytest.mark.parametrize("size", [(128, 128), (96, 200), (32, 32), (65, 64)])
def test_another_size_is_brought_back(size, photographs):
    images = photographs(2, SIZE)
    both = restore_then(host(), lambda rgb: F.interpolate(rgb, size=size, mode="bilinear", antialias=True))
    restored = both.restore(normalize(images)) * spread(STD) + spread(MEAN)
    assert restored.shape == images.shape
    assert (restored - images).abs().mean() < (0.03 if min(size) >= SIZE else 0.06)
    assert restored.min() > -1e-6
    assert restored.max() < 1 + 1e-6  # a bicubic overshoot is clamped


def test_values_outside_are_clamped_and_far_outside_warned_of(photographs):
    images = normalize(photographs(2, SIZE))
    both = restore_then(host(), lambda rgb: rgb + 0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        restored = both.restore(images) * spread(STD) + spread(MEAN)
    assert restored.max() < 1 + 1e-6
    for factor, name in ((255, "255|25"), (-1, "-1")):
        with pytest.warns(UserWarning, match=rf"'<lambda>' returned values in \[.*{name}.*clamped"):
            restore_then(host(), lambda rgb, factor=factor: rgb * factor).restore(images)


class DnCNN(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, images):
        return self.function(images)


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda x: x[:1], ValueError, r"\(1, 3, 64, 64\).*expected \(2, 3, H, W\)"),
        (lambda x: x.mean(1, keepdim=True), ValueError, r"\(2, 1, 64, 64\)"),
        (lambda x: x.permute(0, 2, 3, 1), ValueError, r"\(2, 64, 64, 3\)"),
        (lambda x: x[0], ValueError, r"\(3, 64, 64\)"),
        (lambda x: x[..., :0], ValueError, r"\(2, 3, 64, 0\)"),
        (lambda x: (x * 255).to(torch.uint8), TypeError, r"torch\.uint8.*divide by 255"),
        (lambda x: x / 0 * 0, ValueError, "NaN or infinite values; expected"),
        (lambda x: torch.where(x == x.max(), float("inf"), x), ValueError, "NaN or infinite"),
        (lambda x: None, TypeError, "returned NoneType; expected a tensor"),
        (lambda x: [np.ones((8, 8, 3), np.uint8), np.ones((8, 8, 3))], TypeError, "float64 and uint8 in one list"),
        (lambda x: {"sample": x}, TypeError, "returned dict"),
        (lambda x: [x, x], TypeError, "list that holds Tensor"),
        (lambda x: (x, 3), TypeError, "tuple that holds Tensor, int"),
        (lambda x: [Image.new("RGB", (8, 8))], ValueError, "1 images for a batch of 2"),
        (lambda x: [], ValueError, "0 images for a batch of 2"),
        (lambda x: [Image.new("RGB", (8, 8)), Image.new("RGB", (8, 9))], ValueError, "different shapes"),
        (lambda x: x.numpy(), ValueError, r"array of shape \(2, 3, 64, 64\); expected \(2, H, W, 3\)"),
        (lambda x: np.zeros((2, 8, 8, 3), np.int64), TypeError, "array of int64"),
        (lambda x: np.zeros((2, 8, 8, 4), np.uint8), ValueError, r"\(2, 8, 8, 4\)"),
        (lambda x: np.full((2, 8, 8, 3), np.nan), ValueError, "NaN"),
    ],
)
def test_what_a_restorer_must_not_return_is_named(function, error, message, photographs):
    both = restore_then(host(), DnCNN(function))
    with pytest.raises(error, match=rf"the restorer 'DnCNN' returned .*{message}|.*'DnCNN'.*{message}"):
        both(normalize(photographs(2, SIZE)))


def test_images_that_are_broken_themselves_are_not_blamed_on_the_restorer(photographs):
    images = normalize(photographs(2, SIZE))
    images[1, 0, 3, 3] = float("nan")
    with pytest.raises(ValueError, match="for images that are not finite themselves"):
        restore_then(host(), identity)(images)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(3, SIZE, SIZE), ValueError, r"\(B, C, H, W\).*got \(3, 64, 64\)"),
        ([torch.zeros(3, SIZE, SIZE)], ValueError, "got list"),
        (torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8), TypeError, r"torch\.uint8.*/ 255"),
        (torch.zeros(1, 1, SIZE, SIZE), ValueError, r"takes images \(B, 3, H, W\), got \(1, 1, 64, 64\)"),
    ],
)
def test_wrong_images_are_named(images, error, message):
    with pytest.raises(error, match=message):
        restore_then(host(), identity)(images)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"adapt_to": "both"}, ValueError, "adapt_to must be one of 'restored', 'degraded', got 'both'"),
        ({"restorer_input": "jpg"}, ValueError, "restorer_input must be one of 'pt', 'np', 'pil', got 'jpg'"),
        ({"channel_order": "grb"}, ValueError, "channel_order must be one of None, 'rgb', 'bgr'"),
        ({"mean": 0.5}, ValueError, "go together"),
        ({"mean": (0.5, 0.5), "std": 0.5}, ValueError, "as many numbers"),
        ({"mean": (0.5, 0.5), "std": (0.5, 0.5)}, ValueError, "have 2 numbers"),
        ({"mean": 0.5, "std": 0.0}, ValueError, "std must be positive"),
        ({"mean": float("nan"), "std": 1.0}, ValueError, "mean must be a number"),
        ({"restorer": None}, TypeError, "restorer must be callable.*NoneType"),
        ({"model": identity}, TypeError, r"nn\.Module, got function"),
        ({"model": nn.Conv2d(3, 3, 1), "adapt_to": "degraded"}, ValueError, "Conv2d does not: call .*inject"),
    ],
)
def test_wrong_options_are_named(kwargs, error, message):
    arguments = {"model": host(), "restorer": identity, **kwargs}
    with pytest.raises(error, match=message):
        restore_then(**arguments)


def test_degraded_needs_an_activation_that_q_drives():
    with pytest.raises(ValueError, match="adapt_to='degraded' needs a model that measures quality"):
        restore_then(host(activation="meta_acon"), identity, "degraded")
    restore_then(host(activation="meta_acon"), identity)


def test_other_numbers_of_channels_are_an_error(photographs):
    with pytest.raises(ValueError, match=r"images of 4 channels.*3, or 1"):
        restore_then(host(in_chans=4), identity)
    plain = restore_then(nn.Conv2d(2, 4, 3), identity)
    with pytest.raises(ValueError, match="images of 2 channels"):
        plain(photographs(1, 16)[:, :2])


# -- a module among modules


@pytest.mark.parametrize("quality", ["restored", "degraded"])
def test_gradients_flow_through_the_restorer(quality, noisy):
    both = restore_then(host(), Blend(), quality).train()
    images = normalize(noisy).requires_grad_()
    both(images).square().sum().backward()
    for parameter in (*both.restorer.parameters(), images):
        value = parameter.grad if isinstance(parameter, nn.Parameter) else images.grad
        assert value.isfinite().all()
        assert value.abs().max() > 0
    assert both.restorer.training
    assert both.model.training
    assert not both.eval().restorer.training


def test_training_only_the_restorer_lowers_a_loss(photographs, noisy):
    model = host().requires_grad_(False)
    both = restore_then(model, Blend())
    optimizer = torch.optim.Adam(both.restorer.parameters(), lr=0.01)
    with torch.no_grad():
        target = model(normalize(photographs(4, SIZE)))
    losses = []
    for _ in range(10):
        loss = (both(normalize(noisy)) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("quality", ["restored", "degraded"])
def test_gradients_under_checkpointing_are_the_same(quality, noisy):
    def gradients(checkpointed):
        both = restore_then(host(), Median(), quality)
        both.set_grad_checkpointing(checkpointed)
        both.train()
        both(normalize(noisy)).square().mean().backward()
        return [p.grad for p in both.model.parameters() if p.grad is not None]

    for found, expected in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-3)


def test_state_dict_copies_and_files(noisy):
    both = restore_then(host(), Blend(), "degraded")
    names = both.state_dict()
    assert {name.split(".")[0] for name in names} == {"model", "restorer"}
    assert {name for name in names if name.startswith("restorer")} == {"restorer.conv.weight", "restorer.conv.bias"}
    expected = both(normalize(noisy))
    buffer = io.BytesIO()
    torch.save(both, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(both), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(normalize(noisy)), expected)
        with torch.no_grad():
            other.restorer.conv.bias.add_(5)
            other.model.fc.bias.add_(5)
        assert torch.equal(both(normalize(noisy)), expected)
    fresh = restore_then(host(), Blend(), "degraded")
    fresh.load_state_dict(names)
    assert torch.equal(fresh(normalize(noisy)), expected)
    assert set(restore_then(host(), identity).state_dict()) == {n for n in names if n.startswith("model")}


def test_further_arguments_reach_the_model(photographs):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 3)

        def forward(self, images, factor, bias=0.0):
            return self.stem(images) * factor + bias

    model = Model()
    images = photographs(2, 16)
    torch.testing.assert_close(restore_then(model, identity)(images, 2.0, bias=1.0), model(images, 2.0, bias=1.0))


def test_manners_of_a_timm_model(noisy):
    model = timm.create_model("test_resnet_qacon", num_classes=5, init="paper", norm="layer").eval()
    both = restore_then(model, Median(), "degraded")
    assert both.num_classes == 5
    assert both.pretrained_cfg is model.pretrained_cfg
    assert both.default_cfg is model.default_cfg
    images = normalize(noisy, (0.5,) * 3, (0.5,) * 3)
    with quac.use_q(model, brisque(noisy)):
        features = model.forward_features(both.restore(images))
        middle = model.forward_intermediates(both.restore(images), indices=1, intermediates_only=True)
    assert torch.equal(both.forward_features(images), features)
    assert torch.equal(both.forward_intermediates(images, indices=1, intermediates_only=True)[0], middle[0])
    with pytest.raises(AttributeError, match=r"no attribute 'forward_head'; .*\.model\.forward_head"):
        both.forward_head  # noqa: B018
    with pytest.raises(AttributeError, match=r"'nothing'$"):
        both.nothing  # noqa: B018
    assert not hasattr(both, "module")
    undecayed = both.no_weight_decay()
    assert undecayed
    assert undecayed <= {name for name, _ in both.named_parameters()}
    groups = create_optimizer_v2(both, "adamw", weight_decay=0.1).param_groups
    free = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    assert all(id(p) in free for name, p in both.named_parameters() if name.endswith((".p1", ".p2")))
    assert not hasattr(restore_then(nn.Conv2d(3, 3, 1), identity), "num_classes")


def test_around_a_wrapped_model(noisy):
    model = host()
    both = restore_then(nn.DataParallel(model), Median(), "degraded")
    assert torch.equal(both(normalize(noisy)), restore_then(model, Median(), "degraded")(normalize(noisy)))
    assert both.num_classes == 5
    plain = restore_then(nn.DataParallel(timm.create_model("test_resnet")), Median())
    assert plain.mean == (0.5, 0.5, 0.5)


def of_few_layers(cheap):
    config = QuACConfig(quality=cheap, init="paper", norm="layer", mean=MEAN, std=STD, where="all")
    return quac.inject(small_host("convolutions"), config, torch.empty(1, 3, SIZE, SIZE)).eval()


@pytest.mark.parametrize("quality", ["restored", "degraded"])
def test_compiles_whole_and_around_a_compiled_model(quality, noisy, cheap):
    torch._dynamo.reset()
    both = restore_then(of_few_layers(cheap), Median(), quality)
    images = normalize(noisy)
    with torch.no_grad():
        expected = both(images)
        compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
        for _ in range(2):
            torch.testing.assert_close(compiled(images), expected, atol=1e-4, rtol=1e-4)
        assert contexts_of(both)[0].given is None
        torch._dynamo.reset()
        inside = restore_then(torch.compile(both.model, backend="aot_eager"), Median(), quality)
        for _ in range(2):
            torch.testing.assert_close(inside(images), expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(both(images), expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("quality", ["restored", "degraded"])
@pytest.mark.parametrize("strict", [False, True])
def test_exports_with_a_dynamic_batch(quality, strict, noisy, cheap):
    both = restore_then(of_few_layers(cheap), Median(), quality)
    images = normalize(noisy)
    expected = both(images)
    dynamic = {0: torch.export.Dim("batch", min=2, max=16)}
    program = torch.export.export(both, (images[:3],), dynamic_shapes=(dynamic,), strict=strict)
    torch.testing.assert_close(program.module()(images), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(both(images), expected)


def test_a_transformer(photographs):
    model = host(name="test_vit", activation="qgelu")
    images = normalize(photographs(2, 160))
    torch.testing.assert_close(restore_then(model, identity, "degraded")(images), model(images), atol=1e-4, rtol=1e-4)


def test_evaluate(tmp_path):
    for index, name in enumerate(("astronaut", "chelsea", "coffee", "rocket")):
        folder = tmp_path / f"class {index}"
        folder.mkdir()
        Image.fromarray(getattr(data, name)()).resize((180, 180)).save(folder / "image.png")
    model = timm.create_model("test_resnet_qacon", num_classes=4, init="paper", norm="layer").eval()
    calls = []

    def restorer(rgb):
        calls.append(rgb)
        return Median()(rgb)

    report = evaluate(restore_then(model, restorer, "degraded"), tmp_path, corruptions="gaussian_noise", severities=3)
    assert report.clean["n"] == 4
    assert report.corruptions["gaussian_noise"]["3"]["n"] == 4
    assert report.model == "test_resnet_qacon.r160_in1k"
    assert calls
    same = evaluate(restore_then(model, identity), tmp_path)
    assert same.clean == evaluate(model, tmp_path).clean


def test_repr_and_class():
    both = restore_then(host(), identity, "degraded")
    assert isinstance(both, RestoreThen)
    assert "restorer=identity, adapt_to=degraded, mean=(0.485" in repr(both)
    assert sum(isinstance(m, QualityTap) for m in both.modules()) == 1


def test_images_that_are_not_finite_become_no_pictures():
    both = restore_then(host(), lambda pictures: pictures, restorer_input="pil")
    images = torch.rand(2, 3, 64, 64)
    images[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="hold NaN or infinite values, which no PIL image can hold"):
        both(images)
