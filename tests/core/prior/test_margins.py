"""Margins: each image's features are moved by what its degradations ask for, at every norm, and clean ones are not."""

import contextlib
import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import timm
import torch
from skimage import data
from small_hosts import small_host
from torch import nn

import quac_plugins as quac
from quac_plugins.core.prior.margins import SEVERITIES, Margin, spread
from quac_plugins.core.prior.matching import match
from quac_plugins.core.prior.sites import PriorSite
from quac_plugins.core.quality.degradation import KINDS
from quac_plugins.degradations import corrupt

EXPERTS = ["fog", "contrast", "gaussian_noise"]
HOSTS = ["test_resnet", "test_efficientnet", "test_vit", "test_convnext"]


def margins_of(model):
    return [module for module in model.modules() if isinstance(module, Margin)]


def host(name="test_resnet"):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=10).eval()


def filled(model, experts=EXPERTS, example=None):
    """Margins that all do something."""
    quac.inject(model, quac.PriorConfig(fdm="margin", experts=list(experts)), example).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for margin in margins_of(model):
            margin.table.copy_(0.2 * torch.randn(margin.table.shape, generator=generator))
    return model


def told(*kinds, severity=3.0):
    """q of images that surely went through these."""
    q = torch.zeros(len(kinds), len(KINDS) + 1)
    for row, kind in enumerate(kinds):
        q[row, KINDS.index(kind)], q[row, -1] = 1, severity if kind != "clean" else 0
    return q


@pytest.fixture(scope="module")
def real():
    pictures = [p[:160, :160] for p in (data.astronaut(), data.coffee(), data.chelsea(), data.rocket())]
    return np.stack(pictures)


def images_of(pictures):
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255


@pytest.mark.parametrize("name", HOSTS)
def test_fresh_margins_change_no_bit_and_clean_pictures_none_ever(name, real):
    model, images = host(name), images_of(real)
    with torch.no_grad():
        expected = model(images)
        quac.inject(model, quac.PriorConfig(fdm="margin", experts=EXPERTS)).eval()
        assert torch.equal(model(images), expected)
        quac.remove(model)
        filled(model)
        with quac.use_q(model, told(*["clean"] * 4)):
            torch.testing.assert_close(model(images), expected, atol=1e-4, rtol=1e-4)
        with quac.use_q(model, told("fog", *["clean"] * 3)):
            y = model(images)
    assert not torch.allclose(y[:1], expected[:1], atol=1e-3)
    torch.testing.assert_close(y[1:], expected[1:], atol=1e-4, rtol=1e-4)


def test_they_go_behind_every_norm_and_before_its_activation():
    model = filled(host("test_efficientnet"))
    norms = [name for name, m in model.named_modules() if type(m).__name__ == "BatchNormAct2d"]
    assert [site.name for site in quac.injection_of(model).prior.sites] == [f"{name}.drop" for name in norms]
    folded = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.AdaptiveAvgPool2d(1))
    quac.inject(folded, quac.PriorConfig(fdm="margin"), torch.empty(1, 3, 32, 32))
    assert [site.name for site in quac.injection_of(folded).prior.sites] == ["0", "2"]


