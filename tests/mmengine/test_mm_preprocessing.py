"""q is of the images as they came to the data preprocessor: before normalization and padding, RGB."""

import pytest
import torch
from mmengine.model import BaseDataPreprocessor, ImgDataPreprocessor
from mmengine.structures import BaseDataElement
from mmpretrain.registry import MODELS
from torch import nn

import quac_plugins as quac
from quac_plugins.mmengine import finish
from quac_plugins.mmengine.preprocessing import normalization_of

BACKBONE = {"type": "QuACResNet", "depth": 18, "quac": {"where": "spatial", "quality": "brisque", "norm": "layer"}}


def q_of(model):
    return model.backbone.conv1.quac_tap.context._local.forward.q


def expected(pictures, bgr=True):
    return torch.cat([quac.brisque((p.flip(0) if bgr else p)[None].float() / 255) for p in pictures])


@pytest.mark.parametrize("mode", ["tensor", "loss", "predict"])
def test_each_picture_of_a_padded_batch(mode, build, pictures):
    from mmpretrain.structures import DataSample

    model = build(backbone=BACKBONE, data_preprocessor={"pad_size_divisor": 32}).eval()
    samples = [DataSample().set_gt_label(i) for i in range(2)]
    with torch.no_grad():
        batch = model.data_preprocessor({"inputs": pictures(), "data_samples": samples})
        assert batch["inputs"].shape == (2, 3, 128, 128)
        model(**batch, mode=mode)
    assert torch.allclose(q_of(model), expected(pictures()), rtol=2e-3, atol=2e-3)


def test_pictures_of_one_size_in_a_tensor(build, pictures):
    model = build(backbone=BACKBONE).eval()
    alike = pictures(((96, 96), (96, 96)))
    with torch.no_grad():
        model(model.data_preprocessor({"inputs": torch.stack(alike)})["inputs"])
    assert torch.allclose(q_of(model), expected(alike), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("preprocessor", "bgr"),
    [
        ({"to_rgb": False}, True),
        ({"mean": None, "std": None, "to_rgb": True}, True),
        ({"mean": None, "std": None, "to_rgb": False}, True),
        ({"mean": [127.0], "std": [64.0], "to_rgb": False}, True),
    ],
)
def test_other_normalizations(preprocessor, bgr, build, pictures):
    model = build(backbone=BACKBONE, data_preprocessor=preprocessor).eval()
    alike = pictures(((96, 96), (96, 96)))
    with torch.no_grad():
        model(model.data_preprocessor({"inputs": alike})["inputs"])
    assert torch.allclose(q_of(model), expected(alike, bgr), rtol=2e-3, atol=2e-3)


def test_a_normalization_that_the_config_gives_is_kept(build):
    given = {**BACKBONE, "quac": {**BACKBONE["quac"], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}}
    model = build(backbone=given)
    assert model.backbone.conv1.quac_tap.mean == (0.5, 0.5, 0.5)


class Segmenter(nn.Module):
    """What mmengine alone offers: a preprocessor of its own and a network."""

    def __init__(self, **preprocessor):
        super().__init__()
        self.data_preprocessor = ImgDataPreprocessor(**preprocessor)
        self.network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))
        quac.inject(self.network, quac.QuACConfig(norm="layer"))

    def forward(self, inputs, data_samples=None):
        return self.network(inputs)


class Halving(ImgDataPreprocessor):
    """Resizes batches, as detectors do in training, and says so in the data samples."""

    def forward(self, data, training=False):
        found = super().forward(data, training)
        found["inputs"] = nn.functional.interpolate(found["inputs"], scale_factor=0.5)
        for one, image in zip(found["data_samples"], data["inputs"], strict=True):
            one.set_metainfo({"img_shape": (image.shape[-2] // 2, image.shape[-1] // 2)})
        return found


@pytest.mark.parametrize("turned", [True, False])
def test_mmengines_own_preprocessor_and_one_that_resizes(turned, pictures):
    options = {"mean": [120.0], "std": [60.0], "bgr_to_rgb": turned, "pad_size_divisor": 64}
    model = finish(Segmenter(**options)).eval()
    stale = [BaseDataElement(metainfo={"img_shape": (32, 32)}) for _ in range(2)]  # of before the pipeline's resizing
    tap = model.network[0].quac_tap
    with torch.no_grad():
        for data in ({"inputs": pictures()}, {"inputs": pictures(), "data_samples": stale}):
            model(**model.data_preprocessor(data=data))
            assert torch.allclose(tap.context._local.forward.q, expected(pictures()), rtol=2e-3, atol=2e-3)
        model.data_preprocessor = Halving(**options)
        finish(model)
        batch = model.data_preprocessor({"inputs": pictures(), "data_samples": stale})
        model(**batch)
        rgb = tap.to_rgb(batch["inputs"])
        cut = [rgb[i : i + 1, :, : p.shape[-2] // 2, : p.shape[-1] // 2] for i, p in enumerate(pictures())]
        assert torch.allclose(tap.context._local.forward.q, torch.cat([quac.brisque(one) for one in cut]), atol=1e-4)


def test_a_preprocessor_that_only_moves_data_says_nothing():
    class Plain(Segmenter):
        def __init__(self):
            super().__init__()
            self.data_preprocessor = BaseDataPreprocessor()

    tap = finish(Plain()).network[0].quac_tap
    assert tap.mean is None
    with pytest.warns(UserWarning, match="no normalization was"):
        tap.observe(4 * torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize(
    ("preprocessor", "order"),
    [
        ({"type": "ImgDataPreprocessor", "bgr_to_rgb": True}, "rgb"),
        ({"type": "ImgDataPreprocessor", "rgb_to_bgr": True}, "bgr"),
        ({"type": "ImgDataPreprocessor"}, "bgr"),
    ],
)
def test_the_order_of_channels(preprocessor, order):
    assert normalization_of(MODELS.build(preprocessor))["channel_order"] == order
    built = MODELS.build(preprocessor)
    del built._channel_conversion
    built.channel_conversion = order == "rgb"  # as mmseg names it
    assert normalization_of(built)["channel_order"] == order


def test_an_order_that_the_config_gives_goes_before(build):
    given = {**BACKBONE, "quac": {**BACKBONE["quac"], "channel_order": "rgb"}, "prior": {"site": "auto"}}
    model = build(backbone=given, data_preprocessor={"to_rgb": False})
    assert model.backbone.conv1.quac_tap.channel_order == "rgb"
    assert quac.injection_of(model.backbone).config.channel_order == "rgb"
    assert quac.injection_of(model.backbone).prior.config.channel_order == "rgb"


@pytest.mark.parametrize("backbone", [BACKBONE, {"type": "MobileNetV2", "act_cfg": {"type": "QACON"}}])
def test_a_wrapper_for_test_time_augmentation_built_from_a_config(backbone, classifier, pictures):
    channels = 1280 if backbone["type"] == "MobileNetV2" else 512
    cfg = classifier(backbone=backbone, head={"in_channels": channels})
    model = MODELS.build({"type": "AverageClsScoreTTA", "module": cfg})
    taps = [m for n, m in model.named_modules() if n.endswith("quac_tap")]
    assert len(taps) == 1
    assert taps[0].mean == pytest.approx((0.485, 0.456, 0.406))
    with torch.no_grad():
        batch = model.module.data_preprocessor({"inputs": pictures()})
        model.module.eval()(**batch)
    assert torch.allclose(taps[0].context._local.forward.q, expected(pictures()), rtol=2e-3, atol=2e-3)
