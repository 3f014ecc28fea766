"""q is of the images as they came to the data preprocessor: before normalization and padding, RGB."""

import pytest
import torch
from mmengine.model import ImgDataPreprocessor
from mmengine.structures import BaseDataElement
from torch import nn

import quac_plugins as quac
from quac_plugins.mmengine import finish

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


@pytest.mark.parametrize("turned", [True, False])
def test_mmengines_own_preprocessor_and_sizes_of_the_data_samples(turned, pictures):
    model = finish(Segmenter(mean=[120.0], std=[60.0], bgr_to_rgb=turned, pad_size_divisor=64)).eval()
    samples = [BaseDataElement(metainfo={"img_shape": (80, 64)}), BaseDataElement(metainfo={"img_shape": (100, 90)})]
    with torch.no_grad():
        model(**model.data_preprocessor({"inputs": pictures()}))
        tap = model.network[0].quac_tap
        assert torch.allclose(tap.context._local.forward.q, expected(pictures()), rtol=2e-3, atol=2e-3)
        model(**model.data_preprocessor({"inputs": pictures(), "data_samples": samples}))
        cut = [p[:, :h, :w] for p, (h, w) in zip(pictures(), ((80, 64), (100, 90)), strict=True)]
        assert torch.allclose(tap.context._local.forward.q, expected(cut), rtol=2e-3, atol=2e-3)
