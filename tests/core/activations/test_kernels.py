"""Fused kernels: the plain expression's numbers in every layout and dtype, and nothing but x kept for backward."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn

from quac_plugins.core.activations import ACTIVATIONS, QACON, AconC, QPReLU
from quac_plugins.core.activations.forms import FORMS, equation_of
from quac_plugins.core.activations.kernels import MIN_NUMBERS, fused, use_fused
from quac_plugins.core.native import kernels_choice

pytestmark = pytest.mark.filterwarnings("error:fused activations could not be compiled")

LAYOUTS = [((2, 5, 7, 6), 1, False), ((2, 5, 7, 6), 1, True), ((2, 150, 37), -1, False), ((3, 5), 1, False)]


@pytest.fixture
def always(monkeypatch):
    monkeypatch.setenv("QUAC_KERNELS", "fused")


def case(equation, shape, channel_dim, last, dtype=torch.float64):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    channel = channel_dim % x.ndim
    numbers = [n if i in (0, channel) else 1 for i, n in enumerate(shape)]
    count = equation_of(equation).__code__.co_argcount - 1
    return x.requires_grad_(), [torch.randn(numbers, dtype=torch.float64).requires_grad_() for _ in range(count)]


@pytest.mark.parametrize(("shape", "channel_dim", "last"), LAYOUTS)
@pytest.mark.parametrize("equation", FORMS)
def test_value_and_gradients_are_those_of_the_expression(equation, shape, channel_dim, last):
    x, parameters = case(equation, shape, channel_dim, last)
    y, expected = fused(equation_of(equation), x, tuple(parameters), channel_dim), equation_of(equation)(x, *parameters)
    torch.testing.assert_close(y, expected)
    assert y.stride() == x.stride()
    grad = torch.randn_like(x)
    found = torch.autograd.grad(y, [x, *parameters], grad)
    torch.testing.assert_close(found, torch.autograd.grad(expected, [x, *parameters], grad))


@pytest.mark.parametrize("kept", ["bc", "b", "c", "", "bcw"])
@pytest.mark.parametrize("driven", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "channel_dim", "last"), [*LAYOUTS, ((1, 5, 7, 6), 1, True), ((2, 5, 19), 1, False)])
def test_a_gradient_that_is_the_same_all_over_a_channel(shape, channel_dim, last, dtype, driven, kept, always):
    """As of a mean: what is not written out in memory counts as if it were."""
    torch.manual_seed(0)
    channels, channel = shape[channel_dim], channel_dim % len(shape)
    site = (QACON if driven else AconC)(channels, channel_dim=channel_dim)
    site.eval()
    x = torch.randn(shape).to(dtype)
    x = (x.contiguous(memory_format=torch.channels_last) if last else x).requires_grad_()
    y = site(x, torch.randn(shape[0], 36)) if driven else site(x)
    stays = {"b": 0, "c": channel, "w": next((i for i in reversed(range(1, len(shape))) if i != channel), 0)}
    small = [n if i in [stays[k] for k in kept] else 1 for i, n in enumerate(shape)]
    grad = torch.randn(small).to(dtype).expand(shape)
    learned = [x, *(p for p in site.parameters())]
    found = torch.autograd.grad(y, learned, grad, retain_graph=True)
    expected = torch.autograd.grad(y, learned, grad.clone(memory_format=torch.contiguous_format))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_derivatives_of_derivatives():
    x, parameters = case("acon", (2, 3, 2, 2), 1, False)
    assert torch.autograd.gradgradcheck(lambda x, *p: fused(equation_of("acon"), x, p), (x, *parameters))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype, last):
    x, parameters = case("acon", (2, 37, 25, 23), 1, last, dtype)
    parameters = [p.detach().float().requires_grad_() for p in parameters]
    y, expected = fused(equation_of("acon"), x, tuple(parameters)), equation_of("acon")(x, *parameters)
    assert y.dtype == dtype
    torch.testing.assert_close(y, expected, rtol=torch.finfo(dtype).eps, atol=1e-6)
    grad = torch.randn_like(x)
    found = torch.autograd.grad(y, [x, *parameters], grad)
    wide = torch.autograd.grad(equation_of("acon")(x.float(), *parameters), [x, *parameters], grad.float())
    torch.testing.assert_close(found[0], wide[0].to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
    torch.testing.assert_close(found[1:], wide[1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("equation", "atol"), [("swish", 1e-35), ("gelu", 1e-6)])  # 1 + erf cancels
def test_the_exponential_is_right_over_the_whole_range(equation, atol, last):
    spread = torch.cat([torch.linspace(-95, 95, 8191), torch.logspace(-30, 18, 999), -torch.logspace(-30, 18, 999)])
    x = torch.cat([spread, torch.tensor([0.0, -0.0])]).view(1, 1, -1, 1).repeat(1, 19, 1, 1)
    x = (x.contiguous(memory_format=torch.channels_last) if last else x).requires_grad_()
    p, wide = torch.ones(1, 19, 1, 1, requires_grad=True), x.detach().double().requires_grad_()
    y, expected = fused(equation_of(equation), x, (p,)), equation_of(equation)(wide, p.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=atol)
    found, truth = (torch.autograd.grad(t.sum(), [leaf, p]) for t, leaf in ((y, x), (expected, wide)))
    torch.testing.assert_close(found[0].double(), truth[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1], truth[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("last", [False, True])
def test_nan_and_infinity_are_as_in_the_expression(last):
    x = torch.tensor([float("nan"), float("inf"), 1.0, -2.0]).view(2, 2, 1, 1).repeat(1, 20, 1, 5)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    p = torch.tensor([1.0, 0.25, 1.0]).view(3, 1, 1, 1, 1).unbind(0)
    p = tuple(t.expand(1, 40, 1, 1) for t in p)
    torch.testing.assert_close(fused(equation_of("acon"), x, p), equation_of("acon")(x, *p), equal_nan=True)


@pytest.mark.parametrize("last", [False, True])
def test_sums_do_not_depend_on_the_number_of_threads(last):
    x, parameters = case("acon", (2, 40, 31, 29), 1, last, torch.float32)
    threads, found = torch.get_num_threads(), []
    for count in (1, 3):
        torch.set_num_threads(count)
        y = fused(equation_of("acon"), x, tuple(parameters))
        found.append(torch.autograd.grad(y.square().sum(), [x, *parameters]))
    torch.set_num_threads(threads)
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize(
    "strided", [lambda x: x[:, :, ::2], lambda x: x.transpose(2, 3), lambda x: x.expand(4, -1, -1, -1)]
)
def test_other_strides(strided):
    x = strided(torch.randn(1, 5, 8, 6))
    p = tuple(torch.randn(1, 5, 1, 1) for _ in range(3))
    torch.testing.assert_close(fused(equation_of("acon"), x, p), equation_of("acon")(x, *p))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    "host",
    [nn.ReLU(inplace=True), nn.SiLU(), nn.GELU(), nn.Identity(), nn.PReLU(5), nn.ReLU6(inplace=True), nn.Hardswish()],
)
def test_preserve_is_the_host_to_the_bit(host, last, always, photographs):
    pictures = torch.cat([photographs(2, 32), photographs(2, 32)[:, :2]], 1) * 14 - 6
    x = pictures.contiguous(memory_format=torch.channels_last) if last else pictures
    site = QACON(5, norm="layer", init="preserve", host=host)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        expected = host.to(dtype)(x.to(dtype, copy=True))
        assert torch.equal(site(x.to(dtype), torch.randn(2, 36)), expected)
    host.float()


@pytest.mark.parametrize("host", [nn.ReLU(), nn.ReLU6(), nn.Hardswish(), nn.Identity()])
def test_under_preserve_the_gradients_are_those_of_the_expression(host, monkeypatch):
    torch.manual_seed(0)
    site = QACON(6, norm="layer", init="preserve", host=host)
    for p in site.parameters():
        nn.init.normal_(p, std=0.5)
    x, q, found = 4 * torch.randn(3, 6, 9, 9), torch.randn(3, 36), {}
    for choice in ("reference", "fused"):
        monkeypatch.setenv("QUAC_KERNELS", choice)
        leaf = x.clone().requires_grad_()
        y = site(leaf, q)
        found[choice] = [y, *torch.autograd.grad(y.square().sum(), [leaf, *site.parameters()])]
    torch.testing.assert_close(found["fused"], found["reference"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("init", ["paper", "preserve"])
def test_x_alone_is_kept_for_backward(init, always):
    site = QACON(16, norm="layer", init=init, host=nn.ReLU() if init == "preserve" else None)
    x, kept = torch.randn(4, 16, 40, 40, requires_grad=True), {}

    def note(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        site(x, torch.randn(4, 36))
    assert sum(kept.values()) <= 1.05 * x.nbytes + sum(p.nbytes for p in site.parameters())


def test_the_operator_passes_torch_checks():
    x, theta = torch.randn(2, 3, 4, 5, requires_grad=True), torch.randn(2, 3, 3, requires_grad=True)
    torch.library.opcheck(torch.ops.quac_plugins.activate, (x, theta, "acon", 1, [1.0, 0.0, 1.0], "relu"))
    torch.library.opcheck(torch.ops.quac_plugins.activate, (x, theta, "acon", 1, [], ""))


def test_graphs_may_hold_the_operator():
    x, p = torch.randn(2, 3, 8, 8), tuple(torch.randn(1, 3, 1, 1) for _ in range(3))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.p = nn.ParameterList(p)

        def forward(self, x):
            return fused(equation_of("acon"), x, tuple(self.p))

    expected = equation_of("acon")(x, *p)
    torch.testing.assert_close(torch.compile(Model(), fullgraph=True)(x), expected)
    torch.testing.assert_close(torch.export.export(Model(), (x,)).module()(x), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert Model()(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.usefixtures("always")
def test_parameters_elsewhere_are_an_error_and_no_crash():
    site = AconC(4).to("meta")
    with pytest.raises(RuntimeError, match="x is on cpu, but the activation's parameters are on meta"):
        site(torch.randn(2, 4, 3, 3))


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0, 3)])
def test_nothing_is_activated_to_nothing(shape):
    x = torch.randn(shape, requires_grad=True)
    y = AconC(4)(x)
    assert y.shape == shape
    y.sum().backward()


def test_threads_get_the_same(always):
    site, x, q = QACON(8, norm="layer"), torch.randn(2, 8, 16, 16), torch.randn(2, 36)
    expected, found = site(x, q), [None] * 4

    def run(i):
        found[i] = site(x, q)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert all(torch.equal(f, expected) for f in found)


def test_when_it_is_used(monkeypatch):
    monkeypatch.delenv("QUAC_KERNELS", raising=False)
    large = torch.empty(MIN_NUMBERS)
    assert use_fused(equation_of("acon"), large)
    assert not use_fused(equation_of("acon"), large[:-1])
    assert not use_fused(lambda x: x, large)
    assert not use_fused(equation_of("acon"), large.to("meta"))
    monkeypatch.setenv("QUAC_KERNELS", "reference")
    assert not use_fused(equation_of("acon"), large)
    monkeypatch.setenv("QUAC_KERNELS", "fsued")
    with pytest.raises(ValueError, match="QUAC_KERNELS must be one of auto, reference, fused, got 'fsued'"):
        kernels_choice()


def test_every_activation_has_a_kernel():
    ours = {name: cls for name, cls in ACTIVATIONS.items() if cls.__module__.startswith("quac_plugins.")}
    assert QPReLU in ours.values()
    assert all(cls.equation is equation_of(cls.equation.__name__) for cls in ours.values())


def test_without_a_compiler_it_still_works(tmp_path):
    code = """
import torch, warnings
from quac_plugins.core.activations.kernels import fused
from quac_plugins.core.activations.reference import acon
x, p = torch.randn(2, 3, 4, 4), tuple(torch.randn(1, 3, 1, 1) for _ in range(3))
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    y = fused(acon, x, p); fused(acon, x, p)
torch.testing.assert_close(y, acon(x, *p))
print(sum("is a C++ compiler installed" in str(w.message) for w in seen))
"""
    environment = {**os.environ, "CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "1"
