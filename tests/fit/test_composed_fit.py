"""Fits of margins and FDMs together."""

import pytest
import torch

import quac_plugins as quac
from quac_plugins.core.inject.record import modules_inside
from quac_plugins.core.prior.fdm import Light
from quac_plugins.core.prior.margins import Margin, margins_inside

TWO = {"corruptions": ["contrast", "gaussian_noise"], "views": 2, "draws": 2, "lr": 2e-3, "least_positions": 0}


def config(*experts, **options):
    return quac.PriorConfig(fdm="light", experts=list(experts), margins=True, **options)


def fdms_of(model):
    return [module for module in modules_inside(model).values() if isinstance(module, Light)]


def test_both_are_fitted_together_and_the_host_is_as_it_was(photos, quick, build, equal):
    model = build("test_resnet")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = quac.fit_prior(
        model, photos, config=config(*TWO["corruptions"]), **{**quick, **TWO, "steps": 24, "check_every": 8}
    )
    stage = report.stages["margins"]
    assert stage["best"] < 0.9 * stage["first"]
    assert len(fdms_of(model)) > 1
    for fdm in fdms_of(model):
        assert not fdm.is_fresh
        assert bool((fdm.std != 1).any())  # standardized
        assert any(bool(margin.table.any()) for margin in margins_inside(fdm))
    tables = [m.table for m in model.modules() if isinstance(m, Margin)]
    assert {len(table) for table in tables} == {4}  # what was shared is inside them
    assert report.gate is not None
    assert "3 photographs are few" in str(report)
    assert report.multiply_adds > 0.05
    assert equal(quac.remove(model).state_dict(), before)


def test_an_interrupted_fit_goes_on(photos, quick, build, put_in, equal, interrupt, tmp_path):
    options = {**quick, **TWO, "steps": 4, "check_every": 2, "config": config(*TWO["corruptions"], site="auto")}
    whole, model = build("test_resnet"), build("test_resnet")
    quac.fit_prior(whole, photos, **options)
    resume = interrupt(3)
    with pytest.raises(KeyboardInterrupt):
        quac.fit_prior(model, photos, checkpoint=tmp_path, **options)
    resume()
    assert quac.injection_of(model) is None
    quac.fit_prior(model, photos, checkpoint=tmp_path, **options)
    assert equal(put_in(model), put_in(whole))


def test_a_degradation_that_is_fitted_later_changes_nothing_of_the_others(photos, quick, build):
    model = build("test_resnet")
    both = config("contrast", "snow", site="auto")
    quac.fit_prior(model, photos, config=both, **{**quick, **TWO, "corruptions": ["contrast"]})
    convolutions = [fdm.body[0].weight.clone() for fdm in fdms_of(model)]
    tables = [m.table.detach().clone() for m in model.modules() if isinstance(m, Margin)]
    quac.fit_prior(model, photos, **{**quick, **TWO, "corruptions": ["snow"]})
    now = [m.table for m in model.modules() if isinstance(m, Margin)]
    assert all(torch.equal(a[:2], b[:2]) for a, b in zip(tables, now, strict=True))
    assert any(bool(table[2:].any()) for table in now)
    assert all(torch.equal(a, fdm.body[0].weight) for a, fdm in zip(convolutions, fdms_of(model), strict=True))


def test_one_known_corruption_needs_no_quality(photos, quick, build):
    model = build("test_efficientnet")
    report = quac.fit_prior(model, photos, config=config(), **{**quick, **TWO, "corruptions": "contrast"})
    assert report.gate is None
    assert quac.injection_of(model).prior.quality is None
    assert all(len(m.table) == 1 for m in model.modules() if isinstance(m, Margin))


def test_a_budget_is_kept_and_said(photos, quick, build):
    for budget, width in ((0.2, 16), (0.5, 32)):
        model = build("test_resnet")
        report = quac.fit_prior(model, photos, budget=budget, **{**quick, **TWO, "steps": 0})
        config = quac.injection_of(model).prior.config
        assert (config.fdm, config.fdm_width, config.margins) == ("light", width, True)
        assert 0.5 * budget < report.multiply_adds <= budget
        assert report.chosen in str(report)
        assert f"light FDMs of width {width} at" in report.chosen


def test_what_no_budget_can_do(photos, quick, build):
    options = {**quick, **TWO, "steps": 0}
    model = build("test_resnet")
    with pytest.warns(UserWarning, match=r"budget 0.001: margins alone, since the smallest FDM is \d+\.\d% of"):
        report = quac.fit_prior(model, photos, budget=0.001, **options)
    assert quac.injection_of(model).prior.config.fdm == "margin"
    assert "margins alone" in str(report)
    with pytest.raises(ValueError, match="holds a prior already; leave budget out"):
        quac.fit_prior(model, photos, budget=0.5, **options)
    for given, message in (
        ({"budget": -1}, "budget must be a number from 0 on"),
        ({"budget": 0.5, "config": quac.PriorConfig(fdm="dense")}, "leave config out"),
    ):
        model = build("test_resnet")
        with pytest.raises(ValueError, match=message):
            quac.fit_prior(model, photos, **given, **options)
        assert quac.injection_of(model) is None
