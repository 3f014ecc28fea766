"""The activations whose numbers all come from the driver: their equations, and what the quality does to them."""

import pytest
import torch
from torch import nn

from quac_plugins import QGELU, QPReLU, QSwish

CLASSES = [QSwish, QPReLU, QGELU]


def plain(cls, x, number):
    if cls is QSwish:
        return x / (1 + torch.exp(-number * x))
    if cls is QPReLU:
        return x.clamp(min=0) + number * x.clamp(max=0)
    return x * torch.distributions.Normal(0.0, 1.0).cdf(number * x)


def numbers(module, x, q):
    """What the driver says, from its parameters by hand: matrix products instead of convolutions."""
    z = torch.cat((x.flatten(2).mean(2), q), dim=1)

    def linear(layer, v):
        return v @ layer.weight[:, :, 0, 0].T + layer.bias

    h = nn.functional.layer_norm(linear(module.fc1, z), module.bn1.weight.shape, module.bn1.weight, module.bn1.bias)
    h = nn.functional.layer_norm(linear(module.fc2, h), module.bn2.weight.shape, module.bn2.weight, module.bn2.bias)
    return linear(module.fc3, torch.sigmoid(h))[:, :, None, None]


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("real", [False, True])
def test_equation(cls, real, photographs):
    module = cls(8, 6, norm="layer").double()
    x = torch.randn(4, 8, 6, 6, dtype=torch.float64) * 3
    if real:
        x = nn.functional.conv2d(photographs(4, 16).double(), torch.randn(8, 3, 3, 3, dtype=torch.float64))
    q = torch.randn(4, 6, dtype=torch.float64)
    torch.testing.assert_close(module(x, q), plain(cls, x, numbers(module, x, q)), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("cls", CLASSES)
def test_quality_alone_changes_the_output(cls):
    module, x = cls(8, 6, norm="layer").eval(), torch.randn(1, 8, 4, 4)
    assert not torch.allclose(module(x, torch.zeros(1, 6)), module(x, 5 * torch.ones(1, 6)), atol=1e-3)


@pytest.mark.parametrize("cls", CLASSES)
def test_zero_stays_zero(cls):
    assert torch.equal(cls(8, 6)(torch.zeros(2, 8, 3, 3), torch.randn(2, 6)), torch.zeros(2, 8, 3, 3))