def test_what_is_between_two_severities_is_interpolated(real):
    model, images = filled(host()), images_of(real)[:1]
    margin = margins_of(model)[0]
    seen = []
    margin.register_forward_hook(lambda module, args, y: seen.append((args[0].clone(), y.clone())))
    mild, strong = SEVERITIES
    with torch.no_grad():
        for severity in (mild, (mild + strong) / 2, strong, 5.0):
            with quac.use_q(model, told("contrast", severity=severity)):
                model(images)
    (x, low), (_, middle), (_, high), (_, beyond) = seen
    row = margin.table[EXPERTS.index("contrast") * 2]
    channels = margin.site.channels
    scale, shift = (part.view(-1, 1, 1) for part in row.split(channels))
    torch.testing.assert_close(low, x * (1 + scale) + shift, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(middle, (low + high) / 2, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(high, beyond)


def test_shares_of_several_degradations_add_up():
    q = told("fog", "contrast").mean(0, keepdim=True)
    mixture = margins_of(filled(host()))[0].shared
    shares = mixture(q)
    torch.testing.assert_close(shares.view(3, 2).sum(1), torch.tensor([0.5, 0.5, 0.0]), atol=1e-4, rtol=0)
    assert spread(torch.tensor([[0.25, 0.75]]), None).tolist() == [[0.25, 0.75]]


@pytest.mark.parametrize("layout", ["nchw", "nhwc", "tokens"])
def test_all_layouts_alike(layout):
    x = torch.randn(2, 8, 5, 6)
    grid = (5, 6) if layout == "tokens" else None
    margin, plain = (Margin(PriorSite("a", 8, lay, 0, g)) for lay, g in ((layout, grid), ("nchw", None)))
    nn.init.normal_(margin.table)
    plain.load_state_dict(margin.state_dict())
    moved = {"nchw": x, "nhwc": x.permute(0, 2, 3, 1), "tokens": x.flatten(2).transpose(1, 2)}[layout]
    y = margin(moved)
    back = {"nchw": y, "nhwc": y.movedim(-1, 1), "tokens": y.transpose(1, 2).unflatten(2, (5, 6)) if grid else y}
    torch.testing.assert_close(back[layout], plain(x))
    torch.testing.assert_close(plain(x.contiguous(memory_format=torch.channels_last)), plain(x))
    with pytest.raises(ValueError, match="the margin after 'a' expects features"):
        margin(moved[..., :-1] if layout != "nchw" else x[:, :-1])


@pytest.mark.parametrize("name", ["convolutions", "tokens"])
def test_graphs_copies_and_files_compute_the_same(name, photographs, tmp_path):
    images = photographs(2, 32)
    model = filled(small_host(name), example=images)
    with torch.no_grad():
        expected = model(images)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            torch.testing.assert_close(other(images), expected)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(images), expected, atol=1e-4, rtol=1e-4)
        exported = torch.export.export(model, (images,), strict=False).module()
        torch.testing.assert_close(exported(images), expected, atol=1e-4, rtol=1e-4)
        quac.save_adapter(model, tmp_path)
        loaded = quac.load_adapter(small_host(name), tmp_path, example=images).eval()
        assert torch.equal(loaded(images), expected)
        assert torch.equal(quac.remove(loaded)(images), small_host(name)(images))


def test_what_others_hold_is_not_written_over(real):
    for name in ("test_resnet", "test_efficientnet"):
        model, images = host(name), images_of(real)[:1]
        first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
        held = []
        first.register_forward_hook(lambda module, args, y, held=held: held.append((y, y.clone())))
        filled(model)
        held.clear()
        with quac.use_q(model, told("fog")):
            expected = model(images)
            with torch.no_grad():
                torch.testing.assert_close(model(images), expected)
        assert all(torch.equal(*pair) for pair in held)


def test_half_precision_and_checkpointing(real):
    model, images = filled(host("test_vit")), images_of(real)[:2]
    with torch.no_grad():
        expected = model(images)
        half = copy.deepcopy(model).bfloat16()(images.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, atol=0.05, rtol=0.1)
    gradients = []
    for checkpointed in (False, True):
        model.set_grad_checkpointing(checkpointed)
        for margin in margins_of(model):
            margin.table.grad = None
        model.train()(images).square().mean().backward()
        gradients.append([margin.table.grad.clone() for margin in margins_of(model)])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)
    assert all(bool(gradient.any()) for gradient in gradients[0])


def test_shares_with_gradients_and_without_are_not_mixed_up(real):
    """One q, given once: what one pass has kept is not what the next needs."""
    model, images, gradients = filled(host()), images_of(real)[:1], []
    gate = margins_of(model)[0].shared.gate
    with torch.no_grad():
        gate.fc2.weight.normal_(std=0.1)
    for first in (None, torch.no_grad, torch.inference_mode):
        with quac.use_q(model, told("fog")):
            if first is not None:
                with first():
                    model(images)
            gate.zero_grad()
            model(images).square().sum().backward()
        gradients.append(gate.fc2.bias.grad.clone())
    assert bool(gradients[0].any())
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0])


