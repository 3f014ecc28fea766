"""The tap: q is that of the RGB image in [0, 1], however the host's images come, on every path through a network."""

import warnings

import pytest
import timm
import torch
from torch import nn

import quac_plugins as quac
from quac_plugins import QuACConfig
from quac_plugins.core.quality.context import QualityContext
from quac_plugins.core.quality.registry import QualityFunction
from quac_plugins.core.quality.tap import QualityTap

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def tap_of(channels=3, mean=None, std=None, order="rgb", needs_grad=False, function=None):
    function = function or (lambda images: images.flatten(1))
    quality = QualityFunction("pixels", 192, function, needs_grad)
    return QualityTap(quality, QualityContext(192), "stem.conv", channels, mean, std, order)


def q_of(tap, images):
    tap.observe(images)
    return tap.context.q


def spread(values):
    return torch.tensor(values).reshape(1, -1, 1, 1)


@pytest.mark.parametrize(
    ("mean", "std"),
    [IMAGENET, ((0.5,) * 3, (0.5,) * 3), ((0.0,), (1 / 255,)), ((0.1,), (2.0,)), ((0.2,) * 3, IMAGENET[1])],
)
@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_normalization_and_order_are_undone(mean, std, order, photographs):
    for images in (photographs(2, 8), torch.rand(2, 3, 8, 8)):
        host = images.flip(1) if order == "bgr" else images
        host = (host - spread(mean)) / spread(std)
        q = q_of(tap_of(mean=mean, std=std, order=order), host)
        torch.testing.assert_close(q, images.flatten(1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6])
def test_any_number_of_channels_becomes_rgb(channels, photographs):
    images = photographs(2, 8)
    images = torch.cat((images, 1 - images), dim=1)[:, :channels]
    q = q_of(tap_of(channels), images).reshape(2, 3, 8, 8)
    if channels >= 3:
        assert torch.equal(q, images[:, :3])
    else:
        torch.testing.assert_close(q, images.mean(1, keepdim=True).expand(2, 3, 8, 8))


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_normalized_images_of_other_channels(channels):
    host = timm.create_model("test_resnet", in_chans=channels)
    seen = []

    def record(images):
        seen.append(images)
        return images.mean((2, 3))

    quac.inject(host, QuACConfig(quality=record, quality_channels=3))
    mean, std = host.pretrained_cfg["mean"], host.pretrained_cfg["std"]
    if channels < 3:
        mean, std = (sum(mean) / 3,) * channels, (sum(std) / 3,) * channels
    else:
        mean, std = (*mean, 0.0), (*std, 1.0)
    images = torch.rand(2, channels, 32, 32)
    host.eval()((images - spread(mean)) / spread(std))
    expected = images[:, :3] if channels > 2 else images.mean(1, keepdim=True).expand(2, 3, 32, 32)
    torch.testing.assert_close(seen[-1], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
def test_quality_is_computed_in_full_precision(dtype, autocast, photographs):
    seen = []

    def function(images):
        seen.append(images.dtype)
        weight = torch.ones(3, 3, 1, 1, dtype=images.dtype)
        seen.append(nn.functional.conv2d(images, weight).dtype)
        return images.flatten(1)

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        tap = tap_of(mean=(0.5,), std=(0.25,), function=function)
        q = q_of(tap, ((photographs(2, 8) - 0.5) / 0.25).to(dtype))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert seen == [wide, wide]
    tolerance = max(torch.finfo(dtype).eps * 2, 1e-6)
    torch.testing.assert_close(q.float(), photographs(2, 8).flatten(1), atol=tolerance, rtol=0)


def test_images_are_clamped_and_not_written_to():
    images = torch.linspace(-3, 3, 192).reshape(1, 3, 8, 8)
    kept = images.clone()
    q = q_of(tap_of(mean=(0.0,), std=(1.0,)), images)
    assert torch.equal(images, kept)
    assert torch.equal(q, images.clamp(0, 1).flatten(1))


def test_images_of_another_range_are_warned_about_once():
    tap = tap_of()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        q_of(tap_of(), torch.rand(1, 3, 8, 8))
        q_of(tap_of(mean=(0.5,), std=(0.5,)), torch.randn(1, 3, 8, 8))
        q_of(tap_of(), torch.rand(0, 3, 8, 8))
    with pytest.warns(UserWarning, match=r"'stem\.conv' lie in \[-2\.00, 2\.00\].*QuACConfig\(mean=…, std=…\)"):
        q_of(tap, torch.linspace(-2, 2, 192).reshape(1, 3, 8, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        q_of(tap, torch.randn(1, 3, 8, 8) * 9)


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 4, 8, 8), (2, 3, 8), (2, 1, 8, 8), (1, 2, 3, 8, 8)])
def test_wrong_rank_or_channels_name_layer_and_shapes(shape):
    shown = str(shape).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=rf"'stem\.conv' expects images of shape \(B, 3, H, W\), got {shown}"):
        tap_of().observe(torch.rand(shape))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_integer_images_say_how_to_convert(dtype):
    with pytest.raises(TypeError, match=r"'stem\.conv' expects floating point images, got torch\..*float\(\) / 255"):
        tap_of().observe(torch.ones(1, 3, 8, 8).to(dtype))


