"""A name of a family of quality functions is one function, at however many places of a config it is."""

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from test_mm_heads import batch

from quac_plugins.core.quality import contrique, pyiqa
from quac_plugins.core.quality.tap import QualityTap


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("contrique") / "weights.tar"
    torch.save({f"encoder.{n}": tensor for n, tensor in contrique.contrique_encoder().state_dict().items()}, path)
    return str(path)


@pytest.fixture
def measured(monkeypatch):
    """(H, W) of the pictures that a function of a family is called with, and the checkpoints that are read."""
    sizes = []

    def noted(own):
        return lambda self, images: sizes.append(tuple(images.shape[2:])) or own(self, images)

    for cls in (contrique.Contrique, pyiqa.PyIQA):
        monkeypatch.setattr(cls, "__call__", noted(cls.__call__))
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda path, **options: sizes.append(str(path)) or load(path, **options))
    return sizes


@pytest.fixture
def model_of(classifier):
    """A model whose backbone's activations, prior and head each name a quality function, by way of a config's text."""

    def make(quac, prior, head):
        model = classifier(backbone={
            "type": "QuACBackbone", "backbone": {"type": "ResNet", "depth": 18},
            "quac": {"quality": quac, "where": "layer4.*"}, "prior": {"quality": prior, "experts": ["fog"]},
        })  # fmt: skip
        model["head"] = {
            "type": "StackedLinearClsHead", "num_classes": 2, "in_channels": 512, "mid_channels": [64],
            "act_cfg": {"type": "QACON", "quality": head},
        }  # fmt: skip
        text = Config({"model": model}).pretty_text
        return MODELS.build(Config.fromstring(text, ".py").model).eval()

    return make


@pytest.mark.parametrize("name", ["pyiqa:entropy", "contrique:PATH"])
def test_it_is_computed_once_for_all_that_read_it(name, checkpoint, measured, model_of, pictures):
    name = name.replace("PATH", checkpoint)
    model = model_of(name, name, name)
    (tap,) = (module for module in model.modules() if isinstance(module, QualityTap))
    readers = [module for module in model.modules() if getattr(module, "context", None) is tap.context]
    assert len(readers) == 8  # the tap, a gate at each of four places, two activations of the stage and the head's
    assert measured == ([checkpoint] if name.startswith("contrique") else [])  # read once, and called by nobody yet
    measured.clear()
    data = batch(model, pictures)
    with torch.no_grad():
        model(**data)
    assert measured == [(96, 128), (120, 100)]  # each picture without its padding, once


def test_another_name_of_the_family_is_another_function(checkpoint, model_of, monkeypatch):
    monkeypatch.setenv("QUAC_CONTRIQUE", checkpoint)
    name = "pyiqa:entropy"
    model = model_of(name, f"contrique:{checkpoint}", name)
    assert sum(isinstance(module, QualityTap) for module in model.modules()) == 2
    with pytest.raises(ValueError, match=r"'head\.layers\.0\.act' .* 'contrique', but .* for quality 'pyiqa:entropy'"):
        model_of(name, name, "contrique")
