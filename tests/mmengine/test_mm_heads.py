"""act_cfg in a head that a trace does not reach, since the whole takes more than images, as detectors do."""

import pytest
import torch
from mmcv.cnn import ConvModule
from mmengine.model import BaseModel, BaseModule
from mmengine.registry import MODELS
from mmpretrain.structures import DataSample

import quac_plugins as quac
from quac_plugins.mmengine import finish

KAIMING = {"type": "Kaiming", "layer": "Conv2d"}


@MODELS.register_module(force=True)
class Head(BaseModule):
    def __init__(self, act_cfg, order=("conv", "norm", "act"), init_cfg=KAIMING):
        super().__init__(init_cfg)
        self.conv = ConvModule(512, 64, 3, padding=1, norm_cfg={"type": "BN"}, act_cfg=act_cfg, order=order)

    def forward(self, x):
        return self.conv(x)


@MODELS.register_module(force=True)
class Detector(BaseModel):
    def __init__(self, backbone, head, data_preprocessor=None):
        super().__init__(data_preprocessor)
        self.backbone, self.bbox_head = MODELS.build(backbone), MODELS.build(head)

    def forward(self, inputs, data_samples=None, mode="tensor"):
        assert all(one.gt_label is not None for one in data_samples)
        return self.bbox_head(self.backbone(inputs)[-1])


@pytest.fixture
def detector(classifier):
    def make(backbone, act, **head):
        torch.manual_seed(0)
        preprocessor = {"type": "ClsDataPreprocessor", **classifier()["data_preprocessor"]}
        head = {"type": "Head", "act_cfg": act, **head}
        return MODELS.build({
            "type": "Detector", "backbone": backbone, "head": head, "data_preprocessor": preprocessor,
        })  # fmt: skip

    return make


def batch(model, pictures):
    samples = [DataSample().set_gt_label(label) for label in range(2)]
    return model.data_preprocessor({"inputs": pictures(), "data_samples": samples})


BACKBONES = [
    {"type": "ResNet", "depth": 18},
    {"type": "QuACResNet", "depth": 18},
    {"type": "DegradationPrior", "backbone": {"type": "ResNet", "depth": 18}, "experts": ["fog", "snow"]},
]


@pytest.mark.parametrize("order", [("conv", "norm", "act"), ("act", "conv", "norm"), ("norm", "act", "conv")])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_head_reads_the_q_of_its_pictures_and_keeps_its_function(backbone, order, detector, pictures):
    model = detector(backbone, {"type": "QACON"}, order=order)
    plain = detector({"type": "ResNet", "depth": 18}, {"type": "ReLU"}, order=order)
    model.init_weights()  # draws every convolution anew, but those of what was put in
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k in plain.state_dict()})
    activation, data = model.bbox_head.conv.activate, batch(model, pictures)
    assert activation.channels == (64 if order[2] == "act" else 512)
    model, plain = model.eval(), plain.eval()
    with torch.no_grad():
        assert torch.equal(model(**data), plain(**data))
    wanted = torch.cat([quac.brisque(one.flip(0)[None].float() / 255) for one in pictures()])
    assert torch.allclose(activation.context._local.forward.q, wanted, rtol=2e-3, atol=2e-3)
    before, taps = activation.context, [n for n, _ in model.named_modules() if n.endswith("quac_tap")]
    finish(model)  # nothing is left to do
    assert model.bbox_head.conv.activate is activation
    assert activation.context is before
    assert [n for n, _ in model.named_modules() if n.endswith("quac_tap")] == taps


def test_a_checkpoint_by_init_cfg_brings_what_the_head_has_learned(detector, moved, tmp_path):
    host = {"type": "ResNet", "depth": 18}
    trained = moved(detector(host, {"type": "QACON"}))
    torch.save({"state_dict": trained.state_dict()}, tmp_path / "trained.pth")
    init = {"type": "Pretrained", "checkpoint": str(tmp_path / "trained.pth"), "prefix": "bbox_head."}
    model = detector(host, {"type": "QACON"}, init_cfg=init)
    model.init_weights()
    wanted, found = trained.bbox_head.state_dict(), model.bbox_head.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_another_quality_function_than_the_backbones_is_refused(detector, classifier):
    act = {"type": "QACON", "quality": "brisque_tone"}
    message = r"{}.* 'brisque_tone', but 'backbone\.conv1', .* for quality 'brisque': one model takes one"
    with pytest.raises(ValueError, match=message.format(r"'bbox_head\.conv\.activate'")):
        detector({"type": "QuACResNet", "depth": 18}, act)
    cfg = classifier(backbone={"type": "QuACResNet", "depth": 18})
    cfg["head"] = {
        "type": "StackedLinearClsHead", "num_classes": 2, "in_channels": 512, "mid_channels": [64], "act_cfg": act,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message.format(r"'head\.layers\.0\.act'")):
        MODELS.build(cfg)
    cfg["head"]["act_cfg"] = {"type": "QACON"}
    given = {"mean": [0.5] * 3, "std": [0.5] * 3, "channel_order": "bgr"}
    cfg["backbone"] = {"type": "QuACResNet", "depth": 18, "quac": given}
    model = MODELS.build(cfg)  # of the same, the one tap serves both
    assert model.head.layers[0].act.context is model.backbone.conv1.quac_tap.context
    assert model.backbone.conv1.quac_tap.mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("order", ["rgb", None])
def test_an_order_of_channels_that_act_cfg_gives(order, build):
    act = {"type": "QACON", **({"channel_order": order} if order else {})}
    model = build(
        backbone={"type": "MobileNetV2", "act_cfg": act},
        head={"in_channels": 1280},
        data_preprocessor={"to_rgb": False},
    )
    assert model.backbone.conv1.conv.quac_tap.channel_order == (order or "bgr")