def test_a_second_pass_computes_what_the_first_does_and_tables_may_change_between(real):
    """What is made at the first place for all is made as each would; nothing of it outlives a change."""
    model, images = filled(host()), images_of(real)[:2]
    last = margins_of(model)[-1]
    x = torch.rand(2, last.site.channels, 3, 3)
    with torch.no_grad(), quac.use_q(model, told("fog", "contrast")):
        for region in (contextlib.nullcontext(), torch.autocast("cpu", dtype=torch.bfloat16)):
            with region:
                fresh = copy.deepcopy(model)
                with quac.use_q(fresh, told("fog", "contrast")):
                    first = fresh(images)
                    assert torch.equal(fresh(images), first)
                    assert torch.equal(fresh(images), first)
        model(images)
        model(images)
        before = last(x)
        last.table.data.mul_(2)
        assert not torch.equal(last(x), before)
        fresh = copy.deepcopy(model)
        with quac.use_q(fresh, told("fog", "contrast")):
            assert torch.equal(model(images), fresh(images))


def test_a_thread_that_cuts_in_gets_its_own_coefficients(real, monkeypatch):
    """While one makes the coefficients of all places, another begins with another q."""
    model, images = filled(host()), images_of(real)[:2]
    mixture = margins_of(model)[0].shared
    mine, other = told("fog", "fog"), told("contrast", "contrast")
    with torch.no_grad(), quac.use_q(model, mine):
        model(images)
    last, mixed = margins_of(model)[-1], Margin.mixed
    with torch.no_grad():
        wanted = [last.mixed(mixture(q)) for q in (mine, other)]
    cut_in = []

    def interrupted(self, shares):
        if not cut_in:
            cut_in.append(None)
            with ThreadPoolExecutor(1) as pool, torch.no_grad():
                cut_in[0] = pool.submit(torch.no_grad()(mixture), other).result()
        return mixed(self, shares)

    monkeypatch.setattr(Margin, "mixed", interrupted)
    with torch.no_grad():
        found = [mixture.made(last, shares) or last.mixed(shares) for shares in (mixture(mine), cut_in[0])]
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_threads_do_not_see_each_others_shares(real):
    model, images = filled(host()), images_of(real)[:1]
    kinds = [*EXPERTS, "clean"] * 4

    def run(kind):
        with torch.no_grad(), quac.use_q(model, told(kind)):
            return model(images)

    expected = {kind: run(kind) for kind in dict.fromkeys(kinds)}
    with ThreadPoolExecutor(4) as pool:
        for kind, y in zip(kinds, pool.map(run, kinds), strict=True):
            assert torch.equal(y, expected[kind])


@pytest.mark.parametrize("name", HOSTS)
def test_one_degradation_is_folded_into_the_host(name, real):
    model, images = filled(host(name)), images_of(real)
    keys = list(host(name).state_dict())
    with torch.no_grad():
        with quac.use_q(model, told(*["fog"] * 4, severity=4)):
            expected = model(images)
        with pytest.raises(ValueError, match="there are: fog, contrast, gaussian_noise"):
            quac.fuse(model, "snow")
        with pytest.raises(ValueError, match="name a degradation"):
            quac.fuse(model)
        quac.fuse(model, "fog", severity=4)
        torch.testing.assert_close(model(images), expected, atol=1e-4, rtol=1e-4)
    assert list(model.state_dict()) == keys
    assert quac.injection_of(model) is None


def test_what_cannot_be_folded_is_left_alone():
    tied = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)).eval()
    tied[3].weight, tied[3].bias = tied[1].weight, tied[1].bias
    for model, site, message in (
        (host().train(), "norms", "BatchNorm2d is training"),
        (tied, "norms", "BatchNorm2d shares its weight with another layer"),
        (host("test_nfnet"), "norms", "ScaledStdConv2d is neither a norm nor a convolution"),
        (host("test_efficientnet"), "bn1", "BatchNormAct2d activates after its norm"),
    ):
        quac.inject(model, quac.PriorConfig(fdm="margin", experts=EXPERTS, site=site), torch.empty(1, 3, 64, 64))
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(ValueError, match=f"cannot be folded: {message}"):
            quac.fuse(model, "fog")
        assert margins_of(model)
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="severity must be from 0 to 5"):
        quac.fuse(filled(host()), "fog", severity=float("nan"))


