"""QuACBackbone, QuACResNet, DegradationPrior: the host itself at the start, under its own names."""

import re

import pytest
import torch
from mmengine.model import BaseModule
from mmengine.registry import DefaultScope
from mmpretrain.registry import MODELS

import quac_plugins as quac

BACKBONES = [
    ({"type": "QuACResNet", "depth": 18, "quac": {"where": "spatial"}}, {"type": "ResNet", "depth": 18}, 512),
    ({"type": "QuACResNet", "depth": 18}, {"type": "ResNet", "depth": 18}, 512),
    ({"type": "DegradationPrior", "site": "auto"}, {"type": "ResNet", "depth": 18}, 512),
    (
        {"type": "DegradationPrior", "fdm": "margin", "experts": ["fog", "contrast"]},
        {"type": "ResNet", "depth": 18},
        512,
    ),
    ({"type": "QuACBackbone", "quac": {"where": "all"}}, {"type": "ResNetV1d", "depth": 18}, 512),
    ({"type": "QuACBackbone", "quac": {}, "prior": {"site": "auto"}}, {"type": "MobileNetV3"}, 576),
    (
        {"type": "QuACBackbone", "quac": {"where": "all"}, "prior": {"site": "auto"}},
        {"type": "VisionTransformer", "arch": "deit-tiny", "img_size": 96, "out_type": "featmap"},
        192,
    ),
    ({"type": "QuACBackbone", "quac": {"where": "auto"}}, {"type": "SwinTransformer", "arch": "tiny"}, 768),
]


@pytest.mark.parametrize(("ours", "host", "channels"), BACKBONES)
def test_a_preserved_backbone_is_its_host(ours, host, channels, build, pictures):
    if "backbone" not in ours and ours["type"] != "QuACResNet":
        ours = {**ours, "backbone": host}
    changes = {"head": {"in_channels": channels}}
    model, plain = build(backbone=ours, **changes).eval(), build(backbone=host, **changes).eval()
    loaded = model.load_state_dict(plain.state_dict(), strict=False)
    assert not loaded.unexpected_keys
    assert type(model.backbone) is type(plain.backbone)
    side = 224 if "Swin" in host["type"] else 96
    batch = model.data_preprocessor({"inputs": pictures(((side, side), (side, side)))})["inputs"]
    with torch.no_grad():
        found, expected = model.extract_feat(batch), plain.extract_feat(batch)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert quac.injection_of(model.backbone) is not None


@pytest.mark.parametrize("options", [{"quac": {"where": "all"}}, {"prior": {"site": "stages"}}])
def test_initialization_of_the_weights_leaves_what_was_put_in(options, build, pictures):
    """MMEngine draws every convolution anew when training begins."""
    model = build(backbone={"type": "QuACResNet", "depth": 18, **options})
    before = {name: tensor.clone() for name, tensor in quac.adapter_state(model.backbone).items()}
    weight = model.backbone.conv1.weight.detach().clone()
    torch.manual_seed(1)
    model.init_weights()
    assert not torch.equal(model.backbone.conv1.weight, weight)
    assert all(torch.equal(quac.adapter_state(model.backbone)[name], tensor) for name, tensor in before.items())
    plain = build()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k in plain.state_dict()})
    batch = model.data_preprocessor({"inputs": pictures(((96, 96), (96, 96)))})["inputs"]
    assert torch.equal(model.train().extract_feat(batch)[0], plain.train().extract_feat(batch)[0])


def test_without_a_scope_the_resnet_is_that_of_what_is_installed():
    with DefaultScope.overwrite_default_scope(None):
        backbone = MODELS.build({"type": "QuACResNet", "depth": 18})
    assert type(backbone).__module__.startswith("mmpretrain.")


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        ({"type": "QuACResNet", "quac": {"wher": "all"}}, r"model\.backbone\.quac\.wher: .*did you mean 'where'"),
        ({"type": "QuACResNet", "quac": {"norm": 3}}, r"model\.backbone\.quac\.norm: unknown norm 3"),
        ({"type": "QuACResNet", "quac": {"quality": "brisk"}}, r"model\.backbone\.quac\.quality: .*'brisque'"),
        ({"type": "QuACResNet", "quac": "all"}, r"model\.backbone\.quac: must be a dict"),
        ({"type": "QuACResNet", "prior": {"top_k": "x"}}, r"model\.backbone\.prior\.top_k: "),
        ({"type": "DegradationPrior", "backbone": {"type": "ResNet"}, "fdmm": 1}, r"model\.backbone\.fdmm: "),
        ({"type": "DegradationPrior"}, r"model\.backbone\.backbone: must be the config of a backbone"),
        ({"type": "QuACBackbone", "backbone": {"type": "ResNet"}, "where": 1}, r"model\.backbone\.where: .*takes"),
        ({"type": "MobileNetV2", "act_cfg": {"type": "QACON", "qality": 1}}, r"model\.backbone\.act_cfg.*qality"),
        ({"type": "MobileNetV2", "act_cfg": {"type": "QSwish", "init": 1}}, r"model\.backbone\.act_cfg\.init: "),
        ({"type": "MobileNetV2", "act_cfg": {"type": "QACON", "host": "GELU"}}, r"act_cfg\.host: must be a dict with"),
        ({"type": "MobileNetV2", "act_cfg": {"type": "QACON", "host": {"type": "QACON"}}}, r"act_cfg\.host: must be"),
        ({"type": "MobileNetV2", "act_cfg": {"type": "QACON", "host": {"type": "GELLU"}}}, r"act_cfg\.host: GELLU is"),
        ({"type": "QuACResNet", "input_size": (32, 32)}, r"model\.backbone\.input_size: must be \(C, H, W\)"),
        ({"type": "QuACResNet", "input_size": (3, 32, 0)}, r"model\.backbone\.input_size: W must be a whole number"),
    ],
)
def test_an_error_begins_with_its_path_and_nothing_is_built(backbone, message, classifier, monkeypatch):
    monkeypatch.setattr("mmpretrain.models.ResNet.__init__", lambda *_, **__: pytest.fail("built"))
    with pytest.raises(ValueError, match=message):
        MODELS.build(classifier(backbone=backbone))


