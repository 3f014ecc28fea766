"""The operator: the plain expression's numbers in every layout and dtype, and nothing but x kept for backward."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from quac_plugins.core.activations import ACTIVATIONS, QACON, AconC, QPReLU
from quac_plugins.core.kernels import activate, cpu, means, operator, plain
from quac_plugins.core.kernels.equations import FORMS
from quac_plugins.core.kernels.native import kernels_choice, may_read

pytestmark = pytest.mark.filterwarnings("error:native kernels")

LAYOUTS = [
    ((2, 5, 7, 6), 1, False), ((2, 5, 7, 6), 1, True), ((2, 150, 37), -1, False), ((3, 5), 1, False),
    ((2, 5, 19), 1, False), ((2, 5, 1, 1), 1, False), ((2, 1, 3, 4), 1, True), ((2, 5, 3, 4, 2), 1, False),
]  # fmt: skip
START = (0.5, 0.25, 1.5)


@pytest.fixture(autouse=True)
def _always(monkeypatch):
    monkeypatch.setenv("QUAC_KERNELS", "native")


def case(equation, shape, dim=1, last=False, dtype=torch.float64):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    count, channel = len(FORMS[equation].gather), dim % x.ndim
    theta = []
    for k in range(count):  # of which the second is the same for all images
        numbers = [n if i in ((0, channel) if k != 1 else (channel,)) else 1 for i, n in enumerate(shape)]
        theta.append(torch.randn(numbers, dtype=wide).requires_grad_())
    return x.requires_grad_(), theta


def results(x, theta, equation, dim, grad, **options):
    """y, and all gradients."""
    below = options.get("below")
    leaves = [x, *theta, *([below] if isinstance(below, torch.Tensor) else [])]
    y = activate(x, theta, equation, dim, **options)
    return [y, *torch.autograd.grad(y, leaves, grad)]


def both(monkeypatch, *args, **options):
    found = []
    for choice in ("native", "plain"):
        monkeypatch.setenv("QUAC_KERNELS", choice)
        found.append(results(*args, **options))
    return found


@pytest.mark.parametrize(("shape", "dim", "last"), LAYOUTS)
@pytest.mark.parametrize("equation", FORMS, ids=lambda e: e.__name__)
def test_value_and_gradients_are_those_of_the_expression(equation, shape, dim, last, monkeypatch):
    x, theta = case(equation, shape, dim, last)
    start = START[: len(theta)]
    for options in ({}, {"start": start}, {"start": start, "below": torch.randn(shape).double().requires_grad_()}):
        found, expected = both(monkeypatch, x, theta, equation, dim, torch.randn_like(x), **options)
        torch.testing.assert_close(found, expected)
        assert found[0].stride() == x.stride()


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("host", operator.HOSTED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_functions_inside_are_those_beside_and_at_the_start_to_the_bit(host, last, dtype, monkeypatch):
    x, theta = case(plain.acon, (3, 6, 9, 9), last=last, dtype=dtype)
    x = (4 * x).detach().requires_grad_()
    found, expected = both(monkeypatch, x, theta, plain.acon, 1, torch.randn_like(x), start=START, below=host)
    tolerance = {} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(found, expected, **tolerance)
    for t, value in zip(theta, START, strict=True):
        nn.init.constant_(t, value)
    monkeypatch.setenv("QUAC_KERNELS", "native")
    for of in (torch.float32, torch.bfloat16, torch.float16):
        own = operator.HOSTED[host](x.to(of))
        assert torch.equal(activate(x.to(of), theta, plain.acon, 1, START, host), own)
        assert torch.equal(activate(x.to(of), theta, plain.acon, 1, START, own), own)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_and_rounded_once(dtype, last):
    """Whatever the length of a row."""
    for side in (1, 3, 5, 8, 25):
        x, theta = case(plain.acon, (2, 37, side, side - side // 3), last=last, dtype=dtype)
        below, grad = torch.randn_like(x).requires_grad_(), torch.randn_like(x)
        found = results(x, theta, plain.acon, 1, grad, below=below)
        wide, wide_below = (t.detach().float().requires_grad_() for t in (x, below))
        expected = results(wide, theta, plain.acon, 1, grad.float(), below=wide_below)
        for k in (0, 1, -1):
            assert torch.equal(found[k], expected[k].to(dtype))
        torch.testing.assert_close(found[2:-1], expected[2:-1])


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("equation", "atol"), [(plain.swish, 1e-35), (plain.gelu, 1e-6)])  # 1 + erf cancels
def test_the_exponential_is_right_over_the_whole_range(equation, atol, last):
    spread = torch.cat([torch.linspace(-95, 95, 8191), torch.logspace(-30, 18, 999), -torch.logspace(-30, 18, 999)])
    x = torch.cat([spread, torch.tensor([0.0, -0.0])]).view(1, 1, -1, 1).repeat(1, 19, 1, 1)
    x = (x.contiguous(memory_format=torch.channels_last) if last else x).requires_grad_()
    p, wide = torch.ones(1, 19, 1, 1, requires_grad=True), x.detach().double().requires_grad_()
    y, expected = activate(x, [p], equation), equation(wide, p.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=atol)
    found, truth = (torch.autograd.grad(t.sum(), [leaf, p]) for t, leaf in ((y, x), (expected, wide)))
    torch.testing.assert_close(found[0].double(), truth[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1], truth[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("last", [False, True])
def test_nan_and_infinity_are_as_in_the_expression(last):
    x = torch.tensor([float("nan"), float("inf"), 1.0, -2.0]).view(2, 2, 1, 1).repeat(1, 20, 1, 5)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    theta = [t.expand(1, 40, 1, 1) for t in torch.tensor([1.0, 0.25, 1.0]).view(3, 1, 1, 1, 1)]
    torch.testing.assert_close(activate(x, theta, plain.acon), plain.acon(x, *theta), equal_nan=True)


@pytest.mark.parametrize("last", [False, True])
def test_the_number_of_threads_changes_nothing(last):
    x, theta = case(plain.acon, (2, 40, 31, 29), last=last, dtype=torch.float32)
    threads, found = torch.get_num_threads(), []
    for count in (1, 3):
        torch.set_num_threads(count)
        found.append([*results(x, theta, plain.acon, 1, torch.ones_like(x)), means(x)])
    torch.set_num_threads(threads)
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize(
    "strided",
    [
        lambda x: x[:, :, ::2],
        lambda x: x.transpose(2, 3),
        lambda x: x.expand(4, -1, -1, -1),
        lambda x: torch._neg_view(x),
    ],
    ids=["gaps", "transposed", "expanded", "negative"],
)
def test_other_strides_and_signs(strided, monkeypatch):
    x = strided(torch.randn(1, 5, 8, 6)).detach().requires_grad_()
    theta = [strided(torch.randn(1, 5, 8, 6))[:1, :, :1, :1].detach().requires_grad_() for _ in range(3)]
    below = strided(torch.randn(1, 5, 8, 6)).detach().requires_grad_()
    for grad in (torch.randn_like(x), strided(torch.randn(1, 5, 8, 6)), torch.randn(len(x), 5, 1, 1).expand(x.shape)):
        found, expected = both(monkeypatch, x, theta, plain.acon, 1, grad, below=below)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        monkeypatch.setenv("QUAC_KERNELS", "native")
        torch.testing.assert_close(means(x), plain.global_average(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "dim", "last"), LAYOUTS)
def test_means_are_the_averages_and_so_are_their_gradients(shape, dim, last, dtype):
    x, _ = case(plain.swish, shape, dim, last, dtype)
    found, expected = means(x, dim), plain.global_average(x, dim)
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(found)
    torch.testing.assert_close(*(torch.autograd.grad((y * weight).sum(), x)[0] for y in (found, expected)))
    (first,) = torch.autograd.grad((means(x, dim) ** 2).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad((plain.global_average(x, dim) ** 2).sum(), x, create_graph=True)
    torch.testing.assert_close(*(torch.autograd.grad((by**2).sum(), x)[0] for by in (first, second)))


@pytest.mark.parametrize("last", [False, True])
def test_a_large_map_is_averaged_without_loss(last):
    x = torch.rand(1, 3, 1500, 1400) + 1000
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    torch.testing.assert_close(means(x).double(), x.double().mean((2, 3)), rtol=1e-6, atol=0)


def test_derivatives_of_derivatives():
    x, theta = case(plain.acon, (2, 3, 2, 2))
    below = torch.randn_like(x).requires_grad_()
    function = lambda x, below, *t: activate(x, t, plain.acon, 1, START, below)  # noqa: E731
    assert torch.autograd.gradcheck(function, (x, below, *theta))
    assert torch.autograd.gradgradcheck(function, (x, below, *theta))
    shared = torch.randn(3, dtype=torch.float64, requires_grad=True)
    # what one input owes to another is counted once
    z = shared[None, :, None, None]
    assert torch.autograd.gradgradcheck(lambda s: activate(x * s[:, None, None], [z, theta[0], z], plain.acon), shared)


def test_several_gradients_at_once_tangents_and_transforms(monkeypatch):
    x, theta = case(plain.acon, (2, 5, 3, 3), dtype=torch.float32)
    y = activate(x, theta, plain.acon)
    grads = torch.randn(4, *y.shape)
    (together,) = torch.autograd.grad(y, x, grads, retain_graph=True, is_grads_batched=True)
    for grad, found in zip(grads, together, strict=True):
        torch.testing.assert_close(found, torch.autograd.grad(y, x, grad, retain_graph=True)[0])
    found = []
    for choice in ("native", "plain"):
        monkeypatch.setenv("QUAC_KERNELS", choice)
        y = activate(x, theta, plain.acon)
        own = [torch.vmap(lambda t: activate(x, [t, *theta[1:]], plain.acon))(torch.stack([theta[0], -theta[0]]))]
        own.append(torch.func.grad(lambda t: activate(x, [t, *theta[1:]], plain.acon).sum())(theta[0]))
        with forward_ad.dual_level():
            grad = forward_ad.make_dual(torch.ones_like(y), y.detach())
            own.append(forward_ad.unpack_dual(torch.autograd.grad(y, x, grad)[0]).tangent)
            with torch.no_grad():
                y = activate(forward_ad.make_dual(x.detach(), grads[0]), theta, plain.acon)
                own.append(forward_ad.unpack_dual(y).tangent)
        found.append(own)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.clone(memory_format=torch.contiguous_format), lambda t: torch._neg_view(-t),
        lambda t: t.mT.contiguous().mT, lambda t: t.double(),
    ],
    ids=["contiguous", "negative", "transposed", "double"],
)  # fmt: skip
def test_saved_tensors_may_come_back_otherwise(change):
    x, theta = case(plain.acon, (4, 19, 9, 7), last=True, dtype=torch.float32)
    grad = torch.randn(4, 19, 9, 7)
    expected = results(x, theta, plain.acon, 1, grad)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach(), change):
        found = results(x, theta, plain.acon, 1, grad)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, check_dtype=False)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant):
    x, theta = case(plain.acon, (4, 19, 9, 9), dtype=torch.float32)
    grad, found = torch.randn_like(x), []
    for again in (False, True):
        run = lambda x: activate(x, theta, plain.acon)  # noqa: E731
        y = checkpoint(run, x, use_reentrant=reentrant) if again else run(x)
        y.backward(grad)
        found.append([t.grad for t in (x, *theta)])
        for t in (x, *theta):
            t.grad = None
    torch.testing.assert_close(*found)


def test_x_alone_is_kept_for_backward():
    x, kept = torch.randn(4, 16, 40, 40, requires_grad=True), {}

    def note(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    for host in (None, nn.ReLU(), nn.Hardswish(), nn.GELU()):
        site = QACON(16, norm="layer", init="preserve" if host else "paper", host=host)
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            site(x, torch.randn(4, 36))
        assert sum(kept.values()) <= 1.05 * x.nbytes + sum(p.nbytes for p in site.parameters())


def test_what_is_below_is_read_and_not_written():
    x, theta = case(plain.acon, (2, 8, 9, 9), dtype=torch.float32)
    for below in (x.detach(), x.detach()[:, :, :1], torch.ones(1)):
        kept = below.clone()
        with torch.no_grad():
            y = activate(x.detach(), theta, plain.acon, below=below)
        assert torch.equal(below, kept)
        torch.testing.assert_close(y, below + plain.acon(x, *theta))


@pytest.mark.parametrize("last", [False, True])
def test_a_function_below_is_called_for_some_images_at_a_time(last, monkeypatch):
    x, theta = case(plain.acon, (7, 8, 12, 12), last=last, dtype=torch.float32)
    monkeypatch.setattr(operator, "PIECE", 3 * 8 * 12 * 12)
    rows = []
    for below in (torch.tanh, lambda t: t.double().tanh(), lambda t: t.mT.tanh().mT):
        with torch.no_grad():
            y = activate(x, theta, plain.acon, 1, START, lambda t, f=below: rows.append(len(t)) or f(t))
            torch.testing.assert_close(y, activate(x, theta, plain.acon, 1, START, below(x)), rtol=0, atol=0)
    assert rows == [3, 3, 1, 3, 7, 3, 3, 1]  # what kernels do not read is computed for all
    activate(x, theta, plain.acon, 1, START, lambda t: rows.append(len(t)) or t)  # a graph of pieces would be larger
    assert rows[8:] == [7]


def test_in_graphs_it_is_the_expression():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.theta = nn.ParameterList([torch.randn(1, 3, 1, 1) for _ in range(3)])

        def forward(self, x):
            y = activate(x, list(self.theta), plain.acon, start=START, below="relu")
            return y + means(x)[:, :, None, None]

    x, model = torch.randn(2, 3, 8, 8), Model()
    expected = model(x)
    for graph in (torch.compile(model, fullgraph=True), torch.export.export(model, (x,)).module()):
        torch.testing.assert_close(graph(x), expected)


def test_a_compiler_that_meets_its_functions_one_by_one():
    """As where it gave up on all that calls them: each is compiled by itself or left alone."""
    torch._dynamo.reset()
    site, x, q = QACON(8, norm="layer", init="preserve", host=nn.GELU()), torch.randn(2, 8, 16, 16), torch.randn(2, 36)
    x.requires_grad_()
    (expected,) = torch.autograd.grad(site(x, q).square().sum(), x)
    theta = [v.detach() for v in site.values(x, q)]
    functions = [
        lambda: site(x, q), lambda: means(x), lambda: may_read(x), lambda: activate(x, theta, plain.acon),
        lambda: torch.autograd.grad(site(x, q).square().sum(), x),
    ]  # fmt: skip
    for function in functions:
        outer = torch.compile(_given_up(function), backend="eager")
        for _ in range(2):
            outer(x)
    torch.testing.assert_close(outer(x)[0], expected, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def _given_up(function):
    def outer(x):
        try:
            torch._dynamo.graph_break()
            return function()
        finally:
            x.sum()

    return outer


def test_modes_see_operations():
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    x, theta = case(plain.acon, (2, 5, 3, 3))
    with Mode():
        activate(x, theta, plain.acon)
    assert any("sigmoid" in name for name in seen)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_without_gradients_it_is_the_same_to_the_bit(mode):
    x, theta = case(plain.acon, (4, 19, 23, 21), dtype=torch.bfloat16)
    expected = activate(x, theta, plain.acon)
    with mode(), torch.device("meta"), torch.autocast("cpu", dtype=torch.bfloat16):
        y = activate(x, theta, plain.acon)
    assert not y.requires_grad
    assert torch.equal(y, expected)


def test_parameters_elsewhere_are_an_error_and_no_crash():
    with pytest.raises(RuntimeError, match="device"):
        AconC(4).to("meta")(torch.randn(2, 4, 3, 3))


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0, 3)])
def test_nothing_is_activated_to_nothing(shape):
    x = torch.randn(shape, requires_grad=True)
    y = AconC(4)(x)
    assert y.shape == shape
    y.sum().backward()


def test_threads_get_the_same():
    site, x, q = QACON(8, norm="layer"), torch.randn(2, 8, 16, 16), torch.randn(2, 36)
    expected, found = site(x, q), [None] * 4

    def run(i):
        found[i] = site(x, q)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert all(torch.equal(f, expected) for f in found)


@pytest.mark.parametrize("choice", ["auto", "plain", "native"])
def test_every_size_function_and_kind_of_tensor_is_served(choice, monkeypatch):
    monkeypatch.setenv("QUAC_KERNELS", choice)
    x, theta = torch.randn(1, 1, 1 << 15), [torch.ones(1)]
    for part in (x, x[:, :, 1:], x[:, :, :7]):
        torch.testing.assert_close(activate(part, theta, plain.swish), plain.swish(part, *theta))
    assert torch.equal(activate(x, theta, lambda x, p: x * p), x)
    assert activate(x.to("meta"), [theta[0].to("meta")], plain.swish).device.type == "meta"
    own = type("Own", (torch.Tensor,), {})
    assert type(activate(x.as_subclass(own), theta, plain.swish)) is own


def test_a_choice_that_is_none_is_an_error(monkeypatch):
    monkeypatch.setenv("QUAC_KERNELS", "fsued")
    with pytest.raises(ValueError, match="QUAC_KERNELS must be one of auto, plain, native, got 'fsued'"):
        kernels_choice()


def test_every_activation_has_a_kernel():
    ours = {name: cls for name, cls in ACTIVATIONS.items() if cls.__module__.startswith("quac_plugins.")}
    assert QPReLU in ours.values()
    assert all(cls.equation in FORMS for cls in ours.values())


def test_without_a_compiler_it_still_works(tmp_path):
    code = """
