"""Facts of a host: what each framework says of its models, in one form, and core that knows none of them."""

import re
from pathlib import Path

import timm
import torch
import torchvision
from torch import nn

import quac_plugins
from quac_plugins.core.host.facts import HostFacts, facts_of


def test_what_timm_says():
    cfg = {"mean": (0.4, 0.4, 0.4), "std": (0.2, 0.2, 0.2)}
    facts = facts_of(timm.create_model("test_resnet", num_classes=0, pretrained_cfg_overlay=cfg))
    assert facts.normalization == (cfg["mean"], cfg["std"])
    assert (facts.classifiers, facts.gives_features, facts.in_chans) == (("fc",), True, 3)
    assert facts.stage_ends == ("act1", "layer1", "layer2", "layer3", "layer4")
    vit = facts_of(timm.create_model("test_vit", img_size=64, in_chans=1))
    assert (vit.input_size, vit.prefix_tokens, vit.gives_features) == ((3, 64, 64), 1, False)
    features = timm.create_model("test_resnet", features_only=True)
    assert set(facts_of(features).stage_ends) <= {name for name, _ in features.named_modules()}


def test_what_torchvision_says_of_the_images_of_a_backbone():
    detector = torchvision.models.detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None)
    assert facts_of(detector) == HostFacts(inner_normalization=((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)))
    assert facts_of(nn.ReLU()) == HostFacts()


def test_what_detectron2_and_mmengine_say():
    from mmengine import model as base

    import quac_plugins.detectron2
    import quac_plugins.mmengine  # noqa: F401

    detector = nn.Module()
    detector.register_buffer("pixel_mean", torch.tensor([[[102.0]]]))
    detector.register_buffer("pixel_std", torch.tensor([[[51.0]]]))
    assert facts_of(detector).inner_normalization == ((0.4,), (0.2,))
    backbone = base.BaseModule()
    backbone.img_size, backbone.in_channels = (32, 48), 1
    assert facts_of(backbone).input_size == (1, 32, 48)
    assert facts_of(backbone).in_chans == 1


def test_core_reads_no_frameworks_attributes():
    names = "pretrained_cfg|default_cfg|num_prefix_tokens|feature_info|image_mean|pixel_mean|img_size|num_classes"
    asked = re.compile(rf'getattr\(\w+, "({names})')
    core = Path(quac_plugins.__file__).parent / "core"
    assert not [path for path in core.rglob("*.py") if asked.search(path.read_text())]
