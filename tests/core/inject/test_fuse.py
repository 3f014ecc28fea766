"""Folding the drivers' batch norms: the same outputs, fewer operations, and what is saved is read back."""

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import quac_plugins as quac
from quac_plugins.core.activations import ACTIVATIONS, DrivenActivation


def trained(model):
    """Away from its initialization, statistics included."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and any(part in name for part in (".fc", ".bn", ".p1", ".p2", "fc", "bn")):
                tensor.add_(torch.rand_like(tensor) * 0.1)
    return model.eval()


def drivers(model):
    return [m for m in model.modules() if isinstance(m, DrivenActivation)]


@pytest.mark.parametrize("name", ["test_resnet_qacon", "test_resnet_qacon_ddp", "test_convnext_qacon"])
def test_outputs_stay(name, photographs):
    model, images = trained(timm.create_model(name)), photographs(2, 96)
    expected = model(images)
    before = len(model.state_dict())
    assert quac.fuse(model) is model
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)
    assert len(model.state_dict()) < before
    assert not [m for d in drivers(model) for m in d.modules() if isinstance(m, nn.BatchNorm2d)]
    state = model.state_dict()
    assert quac.fuse(model).state_dict().keys() == state.keys()  # twice is once


@pytest.mark.parametrize("name", [n for n, c in ACTIVATIONS.items() if issubclass(c, DrivenActivation)])
@pytest.mark.parametrize("init", ["paper", "preserve"])
def test_every_driven_activation_alone(name, init):
    torch.manual_seed(0)
    module = ACTIVATIONS[name](12, init=init)
    x, q = torch.randn(3, 12, 5, 5), torch.randn(3, 36)
    for _ in range(3):
        module(x, q)
    expected = module.eval()(x, q)
    torch.testing.assert_close(quac.fuse(module)(x, q), expected)
    assert init == "paper" or torch.equal(module(x, q), x)


def test_what_is_saved_is_read_back(tmp_path, photographs):
    model, images = trained(timm.create_model("test_resnet_qacon")), photographs(2, 96)
    expected = quac.fuse(model)(images)
    quac.save_adapter(model, tmp_path / "adapter")
    host = timm.create_model("test_resnet").eval()
    host.load_state_dict(quac.remove(trained(timm.create_model("test_resnet_qacon"))).state_dict(), strict=False)
    assert quac.injection_of(quac.load_adapter(host, tmp_path / "adapter")).config.norm == "none"
    timm.models.save_for_hf(model, tmp_path / "whole")
    again = timm.create_model(f"local-dir:{tmp_path / 'whole'}", pretrained=True).eval()
    assert torch.equal(again(images), expected)


def test_what_cannot_be_folded_is_refused_whole():
    with pytest.raises(ValueError, match="ResNet holds no activations with a driver"):
        quac.fuse(timm.create_model("test_resnet"))
    model = timm.create_model("test_resnet_qacon")
    with pytest.raises(ValueError, match=r"'conv1.2' is training.*model.eval\(\) first"):
        quac.fuse(model)
    weight_norm(drivers(model.eval())[-1].fc2)
    with pytest.raises(ValueError, match="is not made of plain layers"):
        quac.fuse(model)
    assert drivers(model)[0].norm == "batch"
    assert isinstance(drivers(model)[0].bn1, nn.BatchNorm2d)


def test_norms_that_follow_the_input_stay():
    model = timm.create_model("test_resnet_qacon", norm="layer").eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert all(torch.equal(tensor, state[name]) for name, tensor in quac.fuse(model).state_dict().items())