import torch, warnings
from quac_plugins.core.kernels import activate, plain
x, p = torch.randn(2, 3, 4, 4), [torch.randn(1, 3, 1, 1) for _ in range(3)]
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for _ in range(2):
        torch.testing.assert_close(activate(x, p, plain.acon), plain.acon(x, *p))
print(sum("is a C++ compiler installed" in str(w.message) for w in seen))
"""
    environment = {**os.environ, "CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "1"


@pytest.fixture
def broken(monkeypatch):
    """Kernels of float32 are built anew; their input goes through a function of the test's."""
    real, change = cpu.build, [lambda x: x]

    def build(dtype):
        kernels = real(dtype)
        if dtype != torch.float32:
            return kernels
        return kernels._replace(run=lambda grad, x, *args: kernels.run(grad, change[0](x), *args))

    monkeypatch.setattr(cpu, "build", build)
    operator.kernels_of.cache_clear()
    yield change
    operator.kernels_of.cache_clear()


@pytest.mark.filterwarnings("ignore:native kernels")
def test_what_computes_other_numbers_is_left_out(broken):
    broken[0] = torch.neg
    x, theta = torch.linspace(-2, 2, 8).view(1, 1, 8), [torch.ones(1)]
    with pytest.warns(UserWarning, match="float32 are wrong on this machine and left out: acon of"):
        y = activate(x, theta, plain.swish)
    torch.testing.assert_close(y, plain.swish(x, *theta))
    activate(x.double(), theta, plain.swish)  # and those of other dtypes are not


def test_an_error_of_a_run_is_the_users(broken):
    def failing(x):
        raise MemoryError("no memory")

    x, theta = torch.ones(1, 1, 4), [torch.ones(1)]
    expected = activate(x, theta, plain.swish)
    change, broken[0] = broken[0], failing
    with pytest.raises(MemoryError):
        activate(x, theta, plain.swish)
    broken[0] = change
    assert torch.equal(activate(x, theta, plain.swish), expected)  # nothing is left out for it
