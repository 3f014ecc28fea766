"""A host of shapes alone: it draws nothing, and one that needs numbers is not there."""

import numpy as np
import torch
from torch import nn

from quac_plugins.timm_features import of_shapes


def _host():
    np.random.rand(3)
    rates = [rate.item() for rate in torch.linspace(0, 0.1, 2)]  # of stochastic depth
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Dropout(rates[1]))


def test_what_is_built_afterwards_is_what_would_have_been_built():
    torch.manual_seed(0)
    np.random.seed(0)
    wanted, number = _host(), np.random.rand()
    torch.manual_seed(0)
    np.random.seed(0)
    assert all(parameter.is_meta for parameter in of_shapes(_host).parameters())
    built = _host()
    assert all(torch.equal(a, b) for a, b in zip(wanted.parameters(), built.parameters(), strict=True))
    assert np.random.rand() == number


def test_hosts_that_need_numbers_are_not_there():
    assert of_shapes(lambda: nn.Linear(2, int(torch.tensor(2).item()))) is None
    assert torch.get_default_device().type == "cpu"
