"""The ACON family against the published modules, written here from their equations with 1×1 convolutions."""

import pytest
import torch
from torch import nn

from quac_plugins import QACON, AconC, MetaACON


class PublishedAconC(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.p1 = nn.Parameter(torch.randn(1, width, 1, 1))
        self.p2 = nn.Parameter(torch.randn(1, width, 1, 1))
        self.beta = nn.Parameter(torch.ones(1, width, 1, 1))

    def forward(self, x):
        return (self.p1 * x - self.p2 * x) * torch.sigmoid(self.beta * (self.p1 * x - self.p2 * x)) + self.p2 * x


class PublishedMetaAconC(nn.Module):
    def __init__(self, width, r=16):
        super().__init__()
        self.fc1 = nn.Conv2d(width, max(r, width // r), kernel_size=1, stride=1, bias=True)
        self.bn1 = nn.BatchNorm2d(max(r, width // r))
        self.fc2 = nn.Conv2d(max(r, width // r), width, kernel_size=1, stride=1, bias=True)
        self.bn2 = nn.BatchNorm2d(width)
        self.p1 = nn.Parameter(torch.randn(1, width, 1, 1))
        self.p2 = nn.Parameter(torch.randn(1, width, 1, 1))

    def forward(self, x):
        pooled = x.mean(dim=2, keepdims=True).mean(dim=3, keepdims=True)
        beta = torch.sigmoid(self.bn2(self.fc2(self.bn1(self.fc1(pooled)))))
        return (self.p1 * x - self.p2 * x) * torch.sigmoid(beta * (self.p1 * x - self.p2 * x)) + self.p2 * x


class PublishedQualityAcon(nn.Module):
    def __init__(self, width, quality=36, r=16):
        super().__init__()
        wide = width + quality
        self.fc1 = nn.Conv2d(wide, max(r, wide // r), kernel_size=1, stride=1, bias=True)
        self.bn1 = nn.BatchNorm2d(max(r, wide // r))
        self.fc2 = nn.Conv2d(max(r, wide // r), wide, kernel_size=1, stride=1, bias=True)
        self.bn2 = nn.BatchNorm2d(wide)
        self.fc3 = nn.Conv2d(wide, width, kernel_size=1, stride=1, bias=True)
        self.p1 = nn.Parameter(torch.randn(1, width, 1, 1))
        self.p2 = nn.Parameter(torch.randn(1, width, 1, 1))

    def forward(self, x, q):
        z = torch.cat((x.mean(dim=2, keepdims=True).mean(dim=3, keepdims=True), q), dim=1)
        beta = self.fc3(torch.sigmoid(self.bn2(self.fc2(self.bn1(self.fc1(z))))))
        return (self.p1 * x - self.p2 * x) * torch.sigmoid(beta * (self.p1 * x - self.p2 * x)) + self.p2 * x


CASES = [
    ("acon", 8, 0),
    ("acon", 300, 0),
    ("meta", 8, 0),
    ("meta", 300, 0),
    ("qacon", 8, 36),
    ("qacon", 300, 36),
    ("qacon", 8, 2048),
    ("qacon", 3, 1),
]


def pair(kind, width, quality):
    """The published module with used parameters and statistics, and ours."""
    if kind == "acon":
        published, ours = PublishedAconC(width), AconC(width)
    elif kind == "meta":
        published, ours = PublishedMetaAconC(width), MetaACON(width)
    else:
        published, ours = PublishedQualityAcon(width, quality), QACON(width, quality)
    for name, tensor in published.state_dict().items():
        if tensor.is_floating_point() and not name.endswith("weight"):
            tensor.copy_(torch.rand_like(tensor) + 0.5 if "running_var" in name else torch.randn_like(tensor))
    return published, ours


def features(photographs, width, batch=4):
    """Photographs through a random convolution: features as a network has them."""
    return nn.functional.conv2d(photographs(batch, 32), torch.randn(width, 3, 3, 3)).detach() / 2


@pytest.mark.parametrize(("kind", "width", "quality"), CASES)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("real", [False, True])
def test_published_state_dict_loads_and_gives_the_same_output_and_gradient(
    kind, width, quality, training, real, photographs
):
    published, ours = pair(kind, width, quality)
    ours.load_state_dict(published.state_dict(), strict=True)
    assert set(ours.state_dict()) == set(published.state_dict())
    published.train(training)
    ours.train(training)
    x = features(photographs, width) if real else torch.randn(4, width, 5, 7)
    x.requires_grad_()
    q = [torch.randn(4, quality, 1, 1)] if quality else []
    expected = published(x, *q)
    y = ours(x, *q)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    if quality:
        ours.load_state_dict(published.state_dict())  # the batch norms' statistics have moved in training
        second, expected_second = ours(x, q[0].flatten(1)), published(x, *q)
        torch.testing.assert_close(second, expected_second, atol=1e-5, rtol=1e-5)
    weight = torch.randn_like(y)
    ours.load_state_dict(published.state_dict())
    (gradient,) = torch.autograd.grad((ours(x, *q) * weight).sum(), x)
    (wanted,) = torch.autograd.grad((published(x, *q) * weight).sum(), x)
    torch.testing.assert_close(gradient, wanted, atol=1e-4 * wanted.abs().max().item(), rtol=1e-4)


@pytest.mark.parametrize(("kind", "width", "quality"), CASES)
def test_training_moves_the_running_statistics_as_published(kind, width, quality):
    published, ours = pair(kind, width, quality)
    ours.load_state_dict(published.state_dict())
    for _ in range(3):
        x, q = torch.randn(4, width, 3, 3), [torch.randn(4, quality, 1, 1)] if quality else []
        published(x, *q)
        ours(x, *q)
    for name, tensor in published.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("width", [4, 48, 1000])
def test_paper_initialization_is_normal_slopes(width):
    for module in (AconC(width), MetaACON(width), QACON(width)):
        slopes = torch.cat([module.p1.flatten(), module.p2.flatten()])
        assert module.p1.shape == module.p2.shape == (1, width, 1, 1)
        if width == 1000:
            assert slopes.mean().abs() < 0.1
            assert abs(slopes.std() - 1) < 0.1
    assert torch.equal(AconC(width).beta, torch.ones(1, width, 1, 1))


def test_hidden_width_is_the_larger_of_r_and_the_rth_part():
    assert QACON(8).fc1.out_channels == 16
    assert QACON(480, 36).fc1.out_channels == 32
    assert QACON(480, 36, reduction=4).fc1.out_channels == 129
    assert MetaACON(8, reduction=2).fc1.out_channels == 4
    assert QACON(480, 36).fc3.out_channels == 480


def test_quality_moves_the_output_of_qacon():
    module, x = QACON(8, norm="layer").eval(), torch.randn(2, 8, 6, 6)
    assert not torch.allclose(module(x, torch.zeros(2, 36)), module(x, torch.ones(2, 36)))