def test_quality_function_of_another_shape_is_refused():
    for function in (lambda x: x.flatten(1)[:, :5], lambda x: x.flatten(1)[:1], lambda x: x.mean()):
        with pytest.raises(ValueError, match=r"'pixels' returned shape .*expected \(2, 192\)"):
            tap_of(function=function).observe(torch.rand(2, 3, 8, 8))


@pytest.mark.parametrize("asked", [False, True])
def test_gradients_flow_through_the_quality_function_only_if_asked(asked):
    images = torch.rand(2, 3, 8, 8, requires_grad=True)
    q = q_of(tap_of(needs_grad=asked), images)
    assert q.requires_grad == asked


# -- every path through a network


def fill(model):
    """Make every activation depend on q."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "fc3" in name:
                parameter.add_(torch.randn_like(parameter) * 0.5)
    return model.eval()


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "test_efficientnet", "test_mambaout"])
def test_memory_format_gives_the_same(name, normalized):
    model = fill(timm.create_model(f"{name}_qacon", num_classes=5, norm="layer", where="all"))
    images = normalized(2, model.pretrained_cfg["input_size"][-1])
    with torch.no_grad():
        expected = model(images)
        torch.testing.assert_close(
            model.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last)),
            expected,
            atol=1e-4,
            rtol=1e-4,
        )


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "test_efficientnet"])
def test_every_entry_sees_the_image(name, normalized):
    model = fill(timm.create_model(f"{name}_qacon", num_classes=5, norm="layer"))
    size = model.pretrained_cfg["input_size"][-1]
    images, others = normalized(2, size), normalized(4, size)[2:]
    with torch.no_grad():
        whole = model(images)
        features = model.forward_features(images)
        torch.testing.assert_close(model.forward_head(features), whole)
        model(others)  # leaves its own q behind
        torch.testing.assert_close(model.forward_features(images), features)
        model(others)
        last, maps = model.forward_intermediates(images)
        torch.testing.assert_close(last, features)
        assert len(maps) >= 3
        model(others)
        again = model.forward_intermediates(images, intermediates_only=True)
        for one, two in zip(maps, again, strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("test_resnet", {}),
        ("test_efficientnet", {}),
        ("test_efficientnet", {"feature_cls": "hook"}),
        ("test_resnet", {"feature_cls": "fx", "out_indices": (1, 2, 3)}),
        ("test_resnet", {"feature_cls": "getter", "out_indices": (1, 2, 3)}),
        ("test_vit", {}),
        ("test_convnext", {"out_indices": (1, 3)}),
        ("test_mambaout", {}),
    ],
)
def test_features_only_sees_the_image_and_preserves(name, kwargs, normalized):
    torch.manual_seed(0)
    base = timm.create_model(name, features_only=True, **kwargs).eval()
    torch.manual_seed(0)
    model = timm.create_model(f"{name}_qacon", features_only=True, norm="layer", **kwargs).eval()
    model.load_state_dict(base.state_dict(), strict=False)
    size = timm.get_pretrained_cfg(name).input_size[-1]
    images, others = normalized(2, size), normalized(4, size)[2:]
    with torch.no_grad():
        for found, wanted in zip(model(images), base(images), strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
        fill(model)
        expected = model(images)
        model(others)
        for found, wanted in zip(model(images), expected, strict=True):
            assert torch.equal(found, wanted)
        with quac.use_q(model, torch.full((2, 36), 2.0)):
            assert not torch.allclose(model(images)[-1], expected[-1])
    assert model.feature_info.channels() == base.feature_info.channels()


def test_images_far_from_their_normalization_are_warned_about_once(photographs):
    """Pictures in 0..255, as a user forgets to scale them; noise and padding stay within what is usual."""
    tap = tap_of(3, *IMAGENET)
    images = photographs(2, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        q_of(tap, torch.randn(2, 3, 8, 8))
        tap_of(3, *IMAGENET).to_rgb((images - torch.tensor(IMAGENET[0]).view(3, 1, 1)) / 0.225)
    tap = tap_of(3, *IMAGENET)
    with pytest.warns(UserWarning, match=r"'stem\.conv' lie in .* far from \[0, 1\].*Divide pictures in 0\.\.255"):
        q_of(tap, images * 255)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        q_of(tap, images * 255)
