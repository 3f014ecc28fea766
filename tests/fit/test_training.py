"""The loop of a fit, on a small network and pictures made by hand: no files and no corruptions."""

import copy
import math

import numpy as np
import pytest
import timm
import torch
from torch import nn

import quac_plugins as quac
from quac_plugins.core.inject.surgery import injection_of
from quac_plugins.core.inject.trace import trace
from quac_plugins.core.prior import comparison
from quac_plugins.core.prior.comparison import Comparison, Pictures
from quac_plugins.core.prior.features import Watch, channel_statistics
from quac_plugins.core.prior.recipe import Recipe
from quac_plugins.core.prior.sites import find_prior_sites
from quac_plugins.fit.training import Fit
from quac_plugins.processes import ALONE, Processes

SIZE = 64
QUICK = {"steps": 12, "near": 0.5, "check_every": 3, "batch_size": 4, "near_batch": 4, "lr": 1e-2}


@pytest.fixture(scope="module")
def pictures(photographs):
    """Four photographs with less contrast; none is held out."""
    clean = np.ascontiguousarray((photographs(4, SIZE) * 255).byte().permute(0, 2, 3, 1).numpy())
    degraded = np.concatenate([(clean * share + 255 * (1 - share) / 2).astype(np.uint8) for share in (0.3, 0.4)])
    view = np.tile(np.arange(4), 2)
    return Pictures(clean, degraded, view, np.arange(8), np.arange(0), np.arange(4))


@pytest.fixture(scope="module")
def split(pictures):
    """The same; the last photograph is held out."""
    view = pictures.view
    return Pictures(**{**vars(pictures), "train": np.flatnonzero(view < 3), "held": np.flatnonzero(view == 3)})


def normalize(pictures):
    return (pictures.float() / 127.5 - 1).permute(0, 3, 1, 2)


def host(seed=0, name="test_resnet"):
    torch.manual_seed(seed)
    return timm.create_model(name, num_classes=5).eval().requires_grad_(False)


def make_fit(
    pictures,
    model=None,
    deep="stages",
    processes=ALONE,
    front=False,
    seed=1,
    seen=None,
    recipe_seed=0,
    scale=False,
    **settings,
):
    """A fit of a new prior; ``seen`` gets the sizes of the batches that the teacher runs on."""
    model = model if model is not None else host()
    teacher = copy.deepcopy(model)
    torch.manual_seed(seed)
    quac.inject(model, quac.PriorConfig(), torch.empty(1, 3, SIZE, SIZE))
    sites = injection_of(model).prior.sites
    deeper = find_prior_sites(teacher, trace(teacher, torch.empty(1, 3, SIZE, SIZE)), [deep]) if deep else []
    parameters = {n: p.requires_grad_() for n, p in model.named_parameters() if "quac_prior" in n}
    if seen is not None:
        teacher.conv1[0].register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    module = model.get_submodule(f"{sites[0].name}.quac_prior")
    recipe = Recipe(**{**QUICK, "seed": recipe_seed, **settings})
    last = [p for site in sites for p in model.get_submodule(f"{site.name}.quac_prior").body[-1].parameters()]
    comparison = Comparison(
        model, teacher, sites, deeper, normalize, pictures, recipe, torch.device("cpu"), module if front else None
    )
    return Fit(comparison, parameters, processes, dict.fromkeys(last if scale else ()))


