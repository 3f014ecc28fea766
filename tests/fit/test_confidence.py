"""The confidence of a host with margins."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import quac_plugins as quac
from quac_plugins.core.prior.comparison import Pictures
from quac_plugins.core.prior.margins import Margin
from quac_plugins.fit.confidence import set_confidence

HELD = np.arange(4, 8)


@pytest.fixture
def session(build):
    model, teacher = build("test_vit"), build("test_vit")
    quac.inject(model, quac.PriorConfig(fdm="margin"), torch.rand(1, 3, 160, 160))
    return SimpleNamespace(
        model=model.eval(), teacher=teacher.eval(), recipe=SimpleNamespace(batch_size=4),
        images=lambda pictures: torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255,
    )  # fmt: skip


@pytest.fixture(scope="module")
def pictures(photos):
    crops = np.stack([np.resize(photos[i % len(photos)], (160, 160, 3)) for i in range(8)])
    return Pictures(crops, crops, np.arange(8), np.arange(4), HELD)


def last_of(session, value):
    last = [module for module in session.model.modules() if isinstance(module, Margin)][-1]
    with torch.no_grad():
        last.table[:, : last.site.channels] = value
    return last


def test_logits_that_shrank_become_as_large_as_they_were(session, pictures):
    last = last_of(session, 0.5 - 1)
    told = set_confidence(session, last, pictures, torch.ones(8, 1))
    assert told["before"] > 1e-4
    assert told["after"] < 1e-9
    assert torch.allclose(last.scale, torch.zeros(()), atol=1e-6)


def test_what_is_right_or_not_fitted_or_asked_for_stays_bit_for_bit(session, pictures):
    for value, shares in ((0.01, torch.ones(8, 1)), (0.0, torch.ones(8, 1)), (-0.5, torch.zeros(8, 1))):
        last = last_of(session, value)
        before = last.table.detach().clone()
        told = set_confidence(session, last, pictures, shares)
        assert torch.equal(last.table, before)
        assert told is None or told["after"] == told["before"]