@pytest.mark.parametrize(
    ("backbone", "path"),
    [
        ({"type": "QuACResNet", "depth": 18, "quac": {"where": "layer9.*"}}, "quac.where"),
        ({"type": "QuACResNet", "depth": 18, "quac": {}, "prior": {"site": "layer9.*"}}, "prior.site"),
        ({"type": "DegradationPrior", "backbone": {"type": "ResNet", "depth": 18}, "site": "layer9.*"}, "site"),
    ],
)
def test_a_site_that_is_not_there_is_named_with_its_path_and_the_host_is_built_once(
    backbone, path, classifier, monkeypatch
):
    built, original = [], BaseModule.__init__

    def note(self, *args, **kwargs):
        built.append((type(self).__name__, torch.empty(0).device.type))
        original(self, *args, **kwargs)

    monkeypatch.setattr(BaseModule, "__init__", note)
    with pytest.raises(ValueError, match=rf"^model\.backbone\.{re.escape(path)}: .*layer9"):
        MODELS.build(classifier(backbone=backbone))
    assert [one for one in built if one[0] == "ResNet"] == [("ResNet", "cpu")]


def test_of_two_backbones_with_equal_options_the_one_is_named():
    @MODELS.register_module(force=True)
    class Two(BaseModule):
        def __init__(self, a, b):
            super().__init__()
            self.a, self.b = MODELS.build(a), MODELS.build(b)

    quac = {"where": "conv2.activate"}
    a = {"type": "QuACBackbone", "backbone": {"type": "MobileNetV2"}, "quac": dict(quac)}
    b = {"type": "QuACResNet", "depth": 18, "quac": dict(quac)}
    with pytest.raises(ValueError, match=r"^model\.b\.quac\.where: "):
        MODELS.build({"type": "Two", "a": a, "b": b})


LENET = {"type": "LeNet5", "num_classes": 10}


@pytest.mark.parametrize(
    "ours",
    [
        {"type": "QuACBackbone", "quac": {"where": "auto"}},
        {"type": "DegradationPrior", "site": "auto"},
    ],
)
def test_a_backbone_of_one_size_that_it_does_not_say(ours):
    with pytest.raises(
        ValueError, match=r"^model\.input_size: say the size .*LeNet5 does not run .*\(1, 1, 224, 224\)"
    ):
        MODELS.build({**ours, "backbone": LENET})
    backbone = MODELS.build({**ours, "backbone": LENET, "input_size": (1, 32, 32)})
    assert backbone(torch.rand(2, 1, 32, 32))[0].shape == (2, 10)
    key = "quac.where" if "quac" in ours else "site"
    wrong = {**ours, "quac": {"where": "zzz"}} if "quac" in ours else {**ours, "site": "zzz"}
    with pytest.raises(ValueError, match=rf"^model\.{key}: .*'zzz'"):
        MODELS.build({**wrong, "backbone": LENET, "input_size": (1, 32, 32)})


@pytest.mark.parametrize("name", ["BRISQUE", "BRISQUETone"])
def test_quality_functions_are_models(name, photographs):
    quality = MODELS.build({"type": name})
    function = quac.resolve_quality({"BRISQUE": "brisque", "BRISQUETone": "brisque_tone"}[name])
    assert torch.equal(quality(photographs(2, 64)), function(photographs(2, 64)))
    assert quality.out_channels == function.channels
    with pytest.raises(ValueError, match="brisk"):
        MODELS.build({"type": "QuACQuality", "name": "brisk"})


def test_a_checkpoint_by_init_cfg_brings_what_was_trained(build, moved, tmp_path):
    trained = moved(build(backbone={"type": "QuACResNet", "depth": 18}))
    torch.save({"state_dict": trained.state_dict()}, tmp_path / "trained.pth")
    init = {"type": "Pretrained", "checkpoint": str(tmp_path / "trained.pth"), "prefix": "backbone."}
    model = build(backbone={"type": "QuACResNet", "depth": 18, "init_cfg": init})
    model.init_weights()
    wanted, found = trained.backbone.state_dict(), model.backbone.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_stages_that_the_host_freezes_are_frozen_before_an_optimizer_asks(build):
    model = build(backbone={"type": "QuACResNet", "depth": 18, "frozen_stages": 1, "quac": {"where": "all"}})
    inside = {n: p.requires_grad for n, p in model.backbone.named_parameters() if ".fc3." in n}
    assert {grad for name, grad in inside.items() if name.startswith("layer1.")} == {False}
    assert {grad for name, grad in inside.items() if name.startswith("layer2.")} == {True}
