"""The driver's gradients in one call: those of the driver operation by operation."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from quac_plugins.core.activations import ACTIVATIONS, QACON, driver_autograd
from quac_plugins.core.activations.driver import NORMS, DrivenActivation

pytestmark = pytest.mark.filterwarnings("error:fused activations could not be compiled")

DRIVEN = sorted(name for name, kind in ACTIVATIONS.items() if issubclass(kind, DrivenActivation))


@pytest.fixture
def once(monkeypatch):
    """How often the gradients were computed in C++."""
    calls, real = [], driver_autograd._once
    monkeypatch.setattr(driver_autograd, "_once", lambda *args: calls.append(1) or real(*args))
    return calls


@pytest.fixture(autouse=True)
def _fused(monkeypatch):
    monkeypatch.setenv("QUAC_KERNELS", "fused")


def site_of(name="qacon", channels=19, **options):
    torch.manual_seed(0)
    site = ACTIVATIONS[name](channels, **options)
    for parameter in site.parameters():
        nn.init.normal_(parameter, std=0.3)
    return site


def results(site, x, q, grad):
    """y, every gradient, and the state that is left."""
    own, x, q = copy.deepcopy(site), x.clone().requires_grad_(), q.clone().requires_grad_(site.needs_quality)
    y = own(x, q) if site.needs_quality else own(x)
    y.backward(grad)
    gradients = {name: p.grad for name, p in own.named_parameters()}
    return {"y": y, "x": x.grad, "q": q.grad, **gradients, **dict(own.named_buffers())}


def check(monkeypatch, site, x, q, **tolerance):
    grad, found = torch.randn_like(x), []
    for choice in ("fused", "reference"):
        monkeypatch.setenv("QUAC_KERNELS", choice)
        found.append(results(site, x, q, grad))
    torch.testing.assert_close(*found, **tolerance)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", DRIVEN)
def test_the_gradients_are_those_of_the_driver(name, norm, training, once, monkeypatch):
    ways = (("paper", None, "rows"), ("preserve", nn.ReLU(), "last"), ("preserve", nn.GELU(), "tokens"))
    for init, host, layout in ways:
        site = site_of(name, norm=norm, init=init, host=host, channel_dim=-1 if layout == "tokens" else 1)
        x, q = torch.randn(6, 19, 13, 11, dtype=torch.float64), torch.randn(6, 36, dtype=torch.float64)
        x = x.flatten(2).transpose(1, 2) if layout == "tokens" else x
        x = x.contiguous(memory_format=torch.channels_last) if layout == "last" else x
        check(monkeypatch, site.double().train(training), x, q, rtol=1e-6, atol=1e-8)
        # in float the bias before a batch norm, whose gradient is zero, has only rounding
        check(monkeypatch, site.float().train(training), x.float(), q.float(), rtol=1e-3, atol=1e-2)
    assert len(once) == 6


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("last", [False, True])
def test_against_differences_and_again(norm, last, once):
    site = site_of(channels=3, norm=norm, quality_channels=2, init="preserve", host=nn.Identity()).double()
    x, q = torch.randn(3, 3, 2, 3, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    x = (x.contiguous(memory_format=torch.channels_last) if last else x).requires_grad_()
    names = [name for name, _ in site.named_parameters()]

    def run(x, q, *parameters):
        return torch.func.functional_call(site, dict(zip(names, parameters, strict=True)), (x, q))

    inputs = (x, q, *(p.detach().requires_grad_() for p in site.parameters()))
    assert torch.autograd.gradcheck(run, inputs)
    assert once
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("last", [False, True])
def test_half_precision(dtype, last, once, monkeypatch):
    x = torch.randn(4, 19, 33, 31).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    check(monkeypatch, site_of(norm="layer"), x, torch.randn(4, 36), rtol=0.02, atol=0.05)
    assert len(once) == 1


def test_of_a_photograph_and_of_many_pixels(photographs, once, monkeypatch):
    pictures = photographs(2, 200).double()
    for site in (site_of(channels=3), site_of("meta_acon", 3, norm="layer")):
        for x in (pictures, pictures.contiguous(memory_format=torch.channels_last)):
            check(monkeypatch, site.double(), x, torch.randn(2, 36).double(), rtol=1e-6, atol=1e-6)
    assert len(once) == 4


def test_what_is_frozen_has_no_gradient(once):
    x, q = torch.randn(4, 8, 9, 9), torch.randn(4, 36)
    site = QACON(8)
    full = results(site, x, q, torch.ones_like(x))
    for wanted in ("fc1.weight", "bn2.bias", "p1"):
        own = copy.deepcopy(site).requires_grad_(False)
        own.get_parameter(wanted).requires_grad_()
        own(x, q).sum().backward()
        assert [name for name, p in own.named_parameters() if p.grad is not None] == [wanted]
        torch.testing.assert_close(own.get_parameter(wanted).grad, full[wanted])
    own, x = copy.deepcopy(site).requires_grad_(False), x.requires_grad_()
    own(x, q).sum().backward()
    torch.testing.assert_close(x.grad, full["x"])
    assert not QACON(8).requires_grad_(False)(x.detach(), q).requires_grad
    assert len(once) == 5


@pytest.mark.parametrize("host", [None, nn.ReLU(), nn.GELU()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_gradients_it_is_the_same_to_the_bit(host, dtype):
    site = site_of(norm="layer", init="paper" if host is None else "preserve", host=host)
    x, q = torch.randn(4, 19, 23, 21).to(dtype), torch.randn(4, 36)
    y = site(x.requires_grad_(), q)
    with torch.no_grad():
        found = site(x, q)
    if dtype == torch.bfloat16 and isinstance(host, nn.GELU):  # added in float32, and once rounded
        torch.testing.assert_close(y, found, rtol=0.016, atol=0.02)
    else:
        assert torch.equal(y, found)


def test_x_is_kept_once_and_small_things():
    site, x, sizes = QACON(64), torch.randn(2, 64, 56, 56, requires_grad=True), {}
    own = {p.untyped_storage().data_ptr() for p in site.parameters()}

    def note(t):
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        y = site(x, torch.randn(2, 36))
    assert y.requires_grad
    assert sum(size for at, size in sizes.items() if at not in own) < 1.05 * x.nbytes


@pytest.mark.parametrize("last", [False, True])
def test_threads_do_not_change_it(last):
    x = torch.randn(6, 300, 30, 30)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    site, q, threads, found = QACON(300), torch.randn(6, 36), torch.get_num_threads(), []
    for count in (1, 3):
        torch.set_num_threads(count)
        found.append(results(site, x, q, torch.ones_like(x)))
    torch.set_num_threads(threads)
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


@pytest.mark.parametrize("which", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_hooks_of_a_layer_are_called(which, once):
    site, x, seen = QACON(8), torch.randn(4, 8, 6, 6), []
    getattr(site.fc2, which)(lambda module, *gradients: seen.append(gradients))
    site(x, torch.randn(4, 36)).sum().backward()
    assert len(seen) == 1
    assert not once


def test_statistics_that_changed_in_between_are_an_error():
    site, x, q = QACON(8).eval(), torch.randn(4, 8, 6, 6), torch.randn(4, 36)
    loss = site(x, q).sum()
    site.train()(x, q)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_graph_may_be_used_again_and_by_several_gradients_at_once(once):
    x, q = torch.randn(2, 5, 3, 3, requires_grad=True), torch.randn(2, 36)
    check_several(site_of("acon", 5)(x), x)
    check_several(site_of(channels=5, norm="layer")(x, q), x)
    assert len(once) == 2 + 4


def check_several(y, x):
    first, second = (torch.autograd.grad(y.sum(), x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    grads = torch.randn(4, *y.shape)
    (together,) = torch.autograd.grad(y, x, grads, retain_graph=True, is_grads_batched=True)
    for grad, found in zip(grads, together, strict=True):
        torch.testing.assert_close(found, torch.autograd.grad(y, x, grad, retain_graph=True)[0])


def test_what_an_input_owes_to_another_is_counted_once(monkeypatch):
    x = torch.randn(2, 19, 3, 3, dtype=torch.float64, requires_grad=True)
    site, found = site_of(norm="layer").double(), []
    for choice in ("fused", "reference"):
        monkeypatch.setenv("QUAC_KERNELS", choice)
        q = x.mean((2, 3)).repeat(1, 2)[:, :36]
        (grad,) = torch.autograd.grad((site(x, q) ** 2).sum(), x, create_graph=True)
        found.append((grad, torch.autograd.grad((grad**2).sum(), x)[0]))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant):
    x, q, plain, found = torch.randn(4, 19, 9, 9), torch.randn(4, 36), site_of(norm="group"), []
    for again in (False, True):
        site, own = copy.deepcopy(plain), x.clone().requires_grad_()
        y = checkpoint(site, own, q, use_reentrant=reentrant) if again else site(own, q)
        y.square().sum().backward()
        found.append([own.grad, *(p.grad for p in site.parameters())])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_a_gradient_of_any_layout_is_taken(once):
    site, x, q = QACON(8, norm="layer"), torch.randn(2, 8, 5, 7), torch.randn(2, 36)
    grad = torch.randn(2, 8, 5, 7)
    expected = results(site, x, q, grad)
    strided = torch.randn(2, 8, 5, 14)[..., ::2].copy_(grad)
    for other in (grad.contiguous(memory_format=torch.channels_last), strided, torch._neg_view(-grad)):
        for name, value in results(site, x, q, other).items():
            assert torch.equal(value, expected[name]), name
    assert len(once) == 4


def test_training_under_autocast(once, monkeypatch):
    found = []
    for choice in ("fused", "reference"):
        monkeypatch.setenv("QUAC_KERNELS", choice)
        torch.manual_seed(0)
        net = nn.ModuleList([nn.Conv2d(3, 16, 3), QACON(16)])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = net[1](net[0](torch.rand(4, 3, 20, 20)), torch.rand(4, 36))
        y.float().square().mean().backward()
        found.append({name: p.grad for name, p in net.named_parameters()})
    assert len(once) == 1
    torch.testing.assert_close(*found, rtol=0.03, atol=0.02)


def test_gradients_to_be_differentiated_are_not_rounded_by_autocast():
    site, x, q = site_of(norm="layer"), torch.randn(2, 19, 5, 5, requires_grad=True), torch.randn(2, 36)
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            found += torch.autograd.grad(site(x, q).sum(), x, create_graph=True)
    assert found[0].requires_grad
    assert torch.equal(*found)


def packed(site, x, q, grad, change):
    """Results where saved tensors come back changed."""
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach(), change):
        return results(site, x, q, grad)


@pytest.mark.parametrize("name", ["qacon", "acon"])
@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.clone(memory_format=torch.contiguous_format),
        lambda t: torch._neg_view(-t),
        lambda t: t.mT.contiguous().mT if t.ndim > 1 else t,
    ],
)
def test_saved_tensors_may_come_back_laid_out_otherwise(name, change):
    x = torch.randn(4, 19, 9, 7).contiguous(memory_format=torch.channels_last)
    site, q, grad = site_of(name), torch.randn(4, 36), torch.randn(4, 19, 9, 7)
    torch.testing.assert_close(packed(site, x, q, grad, change), results(site, x, q, grad), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["qacon", "acon"])
def test_saved_tensors_of_another_dtype_are_not_misread(name, monkeypatch):
    x, q, site, found = torch.randn(4, 19, 9, 7), torch.randn(4, 36), site_of(name), []
    for choice in ("fused", "reference"):
        monkeypatch.setenv("QUAC_KERNELS", choice)
        rounded = packed(site, x, q, torch.ones_like(x), lambda t: t.half() if t.shape == x.shape else t)
        found.append(rounded["x"].float())
    torch.testing.assert_close(*found, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_parameters_that_are_converted_in_between_are_an_error(dtype):
    site, x, q = QACON(8), torch.randn(4, 8, 6, 6), torch.randn(4, 36)
    loss = site(x, q).sum()
    site.to(dtype)
    with pytest.raises(RuntimeError, match="dtype"):
        loss.backward()
    site = QACON(8)
    loss = site(x, q).sum()
    site.fc3.weight.data = torch.zeros(1, 44, 1, 1)
    with pytest.raises(RuntimeError, match=r"size|shape"):
        loss.backward()


def test_quality_of_inference_mode_and_buffers_that_are_used_again():
    site, x = QACON(8, norm="layer"), torch.randn(4, 8, 6, 6, requires_grad=True)
    with torch.inference_mode():
        q = torch.randn(4, 36)
    site(x, q).sum().backward()
    q = torch.randn(4, 36)
    (expected,) = torch.autograd.grad(site(x, q).sum(), x, create_graph=True)
    y = site(x, q)
    q.zero_()
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x, create_graph=True)[0], expected)


@pytest.mark.parametrize("name", ["qacon", "acon"])
def test_tangents_pass_through_backward(name, monkeypatch):
    site, found = site_of(name, norm="none") if name != "acon" else site_of(name), []
    x, q, tangent = torch.randn(4, 19, 5, 5, requires_grad=True), torch.randn(4, 36), torch.randn(4, 19, 5, 5)
    for choice in ("fused", "reference"):
        monkeypatch.setenv("QUAC_KERNELS", choice)
        y = site(x, q)
        with torch.autograd.forward_ad.dual_level():
            grad = torch.autograd.forward_ad.make_dual(torch.ones_like(y), tangent)
            (by_x,) = torch.autograd.grad(y, x, grad)
            found.append(torch.autograd.forward_ad.unpack_dual(by_x).tangent)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_transforms_of_parameters_alone(monkeypatch):
    site, x, q, found = site_of(norm="layer"), torch.randn(2, 19, 5, 5), torch.randn(2, 36), []
    parameters = dict(site.named_parameters())
    for choice in ("fused", "reference"):
        monkeypatch.setenv("QUAC_KERNELS", choice)
        found.append(torch.func.grad(lambda p: torch.func.functional_call(site, p, (x, q)).sum())(parameters))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


class Short(QACON):
    """A subclass whose quality is that of the first image."""

    def quality_for(self, x, q):
        return super().quality_for(x, q)[:1]


class Doubled(QACON):
    """A subclass with another reference."""

    def _by_operation(self, x, q):
        return 2 * super()._by_operation(x, q)


def test_subclasses_are_what_they_say(monkeypatch):
    x, q = torch.randn(2, 8, 4, 4), torch.randn(2, 36)
    with pytest.raises(RuntimeError, match="quality features of 1 images"):
        Short(8)(x, q)
    torch.manual_seed(0)
    site, found = Doubled(8, norm="layer"), []
    for choice in ("auto", "reference"):
        monkeypatch.setenv("QUAC_KERNELS", choice)
        found.append(site(x.expand(2, 8, 4, 4), q))
    torch.testing.assert_close(*found)


def test_too_many_numbers_and_parameters_of_other_shapes_are_not_read(once):
    x, q = torch.randn(2, 8, 4, 4), torch.randn(2, 36)
    site = QACON(8, norm="layer")
    site.numbers = 2
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        site(x, q)
    site = QACON(8, norm="layer")
    site.p1 = nn.Parameter(torch.randn(8, 1, 1, 1))
    with pytest.raises(RuntimeError):
        site(x, q).sum().backward()
    assert not once


def test_quality_is_asked_for_once_where_the_layers_drive(monkeypatch):
    site, calls = QACON(8, norm="layer"), []
    site.bn1.register_full_backward_hook(lambda module, before, after: None)
    real = QACON.quality_for
    monkeypatch.setattr(QACON, "quality_for", lambda self, x, q: calls.append(q is None) or real(self, x, q))
    site.context = type("Context", (), {"current": lambda self, x, layer: torch.zeros(2, 36), "mark": print})()
    site(torch.randn(2, 8, 4, 4, requires_grad=True))
    assert calls.count(True) == 1
