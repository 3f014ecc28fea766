"""act_cfg: channels come from the layer before, and are there before an optimizer asks."""

import pytest
import torch
from mmcv.cnn import ConvModule
from mmcv.cnn.bricks.transformer import FFN
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from mmpretrain.models.backbones.resnet import Bottleneck

import quac_plugins as quac
from quac_plugins.mmengine import PLANNED, finish

ACTIVATIONS = ["QACON", "QSwish", "QPReLU", "MetaACON", "AconC"]


def put_in(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, quac.ChannelActivation)}


def test_every_activation_of_the_project_can_be_named():
    assert set(ACTIVATIONS) <= set(PLANNED)
    assert {cls.__name__ for cls in quac.ACTIVATIONS.values()} == set(PLANNED)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("norm", [None, {"type": "BN"}, {"type": "GN", "num_groups": 4}])
def test_inside_a_conv_module(name, norm, photographs):
    torch.manual_seed(0)
    module = ConvModule(3, 16, 3, norm_cfg=norm, act_cfg={"type": name, "norm": "layer"}).eval()
    plain = ConvModule(3, 16, 3, norm_cfg=norm, act_cfg={"type": "ReLU"}).eval()
    plain.load_state_dict(module.state_dict(), strict=False)
    assert type(module.activate).__name__ == name
    assert module.activate.channels == 16
    images = photographs(2, 32)
    if module.activate.context is None:
        assert torch.equal(module(images), plain(images))
        return
    with pytest.raises(quac.QualityError, match="use_q"):
        module(images)
    with quac.use_q(module, quac.brisque(images)):
        assert torch.equal(module(images), plain(images))


def test_inside_a_feed_forward_network():
    module = FFN(embed_dims=12, feedforward_channels=20, act_cfg={"type": "AconC"})
    assert [m.channels for m in put_in(module).values()] == [20]


@pytest.mark.parametrize(
    ("backbone", "channels"),
    [
        ({"type": "MobileNetV2"}, 1280),
        ({"type": "EfficientNet", "arch": "b0"}, 1280),
        ({"type": "VGG", "depth": 11, "norm_cfg": {"type": "BN"}}, 512),
        ({"type": "ConvNeXt", "arch": "atto", "gap_before_final_norm": False}, 320),
    ],
)
def test_in_a_whole_network(backbone, channels, build, pictures):
    head = {"in_channels": channels}
    plain_act = {"type": "GELU"} if backbone["type"] == "ConvNeXt" else {"type": "ReLU"}
    act = {"type": "QACON", "norm": "layer", "host": plain_act}
    ours = build(backbone={**backbone, "act_cfg": act}, head=head).eval()
    plain = build(backbone={**backbone, "act_cfg": plain_act}, head=head).eval()
    record = quac.injection_of(ours) or quac.injection_of(ours.backbone)
    assert record.sites
    assert not any(type(m).__name__ in PLANNED and not isinstance(m, quac.ChannelActivation) for m in ours.modules())
    missing = ours.load_state_dict(plain.state_dict(), strict=False)
    assert not missing.unexpected_keys
    batch = ours.data_preprocessor({"inputs": pictures(((96, 96), (96, 96)))})["inputs"]
    with torch.no_grad():
        expected, found = plain(batch), ours(batch)
    expected, found = (x[-1] if isinstance(x, tuple) else x for x in (expected, found))
    assert torch.equal(found, expected)
    optimizer = build_optim_wrapper(ours, {"optimizer": {"type": "SGD", "lr": 0.1}}).optimizer
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert all(id(p) in known for module in put_in(ours).values() for p in module.parameters())


def test_a_part_built_from_a_config_keeps_its_channels():
    module = MODELS.build({
        "type": "ConvModule", "in_channels": 8, "out_channels": 24, "kernel_size": 1, "act_cfg": {"type": "AconC"},
    })  # fmt: skip
    assert sorted({m.channels for m in put_in(module).values()}) == [24]
    assert module(torch.rand(1, 8, 9, 9)).shape == (1, 24, 9, 9)


def test_a_network_put_together_by_hand_is_finished_by_hand(photographs):
    act = {"type": "QACON", "norm": "layer"}
    downsample = torch.nn.Conv2d(3, 32, 1)
    block = Bottleneck(3, 32, act_cfg=act, downsample=downsample)  # its one activation is called with two widths
    with pytest.raises(RuntimeError, match=r"act_cfg=dict\(type='QACON'\).*finish\(model\)"):
        block(photographs(1, 64))
    model = torch.nn.Sequential(block)
    assert finish(model) is model
    assert model(photographs(1, 64)).shape == (1, 32, 64, 64)
    assert sorted(m.channels for m in put_in(model).values()) == [8, 32]
    sites = list(quac.injection_of(model).sites)
    finish(model)  # nothing is left to do
    assert quac.injection_of(model).sites == sites


def test_two_kinds_in_one_model_are_refused(build):
    block = {
        "type": "ConvModule",
        "in_channels": 512,
        "out_channels": 512,
        "kernel_size": 1,
        "act_cfg": {"type": "QSwish"},
    }
    with pytest.raises(ValueError, match="one model takes one kind"):
        build(backbone={"type": "VGG", "depth": 11, "act_cfg": {"type": "QACON"}}, neck=block)


def test_an_activation_that_is_never_called_is_left_out(build):
    """mmpretrain's DenseNet keeps one that it only hands on."""
    model = build(
        backbone={"type": "DenseNet", "arch": "121", "act_cfg": {"type": "QACON"}}, head={"in_channels": 1024}
    )
    assert len((quac.injection_of(model) or quac.injection_of(model.backbone)).sites) > 60


def test_activations_are_copied_and_pickled(tmp_path):
    module = ConvModule(3, 8, 3, act_cfg={"type": "QACON"})
    torch.save(module, tmp_path / "module.pt")
    again = torch.load(tmp_path / "module.pt", weights_only=False)
    assert again.activate.channels == 8
