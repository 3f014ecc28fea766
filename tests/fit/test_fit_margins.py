"""Fits of margins: what a plain host gets by default."""

import numpy as np
import pytest
import torch

import quac_plugins as quac
from quac_plugins.core.prior.margins import Margin
from quac_plugins.fit.training import Fit

TWO = {"corruptions": ["contrast", "gaussian_noise"], "views": 2, "draws": 2, "lr": 2e-3}


def margins_of(model):
    return [module for module in model.modules() if isinstance(module, Margin)]


def test_a_plain_host_gets_margins_that_bring_it_nearer_and_leave_it_as_it_was(photos, quick, build, equal):
    model = build("test_resnet")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = quac.fit_prior(model, photos, **{**quick, **TWO, "steps": 24, "check_every": 8})
    config = quac.injection_of(model).prior.config
    assert (config.fdm, config.experts, config.quality) == ("margin", TWO["corruptions"], "degradation")
    stage = report.stages["margins"]
    assert stage["best"] < 0.9 * stage["first"]
    assert report.recipe["severities"] == [1, 2, 3, 4, 5]
    assert report.gate is not None
    assert report.multiply_adds < 0.01
    assert all(bool(torch.isfinite(margin.table).all()) for margin in margins_of(model))
    assert {len(margin._parameters["table"]) for margin in margins_of(model)} == {4}  # what was shared is inside them
    assert equal(quac.remove(model).state_dict(), before)


def test_statistics_alone_take_no_step(photos, quick, build):
    model = build("test_resnet")
    report = quac.fit_prior(model, photos, **{**quick, **TWO, "steps": 0})
    assert [entry["step"] for entry in report.stages["margins"]["curve"]] == [0]
    single = build("test_resnet")
    quac.fit_prior(single, photos, **{**quick, "corruptions": "contrast", "severities": 4, "steps": 0})
    assert [len(margin.table) for margin in margins_of(single)[:2]] == [1, 1]


def test_an_interrupted_fit_goes_on_as_if_nothing_had_happened(
    photos, quick, build, put_in, equal, monkeypatch, tmp_path
):
    options = {**quick, **TWO, "steps": 6, "check_every": 2}
    whole = build("test_resnet")
    quac.fit_prior(whole, photos, **options)
    usual, steps = Fit._one_step, []

    def interrupted(self):
        steps.append(1)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return usual(self)

    model = build("test_resnet")
    with monkeypatch.context() as patched:
        patched.setattr(Fit, "_one_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quac.fit_prior(model, photos, checkpoint=tmp_path, **options)
    assert quac.injection_of(model) is None  # a plain host again
    quac.fit_prior(model, photos, checkpoint=tmp_path, **options)
    assert equal(put_in(model), put_in(whole))


def test_ones_own_degradations_have_margins_of_their_own(photos, quick, build):
    def dark(image):
        return image // 3

    model = build("test_resnet")
    quac.fit_prior(
        model, photos, degrade={"dark": dark, "light": lambda image: 255 - image // 2}, **{**quick, "steps": 2}
    )
    assert quac.injection_of(model).prior.config.experts == ["dark", "light"]
    table = margins_of(model)[0].table
    assert len(table) == 4
    assert np.isfinite(table.detach().numpy()).all()


def test_margins_that_are_not_fitted_stay(photos, quick, build):
    """One degradation after the other, also where the host alone is better and nothing of the new one is kept."""
    model = build("test_resnet")
    config = quac.PriorConfig(fdm="margin", experts=["contrast", "gaussian_noise", "snow"])
    quac.fit_prior(model, photos, config=config, corruptions=["contrast"], **{**quick, "lr": 2e-3, "steps": 16})
    before = [margin.table.detach().clone() for margin in margins_of(model)]
    assert any(bool(table[:2].any()) for table in before)
    with torch.no_grad():
        margins_of(model)[0].table[0, 0] = before[0][0, 0] = torch.inf  # also what no number can be added to
    for steps in (0, 2):
        quac.fit_prior(model, photos, corruptions=["gaussian_noise"], **{**quick, "steps": steps})
        gate = margins_of(model)[0].gate
        assert not bool(gate.fc2.weight.any())  # calibrated alone: the identity's bias
        assert not bool(gate.fc2.bias[1:].any())
        for table, margin in zip(before, margins_of(model), strict=True):
            assert torch.equal(margin.table[:2], table[:2])
            assert not bool(margin.table[4:].any())


def test_states_of_other_photographs_are_not_used(photos, quick, build, interrupt, tmp_path):
    interrupt(1)
    with pytest.raises(KeyboardInterrupt):
        quac.fit_prior(build("test_resnet"), photos[:2], corruptions="fog", checkpoint=tmp_path, **quick)
    with pytest.raises(ValueError, match="belongs to another fit"):
        quac.fit_prior(build("test_resnet"), photos[2:], corruptions="contrast", checkpoint=tmp_path, **quick)
