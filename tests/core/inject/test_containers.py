"""A prior runs once for each image, also behind modules that run their children by themselves."""

import copy

import pytest
import timm
import torch
from torch import nn

from quac_plugins import PriorConfig, QuACConfig, inject, injection_of, remove
from quac_plugins.core.inject.surgery import take_prior


class Chain(nn.Module):
    """As nn.Sequential, in its own words."""

    def __init__(self, *layers):
        super().__init__()
        for i, layer in enumerate(layers):
            self.add_module(f"b{i}", layer)

    def forward(self, x):
        for layer in self.children():
            x = layer(x)
        return x


class Doubled(Chain):
    """Runs its children one after the other, and goes on."""

    def forward(self, x):
        return 2 * super().forward(x)


class Summed(Chain):
    """Runs its children beside each other."""

    def forward(self, x):
        return sum(layer(x) for layer in self._modules.values())


class Initialized(Chain):
    """Names its children, but not to run them."""

    def forward(self, x):
        assert len(list(self.children())) >= 2
        return self.b1(self.b0(x))


class Dense(nn.ModuleDict):
    def forward(self, x):
        features = [x]
        for layer in self.values():
            features.append(layer(torch.cat(features, 1)))
        return torch.cat(features, 1)


class Told(nn.Sequential):
    def forward(self, x):
        for layer in self:
            x = layer(x)
        return x


def convolutions(count=2, channels=8):
    return [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(count)]


def network(block):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), block, nn.ReLU()).eval()


def calls_of(model, images):
    """How often each prior ran."""
    counts, handles = {}, []
    for name, module in model.named_modules():
        if name.endswith("quac_prior"):
            counts[name] = 0

            def count(*_, name=name):
                counts[name] += 1

            handles.append(module.register_forward_hook(count))
    model(images)
    for handle in handles:
        handle.remove()
    return counts


@pytest.mark.parametrize("block", [Chain, Initialized, nn.Sequential])
def test_it_runs_once_and_after_the_others(block):
    model, images = network(block(*convolutions())), torch.rand(2, 3, 16, 16)
    for _ in range(2):  # also when the class is known
        expected = model(images)
        inject(model, PriorConfig(site="1"), images)
        assert calls_of(model, images) == {"1.quac_prior": 1}
        assert torch.equal(model(images), expected)
        inside = [module for name, module in model[1].named_children() if name != "quac_prior"]
        plain = nn.Sequential(model[0], *inside)(images)
        with torch.no_grad():
            model[1].quac_prior.body[-1].bias.fill_(0.3)
            torch.testing.assert_close(model(images), model[2](model[1].quac_prior(plain)))
        copied = copy.deepcopy(model)
        assert calls_of(copied, images) == {"1.quac_prior": 1}
        take_prior(model)()
        assert calls_of(model, images) == {"1.quac_prior": 1}
        assert torch.equal(model(images), copied(images))
        assert torch.equal(remove(model)(images), expected)
        assert not model[1]._forward_hooks


def test_a_copy_from_another_process_knows_its_chains(monkeypatch):
    model, images = network(Chain(*convolutions())), torch.rand(2, 3, 16, 16)
    inject(model, PriorConfig(site="1"), images)
    monkeypatch.setattr("quac_plugins.core.inject.containers._chains", set())
    take_prior(model)()
    assert calls_of(model, images) == {"1.quac_prior": 1}


@pytest.mark.parametrize("block", [Doubled, Summed])
def test_what_runs_its_children_in_another_way_is_refused(block):
    model, images = network(block(*convolutions())), torch.rand(2, 3, 16, 16)
    expected, keys = model(images), list(model.state_dict())
    for _ in range(2):
        with pytest.raises(ValueError, match="site='1': it runs its children by itself"):
            inject(model, PriorConfig(site="1"), images)
        assert injection_of(model) is None
        assert list(model.state_dict()) == keys
        assert torch.equal(model(images), expected)
        assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("block", [Dense({"a": nn.Conv2d(8, 4, 1), "b": nn.Conv2d(12, 4, 1)}), Told(*convolutions())])
def test_containers_are_no_places(block):
    model, images = network(block), torch.rand(2, 3, 16, 16)
    with pytest.raises(ValueError, match="runs its children by itself, and would run one more"):
        inject(model, PriorConfig(site="1"), images)
    expected = model(images)
    inject(model, PriorConfig(site="*"), images)
    assert "1" not in {site.name for site in injection_of(model).prior.sites}
    assert set(calls_of(model, images).values()) == {1}
    assert torch.equal(model(images), expected)


@pytest.mark.parametrize("name", ["regnetx_002", "densenet121", "rdnet_tiny", "ese_vovnet19b_slim_dw"])
def test_networks_of_timm(name, normalized):
    model, images = timm.create_model(name).eval(), normalized(1, 64)
    with torch.no_grad():
        expected = model(images)
        inject(model, PriorConfig(site=["auto", "stages"]))
        counts = calls_of(model, images)
        assert len(counts) >= 3
        assert set(counts.values()) == {1}
        assert torch.equal(model(images), expected)
        assert torch.equal(remove(model)(images), expected)


class Scaled(Chain):
    """A chain that sees the image first, as it is given to none of its children."""

    def forward(self, x):
        return super().forward(x * 2)


class ScaledList(nn.ModuleList):
    def forward(self, x):
        x = x * 2
        for layer in self:
            x = layer(x)
        return x


class ScaledSum(Summed):
    def forward(self, x):
        return super().forward(x * 2)


class ScaledDense(Dense):
    def forward(self, x):
        return super().forward(x * 2)


@pytest.mark.parametrize("first", [Scaled, lambda *layers: ScaledList(layers)])
def test_a_tapped_chain_computes_what_it_did(first, cheap):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()
    model, images = nn.Sequential(first(*layers), nn.Conv2d(8, 4, 1), nn.ReLU()).eval(), torch.rand(2, 3, 16, 16)
    expected, seen = model(images), []

    def quality(images):
        seen.append(images)
        return cheap(images)

    inject(model, QuACConfig(quality=quality, quality_channels=6, where="all"), images)
    assert injection_of(model).tap == "0"
    assert torch.equal(model(images), expected)
    assert len(seen) == 1
    assert torch.equal(seen[0], images)
    assert torch.equal(remove(copy.deepcopy(model))(images), expected)


@pytest.mark.parametrize(
    "first",
    [
        ScaledSum(nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)),
        ScaledDense({"a": nn.Conv2d(3, 4, 1), "b": nn.Conv2d(7, 4, 1)}),
    ],
)
@pytest.mark.parametrize("config", [QuACConfig(where="all"), PriorConfig(experts=["fog"], site="1")])
def test_a_tap_where_one_more_child_would_change_the_numbers_is_refused(first, config):
    images = torch.rand(2, 3, 16, 16)
    model = nn.Sequential(first, nn.LazyConv2d(4, 1), nn.ReLU()).eval()
    expected, keys = model(images), list(model.state_dict())
    with pytest.raises(ValueError, match=r"'0' \(Scaled.*runs its children by itself.*nn\.Identity"):
        inject(model, config, images)
    assert injection_of(model) is None
    assert list(model.state_dict()) == keys
    assert torch.equal(model(images), expected)
    model[0] = nn.Sequential(nn.Identity(), model[0])  # as the error says
    torch.testing.assert_close(inject(model, QuACConfig(where="all", quality="brisque_tone"), images)(images), expected)
