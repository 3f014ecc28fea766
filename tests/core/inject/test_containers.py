"""A prior runs once for each image, also behind modules that run their children by themselves."""

import copy

import pytest
import timm
import torch
from torch import nn

from quac_plugins import PriorConfig, inject, injection_of, remove
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
