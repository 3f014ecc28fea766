"""The driver in one call: the numbers and the statistics of the driver operation by operation."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from quac_plugins.core import native
from quac_plugins.core.activations import (
    ACTIVATIONS,
    QACON,
    MetaACON,
    driver_autograd,
    driver_cpu,
    driver_kernel,
    driver_parts,
)
from quac_plugins.core.activations.driver import NORMS, DrivenActivation
from quac_plugins.core.activations.kernels import MIN_DRIVEN

pytestmark = pytest.mark.filterwarnings("error:fused activations could not be compiled")

DRIVEN = sorted(name for name, kind in ACTIVATIONS.items() if issubclass(kind, DrivenActivation))


@pytest.fixture
def found(monkeypatch):
    """The parts of each call; None of a driver that is not plain."""
    results, real = [], driver_cpu.parts_of
    monkeypatch.setattr(driver_cpu, "parts_of", lambda *args: results.append(real(*args)) or results[-1])
    return results


def both(monkeypatch, site, *inputs):
    """By the kernels, and operation by operation; with the states that they leave."""
    outputs = []
    for choice in ("fused", "reference"):
        monkeypatch.setenv("QUAC_KERNELS", choice)
        own = copy.deepcopy(site)
        with torch.no_grad():
            outputs.append((own(*inputs), own.state_dict()))
    return outputs


def site_of(name, norm="batch", init="paper", **options):
    torch.manual_seed(0)
    host = nn.ReLU() if init == "preserve" else None
    site = ACTIVATIONS[name](19, norm=norm, init=init, host=host, **options)
    for parameter in site.parameters():
        nn.init.normal_(parameter, std=0.3)
    return site


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", DRIVEN)
def test_the_numbers_are_those_of_the_driver(name, norm, training, found, monkeypatch):
    for init, dtype, layout in (
        ("paper", torch.float32, "rows"), ("preserve", torch.float64, "last"), ("paper", torch.float64, "tokens"),
    ):  # fmt: skip
        site = site_of(name, norm, init, channel_dim=-1 if layout == "tokens" else 1).to(dtype).train(training)
        x = torch.randn(5, 19, 33, 31, dtype=dtype)
        x = x.flatten(2).transpose(1, 2) if layout == "tokens" else x
        x = x.contiguous(memory_format=torch.channels_last) if layout == "last" else x
        inputs = (x, torch.randn(5, 36)) if site.needs_quality else (x,)
        (y, state), (expected, expected_state) = both(monkeypatch, site, *inputs)
        tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(y, expected, **tolerance)
        torch.testing.assert_close(state, expected_state, **tolerance)
    assert len(found) == 3
    assert all(c is not None for c in found)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_averaged_in_float32(dtype, last, found, monkeypatch):
    site = site_of("qacon", "layer")
    x = (torch.randn(2, 19, 120, 110) + 8).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    (y, _), (expected, _) = both(monkeypatch, site, x, torch.randn(2, 36))
    assert y.dtype == dtype
    assert found[0] is not None
    torch.testing.assert_close(y, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-2)


@pytest.mark.parametrize("last", [False, True])
def test_a_large_map_is_averaged_without_loss(last):
    x = torch.rand(1, 3, 1500, 1400) + 1000
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    site = MetaACON(3, norm="none")
    for parameter in site.parameters():
        nn.init.zeros_(parameter)
    nn.init.constant_(site.fc1.weight, 1 / 3)
    nn.init.constant_(site.fc2.weight[:, 0], 1e-3)
    nn.init.ones_(site.p1)
    sizes = (1, 3, 1500 * 1400) if not last else (1, 1500 * 1400, 3)
    drive = driver_kernel.driver("acon", 2, 1, x.dtype)
    parts = driver_parts.parts_of(site, None, 1, x.dtype)
    means = -driver_autograd.coefficients(drive, parts, x, sizes, not last, 1)[2]
    expected = torch.sigmoid(x.double().mean() * 1e-3)
    torch.testing.assert_close(means.double(), expected.expand(1, 3), rtol=1e-6, atol=0)


@pytest.mark.parametrize("last", [False, True])
def test_threads_do_not_change_it(last, monkeypatch):
    monkeypatch.setenv("QUAC_KERNELS", "fused")
    x = torch.randn(2, 40, 130, 130)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    site, q, threads, outputs = QACON(40, norm="layer"), torch.randn(2, 36), torch.get_num_threads(), []
    for count in (1, 3):
        torch.set_num_threads(count)
        with torch.no_grad():
            outputs.append(site(x, q))
    torch.set_num_threads(threads)
    assert torch.equal(*outputs)


@pytest.mark.usefixtures("found")
def test_preserve_is_the_host_to_the_bit(monkeypatch, found, photographs):
    monkeypatch.setenv("QUAC_KERNELS", "fused")
    x = photographs(3, 48) * 4 - 2
    for name in DRIVEN:
        site = ACTIVATIONS[name](3, init="preserve", host=nn.ReLU())
        with torch.no_grad():
            assert torch.equal(site(x, torch.randn(3, 36)) if site.needs_quality else site(x), x.relu()), name
    assert len(found) == len(DRIVEN)
    assert all(c is not None for c in found)


class Shifted(QACON):
    """A subclass that drives its numbers in a way of its own."""

    def head(self, h):
        return super().head(h) + 1


def hooked(site):
    site.fc3.register_forward_hook(lambda module, inputs, output: output * 2)


def replaced_forward(site):
    plain = site.fc2.forward
    site.fc2.forward = lambda z: plain(z) * 2


def without_statistics(site):
    site.bn1 = nn.BatchNorm2d(site.bn1.num_features, track_running_stats=False)


def averaging(site):
    site.bn2.momentum = None


def parametrized(site):
    nn.utils.parametrize.register_parametrization(site.fc1, "weight", nn.Identity())


@pytest.mark.parametrize(
    "change", [hooked, replaced_forward, without_statistics, averaging, parametrized, lambda site: site.bfloat16()]
)
def test_what_is_not_plain_is_driven_layer_by_layer(change, found, monkeypatch):
    site = site_of("qacon")
    change(site)
    (y, state), (expected, expected_state) = both(monkeypatch, site, torch.randn(4, 19, 8, 8), torch.randn(4, 36))
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state, expected_state)
    assert found == [None]


def test_a_subclass_keeps_its_own_head(found, monkeypatch):
    torch.manual_seed(0)
    (y, _), (expected, _) = both(monkeypatch, Shifted(8), torch.randn(4, 8, 8, 8), torch.randn(4, 36))
    torch.testing.assert_close(y, expected)
    assert not found


def test_what_is_put_into_the_class_later_is_seen(found, monkeypatch):
    head = DrivenActivation.head
    monkeypatch.setattr(DrivenActivation, "head", lambda self, h: head(self, h) + 1)
    (y, _), (expected, _) = both(monkeypatch, site_of("qacon"), torch.randn(4, 19, 8, 8), torch.randn(4, 36))
    torch.testing.assert_close(y, expected)
    assert not found


def test_hooks_of_all_modules_see_the_layers(monkeypatch):
    monkeypatch.setenv("QUAC_KERNELS", "fused")
    site, seen = site_of("qacon"), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: seen.append(module))
    for gradients in (False, True):
        seen.clear()
        with torch.set_grad_enabled(gradients):
            site(torch.randn(4, 19, 8, 8), torch.randn(4, 36))
        assert seen == [site.fc1, site.bn1, site.fc2, site.bn2, site.fc3, site]
    handle.remove()


@pytest.mark.parametrize("groups", [0, 3])
def test_groups_that_do_not_divide_are_torchs_error(groups, monkeypatch):
    monkeypatch.setenv("QUAC_KERNELS", "fused")
    site = site_of("qacon", "group")
    site.bn2.num_groups = groups
    with torch.no_grad(), pytest.raises((RuntimeError, ZeroDivisionError)):
        site(torch.randn(4, 19, 8, 8), torch.randn(4, 36))


def test_in_transforms_the_driver_is_as_ever(found, monkeypatch):
    monkeypatch.setenv("QUAC_KERNELS", "fused")
    site, x, q = site_of("qacon", "layer"), torch.randn(4, 19, 8, 8), torch.randn(4, 36)
    with torch.no_grad():
        stacked = {name: torch.stack([p, 2 * p]) for name, p in site.named_parameters()}
        together = torch.vmap(lambda p: torch.func.functional_call(site, p, (x, q)))(stacked)
        for i in range(2):
            own = torch.func.functional_call(site, {name: p[i] for name, p in stacked.items()}, (x, q))
            torch.testing.assert_close(together[i], own, rtol=1e-4, atol=1e-4)
        assert len(found) == 2


def test_batch_norm_refuses_one_image(monkeypatch):
    monkeypatch.setenv("QUAC_KERNELS", "fused")
    with torch.no_grad(), pytest.raises(ValueError, match="batch of one"):
        QACON(8)(torch.randn(1, 8, 4, 4), torch.randn(1, 36))


def test_autograd_knows_that_statistics_were_written(monkeypatch):
    site, x, q = QACON(8).eval(), torch.randn(2, 8, 4, 4), torch.randn(2, 36)
    loss = site(x, q).sum()
    monkeypatch.setenv("QUAC_KERNELS", "fused")
    with torch.no_grad():
        site.train()(x, q)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_it_is_used_on_small_maps_too(found, monkeypatch):
    monkeypatch.delenv("QUAC_KERNELS", raising=False)
    site, x, q = QACON(16), torch.randn(2, 16, 32, 16), torch.randn(2, 36)
    assert x.numel() == MIN_DRIVEN
    with torch.no_grad():
        site(x, q)
        assert len(found) == 1
        site(x[:, :, 1:], q)
    assert site(x, q).requires_grad
    site(x[:, :, 1:], q)
    assert len(found) == 2


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_host_that_is_not_inside_is_added_to_without_another_copy(dtype, last, found, monkeypatch):
    torch.manual_seed(0)
    site, q = QACON(8, norm="layer", init="preserve", host=nn.GELU()), torch.randn(2, 36)
    x = torch.randn(2, 8, 67, 61, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    monkeypatch.setenv("QUAC_KERNELS", "fused")
    with torch.no_grad():
        assert torch.equal(site(x, q), nn.functional.gelu(x))
        with torch.profiler.profile(profile_memory=True) as profile:
            site(x, q)
    large = [event.name for event in profile.events() if event.cpu_memory_usage >= x.nbytes]
    assert large == ["aten::gelu"]
    nn.init.normal_(site.fc3.weight)
    (y, _), (expected, _) = both(monkeypatch, site, x, q)
    torch.testing.assert_close(y, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-5 if dtype.itemsize == 4 else 0.1)


class Held(nn.Module):
    """An activation that keeps what it returned, or returns what it was given."""

    def __init__(self, itself):
        super().__init__()
        self.itself, self.kept = itself, None

    def forward(self, x):
        self.kept = x if self.itself else nn.functional.gelu(x)
        return self.kept


@pytest.mark.parametrize("itself", [False, True])
def test_what_others_hold_is_not_written_over(itself, found, monkeypatch):
    site, x, q = QACON(8, norm="layer", init="preserve", host=Held(itself)), torch.randn(2, 8, 9, 9), torch.randn(2, 36)
    nn.init.normal_(site.fc3.weight)
    before, seen = x.clone(), []
    site.host.register_forward_hook(lambda module, inputs, output: seen.append(output))
    monkeypatch.setenv("QUAC_KERNELS", "fused")
    with torch.no_grad():
        y = site(x, q)
    assert found[0] is not None
    assert torch.equal(x, before)
    host = before if itself else nn.functional.gelu(before)
    assert torch.equal(seen[0], host)
    assert not torch.equal(y, host)


def test_compiled_without_gradients_it_is_one_graph(found):
    site, x, q = site_of("qacon", "layer"), torch.randn(2, 19, 64, 64), torch.randn(2, 36)
    with torch.no_grad():
        y = torch.compile(site, fullgraph=True, backend="eager")(x, q)
        assert not found
        torch.testing.assert_close(y, site(x, q), rtol=1e-4, atol=1e-4)
    assert len(found) == 1


@pytest.mark.parametrize("layer", ["fc1", "fc2", "fc3"])
def test_layers_of_another_size_are_refused_and_no_crash(layer, found, monkeypatch):
    monkeypatch.setenv("QUAC_KERNELS", "fused")
    site = QACON(8, norm="layer")
    setattr(site, layer, nn.Conv2d(3, 5, 1))
    with torch.no_grad(), pytest.raises(RuntimeError, match="shape"):
        site(torch.randn(2, 8, 4, 4), torch.randn(2, 36))
    assert found == [None]


@pytest.mark.parametrize("shape", [(6, 19), (6, 19, 11), (6, 19, 3, 4, 5), (0, 19, 4, 4), (6, 19, 0, 4)])
@pytest.mark.parametrize("how", ["interleave", "tile"])
def test_other_shapes_and_expanded_quality(shape, how, monkeypatch):
    site = site_of("qacon", "group", expand_q=how)
    x, q = torch.randn(shape), torch.randn(3, 36, 1, 1, dtype=torch.float64)
    q = q if len(x) else q[:0]
    (y, _), (expected, _) = both(monkeypatch, site, x, q)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4, equal_nan=True)
    (y, _), (expected, _) = both(
        monkeypatch, site, torch.randn(shape).transpose(0, -1).contiguous().transpose(0, -1), q
    )
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_in_inference_mode_and_under_autocast(monkeypatch):
    with torch.inference_mode():
        site = QACON(8).train()
    x, q = torch.randn(4, 8, 16, 16), torch.randn(4, 36)
    for choice in ("fused", "reference"):
        monkeypatch.setenv("QUAC_KERNELS", choice)
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            y = site(x, q)
    assert y.dtype == x.dtype
    assert site.bn1.num_batches_tracked == 2


@pytest.mark.parametrize("keep", [torch.Tensor.detach, torch.Tensor.numpy, lambda t: t[:, :2]])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_views_that_others_hold_are_not_written_over(mode, keep, found, monkeypatch):
    site, x, q = QACON(8, norm="layer", init="preserve", host=nn.SiLU()), torch.randn(2, 8, 9, 9), torch.randn(2, 36)
    nn.init.normal_(site.fc3.weight)
    seen = []
    site.host.register_forward_hook(lambda module, inputs, output: seen.append(keep(output)))
    monkeypatch.setenv("QUAC_KERNELS", "fused")
    with mode():
        site(x, q)
        expected = keep(nn.functional.silu(x))
    assert found[0] is not None
    assert (torch.as_tensor(seen[0]) == torch.as_tensor(expected)).all()


def test_another_default_device_does_not_matter(monkeypatch):
    site, x, q = site_of("qacon", "layer"), torch.randn(2, 19, 8, 8), torch.randn(2, 36)
    monkeypatch.setenv("QUAC_KERNELS", "fused")
    with torch.no_grad():
        expected = site(x, q)
        with torch.device("meta"):
            driver_parts._settings.cache_clear()
            assert torch.equal(site(x, q), expected)


def test_what_a_host_raises_is_raised_and_the_kernels_stay(monkeypatch):
    class Stop(Exception):
        pass

    def stop(module, inputs, output):
        raise Stop

    site = QACON(8, init="preserve", host=nn.GELU())
    site.host.register_forward_hook(stop)
    monkeypatch.setenv("QUAC_KERNELS", "fused")
    with torch.no_grad(), pytest.raises(Stop):
        site(torch.randn(2, 8, 4, 4), torch.randn(2, 36))
    assert site.bn1.num_batches_tracked == 1
    assert "cpu" not in native.broken


def test_pruned_slopes_and_heads_of_an_instance(found, monkeypatch):
    x, q = torch.randn(4, 19, 8, 8), torch.randn(4, 36)
    pruned, changed = site_of("qacon", "layer"), site_of("qacon", "layer")
    prune.identity(pruned, "p1")
    head = changed.head
    changed.head = lambda h: head(h) + 1
    for site in (pruned, changed):
        outputs = []
        for choice in ("fused", "reference"):
            monkeypatch.setenv("QUAC_KERNELS", choice)
            with torch.no_grad():
                outputs.append(site(x, q))
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
    assert found == [None]
    assert "cpu" not in native.broken


def test_signs_and_tangents_are_kept(monkeypatch):
    site, x, q = site_of("qacon", "layer"), torch.randn(2, 19, 8, 8), torch.randn(2, 36)
    for inputs in ((torch._neg_view(x), q), (x, torch._neg_view(q))):
        (y, _), (expected, _) = both(monkeypatch, site, *inputs)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    tangents = []
    for choice in ("fused", "reference"):
        monkeypatch.setenv("QUAC_KERNELS", choice)
        with torch.autograd.forward_ad.dual_level(), torch.no_grad():
            y = site(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)), q)
            tangents.append(torch.autograd.forward_ad.unpack_dual(y).tangent)
    torch.testing.assert_close(*tangents)
    assert tangents[0].abs().sum() > 0


def test_a_head_that_gives_too_few_numbers_is_an_error(monkeypatch):
    monkeypatch.setenv("QUAC_KERNELS", "fused")
    site = MetaACON(8, norm="layer")
    site.numbers = 3
    with torch.no_grad(), pytest.raises((RuntimeError, ValueError)):
        site(torch.randn(2, 8, 4, 4))
