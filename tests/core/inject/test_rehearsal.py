"""A config's sites are looked for in a host of shapes alone, before the real one is built."""

import numpy as np
import pytest
import torch
from torch import nn

import quac_plugins as quac
from quac_plugins.core.inject.rehearsal import rehearse, rehearsing


def _host():
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3))


@pytest.mark.parametrize("config", [quac.QuACConfig(where="7"), quac.PriorConfig(site="7")])
def test_a_missing_site_is_found_without_building_anything_real(config):
    devices = []

    def make():
        devices.append((rehearsing(), torch.empty(0).device.type))
        return _host()

    with pytest.raises(ValueError, match="'7' matches no"):
        rehearse(make, lambda host: quac.inject(host, config))
    assert devices == [(True, "meta")]
    assert not rehearsing()


def test_what_is_built_afterwards_is_what_would_have_been_built():
    def make():
        np.random.rand(3)
        return _host()

    torch.manual_seed(0)
    np.random.seed(0)
    wanted, number = _host(), np.random.rand()
    torch.manual_seed(0)
    np.random.seed(0)
    rehearse(make, lambda host: quac.inject(host, quac.QuACConfig(where="all")))
    built = _host()
    assert all(torch.equal(a, b) for a, b in zip(wanted.parameters(), built.parameters(), strict=True))
    assert np.random.rand() == number


def test_hosts_with_stochastic_depth_are_rehearsed():
    def make():
        rates = [rate.item() for rate in torch.linspace(0, 0.1, 2)]
        return nn.Sequential(_host(), nn.Dropout(rates[1]))

    with pytest.raises(ValueError, match="'7' matches no"):
        rehearse(make, lambda host: quac.inject(host, quac.QuACConfig(where="7")))


def test_hosts_that_need_numbers_are_left_to_the_real_build():
    def make():
        return nn.Linear(2, int(torch.tensor(2).item()))

    rehearse(make, lambda host: pytest.fail("there is no host"))
    assert torch.get_default_device().type == "cpu"