# -- statistics


@pytest.mark.parametrize("kind", ["contrast", "fog"])
def test_matched_features_are_distributed_as_the_clean_ones(kind, real):
    """Of the first norm, behind a linear layer; a drift that all pictures share is undone nearly whole."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
    ).eval()
    plain = copy.deepcopy(model)
    quac.inject(model, quac.PriorConfig(fdm="margin"), torch.empty(1, 3, 160, 160))
    degraded = np.stack([corrupt(picture, kind, 4) for picture in real])
    match(model, margins_of(model), real, [(0, real)], images_of)
    for margin in margins_of(model):
        assert float(margin.table.abs().max()) < 1e-3  # what has not drifted is not moved

    def drift():
        with torch.no_grad():
            theirs, ours = model[1](model[0](images_of(degraded))), plain[1](plain[0](images_of(real)))
        means, deviations = ([y.mean((0, 2, 3)) for y in (theirs, ours)], [y.std((0, 2, 3)) for y in (theirs, ours)])
        return float((means[0] - means[1]).abs().mean() + (deviations[0] - deviations[1]).abs().mean())

    before = drift()
    match(model, margins_of(model), real, [(0, degraded)], images_of)
    assert drift() < 0.25 * before


def test_flat_pictures_give_finite_margins(real):
    model = host()
    quac.inject(model, quac.PriorConfig(fdm="margin")).eval()
    flat = np.full_like(real, 7)
    for clean, degraded in ((real, flat), (flat, real), (flat, flat), (real[:1], flat[:1])):
        match(model, margins_of(model), clean, [(0, degraded)], images_of)
        assert all(bool(torch.isfinite(margin.table).all()) for margin in margins_of(model))


def test_an_adapter_in_half_precision(real, tmp_path):
    model, images = filled(host()), images_of(real)[:2]
    quac.save_adapter(model, tmp_path, dtype=torch.float16)
    loaded = quac.load_adapter(host(), tmp_path).eval()
    assert {margin.table.dtype for margin in margins_of(loaded)} == {torch.float32}
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), model(images), atol=1e-2, rtol=1e-2)
    with pytest.raises(ValueError, match="floating point dtype"):
        quac.save_adapter(model, tmp_path, dtype=torch.int8)
    whole = quac.save_adapter(model, tmp_path / "whole")
    sizes = [(folder / "adapter_model.safetensors").stat().st_size for folder in (tmp_path, whole)]
    assert sizes[0] < 0.6 * sizes[1]


class KeepingNorm(nn.BatchNorm2d):
    """A host's own norm, which goes on to use what it has returned."""

    def forward(self, x):
        self.kept = super().forward(x)
        return self.kept


@pytest.mark.parametrize("who", ["first hook", "pre-hook", "every module's hook"])
def test_what_a_hook_has_seen_is_not_written_over(who, real):
    model = filled(host("test_efficientnet"))
    norm, seen = model.blocks[0][0].bn1.drop, []
    if who == "first hook":
        handle = norm.register_forward_hook(lambda module, args, y: seen.append((y, y.clone())), prepend=True)
    elif who == "pre-hook":
        handle = norm.register_forward_pre_hook(lambda module, args: seen.append((args[0], args[0].clone())))
    else:
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, args, y: seen.append((y, y.clone())) if module is norm else None
        )
    with torch.no_grad(), quac.use_q(model, told("fog", "contrast")):
        model(images_of(real)[:2, :, :64, :64])
    handle.remove()
    (kept, as_seen), *_ = seen
    assert torch.equal(kept, as_seen)


def test_what_a_host_keeps_is_not_written_over(real):
    model = host()
    model.layer2[0].bn1 = KeepingNorm(model.layer2[0].bn1.num_features).eval()
    model = filled(model)
    images, q = images_of(real[:2, :96, :96]), told("fog", "contrast")
    with torch.no_grad(), quac.use_q(model, q):
        without_gradients = model(images)
        kept = model.layer2[0].bn1.kept.clone()
    with quac.use_q(model, q):
        torch.testing.assert_close(without_gradients, model(images).detach())  # whose host keeps all
    torch.testing.assert_close(kept, model.layer2[0].bn1.kept.detach())
