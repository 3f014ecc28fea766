"""Detectors, which are given a list of images: what is said at injection, and q of each image without padding."""

import time

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

from quac_plugins import PriorConfig, QuACConfig, brisque, inject, injection_of
from quac_plugins.core.inject import labels
from quac_plugins.core.inject.trace import trace

SSD, FASTER = (
    getattr(torchvision.models.detection, name)
    for name in ("ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn")
)


class OfDicts(nn.Module):
    """As detectron2's: given dicts, which a tensor or a list is not."""

    def __init__(self):
        super().__init__()
        self.net = nn.ModuleDict({"0": nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 8, 3))})

    def forward(self, inputs):
        return self.net["0"](torch.stack([one["image"] for one in inputs]))


class Around(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, images):
        return self.inner(images)


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    return SSD(weights=None, weights_backbone=None).eval()


@pytest.mark.parametrize(
    ("make", "part", "size"),
    [
        (lambda ssd: ssd, "model.backbone", "3, 320, 320"),
        (lambda ssd: Around(ssd), "model.inner.backbone", "3, 320, 320"),
        (lambda ssd: FASTER(weights=None, weights_backbone=None), "model.backbone", "3, 320, 320"),
        (lambda ssd: OfDicts(), r"model.get_submodule\('net.0'\)", "3, 224, 224"),
    ],
)
@pytest.mark.parametrize("config", [QuACConfig(), PriorConfig()])
def test_the_part_to_inject_is_named_in_time(make, part, size, config, detector):
    model = make(detector)
    names, start = list(model.state_dict()), time.perf_counter()
    with pytest.raises(RuntimeError, match=rf"inject\({part}, config, example=torch.empty\(1, {size}\)"):
        inject(model, config)
    assert time.perf_counter() - start < 10
    assert list(model.state_dict()) == names
    assert injection_of(model) is None
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_normalization_is_named(detector):
    with pytest.raises(RuntimeError, match=r"mean=\[0.5, 0.5, 0.5\], std=\[0.5, 0.5, 0.5\]"):
        inject(detector)


def test_quality_is_of_each_image_without_padding(photographs):
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.ReLU())
    backbone.out_channels = 8
    anchors, pool = AnchorGenerator(((32,),), ((1.0,),)), MultiScaleRoIAlign(["0"], 2, 2)
    model = FasterRCNN(backbone, 2, 64, 128, rpn_anchor_generator=anchors, box_roi_pool=pool).eval()
    mean, std = model.transform.image_mean, model.transform.image_std
    inject(model.backbone, QuACConfig(quality="brisque", mean=mean, std=std), example=torch.empty(1, 3, 64, 64))
    layer = model.backbone.get_submodule(injection_of(model.backbone).tap)
    seen = []
    begin = layer.quac_tap.context.begin
    layer.quac_tap.context.begin = lambda q, images: seen.append(q) or begin(q, images)
    one, other = photographs(2, 96)
    pictures = [one[:, :70], other[:, :, :80]]  # of other shapes, so that each is padded
    with torch.no_grad():
        for batch in (pictures, pictures[:1], pictures[1:]):
            model(batch)
        resized = [model.transform.resize(picture, None)[0] for picture in pictures]
    together, *alone = seen
    assert {tuple(picture.shape) for picture in resized} != {tuple(pictures[0].shape)}
    torch.testing.assert_close(together, torch.cat(alone))
    for q, picture in zip(alone, resized, strict=True):
        torch.testing.assert_close(q, brisque(picture[None]), rtol=1e-3, atol=1e-3)


def test_a_long_pass_says_where_it_is(monkeypatch, caplog):
    monkeypatch.setattr(labels, "_LONG", 0)
    trace(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()))
    assert "looking at what the host's modules return: 0 s so far, in '0'" in caplog.text
