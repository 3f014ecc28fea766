"""Blocks with activation modules: detectron2's numbers and names."""

import pytest
import torch
from detectron2.export.torchscript_patch import patch_nonscriptable_classes
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock, ResNet

from quac_plugins.detectron2 import ActBasicBlock, ActBasicStem, ActBottleneckBlock, with_activations

PAIRS = [
    (BasicStem, ActBasicStem, {}),
    (BasicBlock, ActBasicBlock, {"in_channels": 3, "out_channels": 8, "stride": 2}),
    (BasicBlock, ActBasicBlock, {"in_channels": 3, "out_channels": 3}),
    (BottleneckBlock, ActBottleneckBlock, {"in_channels": 3, "out_channels": 8, "bottleneck_channels": 4}),
    (
        BottleneckBlock,
        ActBottleneckBlock,
        {"in_channels": 3, "out_channels": 3, "bottleneck_channels": 4, "dilation": 2, "stride_in_1x1": True},
    ),
]


@pytest.mark.parametrize("norm", ["FrozenBN", "BN", "GN", ""])
@pytest.mark.parametrize(("original", "ours", "arguments"), PAIRS)
def test_the_same_numbers_and_names(original, ours, arguments, norm, photographs):
    if norm == "GN" and original is not BasicStem:
        arguments = {**arguments, "out_channels": 64, "in_channels": 3, "norm": "GN"}
        if "bottleneck_channels" in arguments:
            arguments["bottleneck_channels"] = 32
    block, made = original(**{**arguments, "norm": norm}), ours(**{**arguments, "norm": norm})
    assert list(block.state_dict()) == list(made.state_dict())
    made.load_state_dict(block.state_dict())
    images = photographs(2, 32)
    for x in (images, torch.randn(2, 3, 33, 31)):
        assert torch.equal(made(x), block(x))
    assert torch.equal(with_activations(block)(images), made(images))
    assert type(block) is ours


def test_gradients_are_the_same():
    block = BottleneckBlock(8, 8, bottleneck_channels=4)
    made = ActBottleneckBlock(8, 8, bottleneck_channels=4)
    made.load_state_dict(block.state_dict())
    x = torch.randn(2, 8, 9, 9)
    for module in (block, made):
        module(x).square().sum().backward()
    for (name, a), (_, b) in zip(block.named_parameters(), made.named_parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


def test_a_users_own_block_is_left_alone():
    class Mine(BasicBlock):
        def forward(self, x):
            return super().forward(x) + 1

    resnet = ResNet(BasicStem(), ResNet.make_default_stages(18, block_class=Mine), out_features=["res3"])
    assert {type(block) for block in with_activations(resnet).res2} == {Mine}
    assert type(resnet.stem) is ActBasicStem


def test_a_resnet_with_activation_modules_can_be_scripted(photographs):
    """As detectron2's own can, for which it has a patch; with QuAC inside it can be traced and exported instead."""
    patch_nonscriptable_classes()
    resnet = with_activations(
        ResNet(BasicStem(), ResNet.make_default_stages(50, norm="FrozenBN"), out_features=["res4"])
    )
    scripted = torch.jit.script(resnet)
    images = photographs(2, 64)
    assert torch.allclose(scripted(images)["res4"], resnet(images)["res4"])
