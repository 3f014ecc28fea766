"""mmpretrain as MMEngine's users have it, and classifiers over real photographs."""

import copy

import numpy as np
import pytest
import torch
from mmengine.registry import DefaultScope
from mmpretrain.registry import MODELS
from PIL import Image
from skimage import data

import quac_plugins.mmengine  # noqa: F401

PREPROCESSOR = {"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375], "to_rgb": True}
CLASSIFIER = {
    "type": "ImageClassifier",
    "backbone": {"type": "ResNet", "depth": 18},
    "neck": {"type": "GlobalAveragePooling"},
    "head": {"type": "LinearClsHead", "num_classes": 2, "in_channels": 512, "loss": {"type": "CrossEntropyLoss"}},
    "data_preprocessor": PREPROCESSOR,
}


@pytest.fixture(autouse=True)
def _scope():
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        yield


@pytest.fixture(scope="session")
def classifier():
    """classifier(backbone={"type": "QuACResNet", "depth": 18}) is a config."""

    def make(**changes):
        cfg = copy.deepcopy(CLASSIFIER)
        for key, value in changes.items():
            cfg[key] = {**cfg[key], **value} if key != "backbone" else value
        return cfg

    return make


@pytest.fixture
def build(classifier):
    def make(seed=0, **changes):
        torch.manual_seed(seed)
        return MODELS.build(classifier(**changes))

    return make


@pytest.fixture(scope="session")
def pictures():
    """Photographs as MMCV reads them: BGR, uint8, (3, H, W)."""

    def make(sizes=((96, 128), (120, 100))):
        names = ("astronaut", "coffee", "chelsea", "rocket")
        return [
            torch.from_numpy(np.ascontiguousarray(getattr(data, names[i % 4])()[:h, :w, ::-1])).permute(2, 0, 1)
            for i, (h, w) in enumerate(sizes)
        ]

    return make


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Twelve photographs in folders of two classes."""
    root = tmp_path_factory.mktemp("photographs")
    for kind, names in (("animal", ("chelsea", "astronaut")), ("thing", ("coffee", "rocket"))):
        (root / kind).mkdir()
        for name in names:
            for i in range(3):
                crop = np.ascontiguousarray(getattr(data, name)()[i * 40 : i * 40 + 160, i * 30 : i * 30 + 160, :3])
                Image.fromarray(crop).resize((64, 64)).save(root / kind / f"{name}{i}.png")
    return root
