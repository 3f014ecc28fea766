"""Networks with QuAC, and what is computed with them in one pass or several: losses and their gradients."""

import timm
import torch
from outcomes import REFUSED, RIGHT
from torch import nn
from torch.utils.checkpoint import checkpoint

import quac_plugins as quac
from quac_plugins import QuACConfig


def build(cheap, name="test_resnet", where="spatial", **kwargs):
    """A small real network with QuAC whose every activation depends on q."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **kwargs)
    quac.inject(model, QuACConfig(quality=cheap, norm="layer", init="paper", where=where))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0  # a recomputation would move the statistics a second time
    return model


class Chain(nn.Module):
    """A plain network of convolutions, with its tail checkpointed if asked; the tail sees the image again."""

    def __init__(self):
        super().__init__()
        self.stem, self.act1 = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(1, 8)
        self.merge, self.act2 = nn.Conv2d(11, 8, 3, padding=1), nn.ReLU()
        self.out, self.act3 = nn.Conv2d(8, 3, 3, padding=1), nn.ReLU()
        self.checkpointed = False

    def tail(self, x, image):
        return self.act2(self.merge(torch.cat((self.norm(self.conv(x)), image), dim=1)))

    def forward(self, image):
        x = self.act1(self.stem(image))
        x = checkpoint(self.tail, x, image, use_reentrant=False) if self.checkpointed else self.tail(x, image)
        return self.act3(self.out(x))


def chain(cheap):
    """It with QuAC: compiled in a tenth of a real network's time."""
    torch.manual_seed(0)
    config = QuACConfig(quality=cheap, where="all", norm="layer", init="paper")
    return quac.inject(Chain(), config, torch.empty(1, 3, 32, 32))


def gradients(model, loss):
    model.zero_grad()
    loss(model).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def close(found, expected):
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        torch.testing.assert_close(
            found[name], wanted, atol=2e-5 * wanted.abs().max().item() + 1e-7, rtol=1e-3, msg=lambda m, n=name: n + m
        )


def one_forward(photographs):
    return lambda model: model(photographs(2, 48)).square().mean()


def two_forwards(photographs):
    return lambda model: (
        model(photographs(2, 48)).square().mean() + 3 * model(photographs(4, 48)[2:] * 0.3).square().mean()
    )


def forward_between(photographs):
    def loss(model):
        value = model(photographs(2, 48)).square().mean()
        model.eval()
        with torch.no_grad():
            model(photographs(4, 48)[2:] * 0.3)
        model.train()
        return value

    return loss


def image_of(y):
    return torch.sigmoid(y[:, :3, None, None] * torch.linspace(-1, 1, 48 * 48).reshape(48, 48))


def cascade(photographs):
    return lambda model: model(image_of(model(photographs(2, 48)))).square().mean()


# of recomputations that find their pass by its being the latest
ONE_PASS_ALONE = [(one_forward, RIGHT), (two_forwards, REFUSED), (forward_between, REFUSED), (cascade, REFUSED)]