def state(fit):
    return {name: p.detach().clone() for name, p in fit.parameters.items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("front", [True, False])
def test_the_loss_falls(pictures, front):
    fit = make_fit(pictures, front=front, steps=40, check_every=10)
    outcome = fit.run()
    losses = [entry["loss"] for entry in outcome.curve[1:]]
    assert losses[1] < 0.95 * losses[0]  # near
    assert losses[3] < losses[2]  # deep
    held = [entry["held_out"] for entry in outcome.curve]
    assert min(held) < held[0]
    assert outcome.best_step == outcome.curve[int(np.argmin(held))]["step"] > 0
    fit.close()


@torch.no_grad()
def test_every_term_of_the_untouched_host_is_about_one(pictures):
    none = {"site_weight": 0.0, "deep_weight": 0.0, "logits_weight": 0.0, "near": 0.0}
    for name in ("site_weight", "deep_weight", "logits_weight"):
        fit = make_fit(pictures, **{**none, name: 1.0})
        assert 0.8 < float(fit.loss(pictures.train, near=False)) <= 1.001, name
    fit = make_fit(pictures, site_weight=2.0)
    assert 1.6 < float(fit.loss(pictures.train, near=True)) <= 2.001


@pytest.mark.parametrize(("front", "at"), [(True, 1), (True, 5), (False, 6), (True, 11), (False, 11)])
def test_interrupted_and_gone_on_with_is_the_same_bit_for_bit(pictures, front, at):
    crops = {"near_crop": 16} if at == 11 else {}
    whole = make_fit(pictures, front=front, **crops)
    outcome = whole.run()
    assert outcome.best_step > 0
    kept = []

    def interrupt(step, loss):
        if step == at:
            raise KeyboardInterrupt

    broken = make_fit(pictures, front=front, **crops)
    with pytest.raises(KeyboardInterrupt):
        broken.run(progress=interrupt, checkpoint=lambda: kept.append(copy.deepcopy(broken.state_dict())))
    other = make_fit(pictures, front=front, seed=7, **crops)  # its own start must not matter
    if kept:
        other.load_state_dict(kept[-1])
        assert other.step == (at - 1) // 3 * 3
    else:
        other = make_fit(pictures, front=front)
    again = other.run()
    assert (again.curve, again.best_step) == (outcome.curve, outcome.best_step)
    assert same(state(other), state(whole))


def test_a_finished_fit_that_is_read_back_stays_as_it_is(pictures):
    fit = make_fit(pictures, patience=1, near=0.25, lr=1e-12, steps=40)  # so small that nothing gets better
    outcome = fit.run()
    assert "no better" in outcome.stopped
    assert fit.step < 40
    other = make_fit(pictures, patience=1, near=0.25, lr=1e-12, steps=40)
    other.load_state_dict(copy.deepcopy(fit.state_dict()))
    again = other.run()
    assert (again.curve, again.best_step, again.stopped) == (outcome.curve, outcome.best_step, outcome.stopped)
    assert same(state(other), state(fit))


def test_the_same_again_and_another_with_another_seed(pictures):
    fits = [make_fit(pictures, **settings) for settings in ({}, {}, {"recipe_seed": 5})]
    outcomes = [fit.run() for fit in fits]
    assert outcomes[0].best_step > 0
    assert outcomes[0].curve == outcomes[1].curve != outcomes[2].curve
    assert same(state(fits[0]), state(fits[1]))
    assert not same(state(fits[0]), state(fits[2]))


@pytest.mark.filterwarnings("ignore:the loss was")
@pytest.mark.parametrize("rate", [1e-3, 30.0])  # 30: goes wild
def test_what_is_kept_is_never_worse_than_the_start(split, rate):
    fit = make_fit(split, lr=rate, clip=1e9, steps=9)
    before = state(fit)
    outcome = fit.run()
    held = [entry["held_out"] for entry in outcome.curve]
    if outcome.best_step == 0:
        assert same(state(fit), before)
    with torch.no_grad():
        now = float(fit.loss(split.held, near=False))
    assert now == pytest.approx(min(h for h in held if math.isfinite(h)), rel=1e-5)
    assert now <= held[0] * (1 + 1e-5)


def test_the_strength_is_the_one_that_brings_held_out_logits_nearest(pictures):
    looked_at = Pictures(**{**vars(pictures), "held": pictures.train})
    usual = make_fit(looked_at, steps=40, check_every=10)
    assert usual.run().strength == 1.0
    fit = make_fit(looked_at, steps=40, check_every=10, scale=True)
    outcome = fit.run()
    assert fit.strength == outcome.strength
    for whole, parameter in zip(fit.best_state.items(), fit.parameters.values(), strict=True):
        is_scaled = any(parameter is p for p in fit.scaled)
        assert torch.equal(parameter, whole[1] * outcome.strength if is_scaled else whole[1]), whole[0]
    now, found = fit.comparison.logits_distance(looked_at.held), {}
    for strength in (1.0, 0.75, 0.5, 0.25):
        for name, parameter in fit.parameters.items():
            if any(parameter is p for p in fit.scaled):
                parameter.data.copy_(fit.best_state[name] * strength)
        found[strength] = fit.comparison.logits_distance(looked_at.held)
    assert now == min(found.values()) == found[outcome.strength]
    assert len(set(found.values())) == 4
    again = make_fit(looked_at, steps=40, check_every=10, scale=True)
    again.load_state_dict(fit.state_dict())
    assert again.run().strength == outcome.strength
    assert same(state(again), dict(fit.best_state) | state_of_scaled(fit, outcome.strength))


def test_few_held_out_images_choose_between_less_and_much_less(split):
    """Views of one image are one image."""
    few = Pictures(**{**vars(split), "held": split.train})  # three images, which are fitted on too
    outcome = make_fit(few, steps=40, check_every=10, scale=True).run()
    assert outcome.best_step > 0
    assert outcome.strength in (0.75, 0.5)
    views = Pictures(**{**vars(split), "image": np.array([0, 1, 2, 2]), "held": np.arange(8)})
    assert make_fit(views, steps=40, check_every=10, scale=True).run().strength in (0.75, 0.5)


def state_of_scaled(fit, strength):
    names = [name for name, p in fit.parameters.items() if any(p is scaled for scaled in fit.scaled)]
    return {name: fit.best_state[name] * strength for name in names}


def test_a_loss_that_is_not_finite_ends_it(pictures):
    fit = make_fit(pictures, check_every=2)
    usual = fit.loss

    def loss(*args, **options):
        return usual(*args, **options) * (math.nan if fit.step == 7 and torch.is_grad_enabled() else 1)

    fit.loss = loss
    with pytest.warns(UserWarning, match="the loss was nan at step 8; the best state before, of step"):
        outcome = fit.run()
    assert outcome.stopped == "the loss was nan at step 8"
    assert outcome.curve[-1]["step"] == 6
    assert all(torch.isfinite(p).all() for p in fit.parameters.values())
    assert same(state(fit), fit.best_state)


def test_parameters_that_are_not_finite_end_it_at_once(pictures):
    fit = make_fit(pictures)
    with torch.no_grad():
        next(iter(fit.parameters.values())).fill_(math.nan)
    with pytest.warns(UserWarning, match="the loss was nan at step 1"):
        outcome = fit.run()
    assert (outcome.stopped, outcome.best_step, len(outcome.curve)) == ("the loss was nan at step 1", 0, 1)


def test_a_host_that_is_not_finite_is_refused(pictures):
    model = host()
    model.fc.bias.fill_(math.nan)
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    with pytest.raises(ValueError, match="the host's own logits are not finite"):
        make_fit(pictures, model)
    assert sum(len(module._forward_hooks) for module in model.modules()) == hooks + 1  # the prior's


def test_the_teacher_sees_every_picture_once(split):
    """Every clean view once, every degraded picture once for its drift and, with a front, once for its features."""
    for front, degraded in ((False, 8), (True, 8 + 6)):  # those held out are not near
        seen = []
        make_fit(split, front=front, seen=seen).run()
        assert sum(seen) == 4 + degraded


def test_without_memory_for_features_the_result_is_the_same(pictures, monkeypatch):
    usual = make_fit(pictures, front=True, near=1.0)
    expected = usual.run()
    monkeypatch.setattr(comparison, "_CACHE", 0)
    seen = []
    fit = make_fit(pictures, front=True, near=1.0, seen=seen)
    assert fit.run().curve == expected.curve
    assert same(state(fit), state(usual))
    assert sum(seen) > 100
    assert not fit.comparison._clean


@pytest.mark.parametrize("front", [True, False])
def test_the_near_part_runs_the_host_no_further_than_it_must(pictures, front):
    fit = make_fit(pictures, front=front, near=0.5, steps=2, check_every=9)
    called = []
    fit.comparison.model.conv1[0].register_forward_hook(lambda *_: called.append("stem"))
    fit.comparison.model.layer4.register_forward_hook(lambda *_: called.append("layer4"))
    fit._one_step()
    assert called == ([] if front else ["stem"])
    fit.step = 1
    called.clear()
    fit._one_step()
    assert called == ["stem", "layer4"]


def test_features_are_those_that_the_module_returned(pictures):
    """Also where what comes after works in place."""

    class Inplace(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 3, stride=2, padding=1)
            self.fc = nn.Linear(8, 3)

        def forward(self, x):
            return self.fc(self.second(self.first(x).relu_()).relu_().mean((2, 3)))

    model = Inplace().eval()
    images = normalize(torch.from_numpy(pictures.clean))
    watch = Watch(model, ["first", "second"])
    whole, part = dict(watch.run(model, images)), dict(watch.run(model, images, "first"))
    assert list(part) == ["first"]
    assert torch.equal(whole["first"], part["first"])
    assert torch.equal(whole["first"], model.first(images))
    assert float(whole["first"].detach().min()) < 0
    assert set(whole) == {"first", "second", "logits"}
    watch.close()
    watch.features = {}
    assert not model.first._forward_hooks
    model(images)
    assert not watch.features


def test_hooks_are_taken_off(pictures):
    fit = make_fit(pictures)
    fit.close()
    assert all(not m._forward_hooks for m in fit.comparison.teacher.modules())
    assert sum(len(m._forward_hooks) for m in fit.comparison.model.modules()) == 1  # the prior's


def test_there_must_be_something_to_compare(pictures):
    class NoLogits(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = host()

        def forward(self, x):
            return self.body.forward_features(x)

    torch.manual_seed(0)
    with pytest.raises(ValueError, match="there is nothing to compare"):
        make_fit(pictures, NoLogits().eval(), deep=None, near=0.0, site_weight=0.0)
    outcome = make_fit(pictures, NoLogits().eval(), deep=None).run()
    assert outcome.curve[-1]["held_out"] < outcome.curve[0]["held_out"]
    with pytest.raises(ValueError, match="label_weight needs a model that returns logits"):
        make_fit(pictures, NoLogits().eval(), label_weight=1.0)


def test_labels(pictures):
    by_labels = make_fit(pictures, label_weight=1.0)
    plain = make_fit(pictures)
    with torch.no_grad():
        extra = by_labels.loss(pictures.train, near=False) - plain.loss(pictures.train, near=False)
        images = normalize(torch.from_numpy(pictures.degraded[pictures.train]))
        expected = nn.functional.cross_entropy(
            plain.comparison.model(images), torch.from_numpy(pictures.view[pictures.train])
        )
    assert float(extra) == pytest.approx(float(expected), rel=1e-4)
    for wrong in (np.arange(4) + 2, np.arange(4) - 1):
        beyond = Pictures(**{**vars(pictures), "labels": wrong})
        with pytest.raises(ValueError, match="labels must be from 0 to 4"):
            make_fit(beyond, label_weight=1.0)


def test_pairs_that_do_not_differ(pictures):
    equal = Pictures(**{**vars(pictures), "degraded": pictures.clean[pictures.view]})
    outcome = make_fit(equal).run()
    assert 0 <= outcome.curve[0]["held_out"] < 0.05
    assert outcome.stopped is None


def test_one_picture_more_than_a_batch_and_one_less(pictures):
    for size in (5, 6, 7, 64):
        fit = make_fit(pictures, batch_size=size, steps=2, near=0.0)
        assert math.isfinite(fit.run().curve[-1]["held_out"])


@pytest.mark.parametrize("front", [True, False])
@pytest.mark.parametrize("step", [0, 9])
def test_shares_add_up_to_the_whole(pictures, front, step):
    """The gradients of shares, averaged, are those of one process."""
    options = {"front": front, "batch_size": 5, "near_batch": 5, "near_crop": 16, "logits_weight": 0.0}

    class Apart(Processes):
        average = average_gradients = lambda self, what: what

    def gradients(rank, world_size):
        fit = make_fit(pictures, processes=Apart(rank, world_size), **options)
        fit.step = step
        fit.optimizer.step = lambda *_: None
        fit.recipe.clip = 1e9
        fit._one_step()
        return {name: p.grad for name, p in fit.parameters.items()}

    whole, first, second = gradients(0, 1), gradients(0, 2), gradients(1, 2)
    assert any(gradient is not None for gradient in whole.values())
    for name, gradient in whole.items():
        if gradient is None:  # of a later site, in the near part
            assert (first[name], second[name]) == (None, None)
            continue
        mean = (first[name] + second[name]) / 2
        assert torch.allclose(mean, gradient, atol=1e-6 * float(gradient.abs().max()) + 1e-7, rtol=1e-3), name


@pytest.mark.parametrize("layout", ["nchw", "nhwc", "tokens"])
def test_channel_statistics(layout):
    class Features(nn.Module):
        def __init__(self):
            super().__init__()
            self.place = nn.Identity()

        def forward(self, x):
            x = {"nchw": x, "nhwc": x.permute(0, 2, 3, 1), "tokens": x.flatten(2).transpose(1, 2)}[layout]
            return self.place(x)

    numbers = np.random.default_rng(0).integers(0, 256, (11, 4, 6, 3), dtype=np.uint8)
    model = Features()
    axis, prefix = (1, 0) if layout == "nchw" else (-1, 2 if layout == "tokens" else 0)
    found = channel_statistics(
        model, {"place": axis}, {"place": prefix}, lambda x: x.permute(0, 3, 1, 2).float(), numbers, torch.device("cpu")
    )["place"]
    rows = numbers.reshape(11, 24, 3)[:, prefix:].reshape(-1, 3).astype(float)
    assert torch.allclose(found[0], torch.from_numpy(rows.mean(0)).float(), rtol=1e-5)
    assert torch.allclose(found[1], torch.from_numpy(rows.std(0)).float(), rtol=1e-5)
    assert not model.place._forward_hooks


def test_the_rate_warms_up_and_falls_in_both_parts(pictures):
    fit = make_fit(pictures, steps=100, near=0.4, lr=1.0)
    rates = [fit._rate(step) for step in range(100)]
    assert max(rates[:40]) == pytest.approx(1.0)
    assert rates[0] < rates[2] < rates[3]
    assert rates[39] < 0.05
    assert rates[40] < rates[45]
    assert max(rates[40:]) <= 1.0
    assert rates[-1] < 0.05
    assert all(rate > 0 for rate in rates)
