"""The equations against formulas written down independently."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quac_plugins.core.kernels import plain as reference

EQUATIONS = {
    "acon": (reference.acon, 3),
    "swish": (reference.swish, 1),
    "prelu": (reference.prelu, 1),
    "gelu": (reference.gelu, 1),
}
number = st.floats(-30, 30)


def plain(name, x, *p):
    """One number at a time, in Python."""
    if name == "acon":
        p1, p2, beta = p
        d = (p1 - p2) * x
        t = beta * d
        sigmoid = 1 / (1 + math.exp(-t)) if t > -700 else 0.0
        return d * sigmoid + p2 * x
    if name == "swish":
        t = p[0] * x
        return x / (1 + math.exp(-t)) if t > -700 else 0.0
    if name == "prelu":
        return max(x, 0.0) + p[0] * min(x, 0.0)
    return x * 0.5 * math.erfc(-p[0] * x / math.sqrt(2))


@pytest.mark.parametrize("name", EQUATIONS)
@settings(deadline=None, max_examples=60)
@given(values=st.lists(number, min_size=4, max_size=4))
def test_equation_of_one_number(name, values):
    function, count = EQUATIONS[name]
    x, *p = [torch.tensor([v], dtype=torch.float64) for v in values[: count + 1]]
    expected = plain(name, *values[: count + 1])
    assert function(x, *p).item() == pytest.approx(expected, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("name", EQUATIONS)
def test_equation_of_photographs_with_parameters_for_every_channel_and_image(name, photographs):
    function, count = EQUATIONS[name]
    x = (photographs(2, 8) * 8 - 4).double()
    p = [torch.randn(2, 3, 1, 1, dtype=torch.float64) for _ in range(count)]
    y = function(x, *p)
    for b, c, i, j in torch.cartesian_prod(*(torch.arange(n) for n in x.shape)).tolist():
        expected = plain(name, x[b, c, i, j].item(), *(v[b, c, 0, 0].item() for v in p))
        assert y[b, c, i, j].item() == pytest.approx(expected, rel=1e-10, abs=1e-12)


def test_special_cases_are_torchs_own_activations():
    x = torch.randn(1000, dtype=torch.float64) * 5
    one, zero, huge = (torch.tensor(v, dtype=torch.float64) for v in (1.0, 0.0, 1e6))
    torch.testing.assert_close(reference.acon(x, one, zero, one), torch.nn.functional.silu(x))
    torch.testing.assert_close(reference.acon(x, one, zero, huge), torch.relu(x), atol=1e-6, rtol=0)
    torch.testing.assert_close(reference.acon(x, one, zero, zero), x / 2)
    torch.testing.assert_close(reference.swish(x, one), torch.nn.functional.silu(x))
    torch.testing.assert_close(reference.gelu(x, one), torch.nn.functional.gelu(x))
    torch.testing.assert_close(reference.prelu(x, zero), torch.relu(x))


@pytest.mark.parametrize("name", EQUATIONS)
@pytest.mark.parametrize(
    ("dtype", "largest"), [(torch.float16, 6e4), (torch.bfloat16, 1e30), (torch.float32, 1e30), (torch.float64, 1e300)]
)
def test_large_values_stay_finite_and_keep_their_dtype(name, dtype, largest):
    function, count = EQUATIONS[name]
    x = torch.tensor([-largest, -1.0, -0.0, 0.0, 1.0, largest], dtype=dtype, requires_grad=True)
    for beta in (1.0, -1.0, 1e4, -1e4):
        slope = max(-1.0, min(beta, 1.0)) if name == "prelu" else beta
        p = [torch.tensor(v, requires_grad=True) for v in ([1.0, 0.0, beta] if count == 3 else [slope])]
        y = function(x, *p)
        assert y.dtype == dtype
        assert torch.isfinite(y).all()
        (grad,) = torch.autograd.grad(y.float().sum(), x)
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("name", EQUATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_float32_rounded_once(name, dtype, photographs):
    function, count = EQUATIONS[name]
    x = (photographs(2, 16) * 20 - 10).to(dtype)
    p = [torch.randn(1, 3, 1, 1) for _ in range(count)]
    assert torch.equal(function(x, *p), function(x.float(), *p).to(dtype))


@pytest.mark.parametrize("name", EQUATIONS)
def test_gradients_of_everything(name):
    function, count = EQUATIONS[name]
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    p = [torch.randn(2, 3, 1, 1, dtype=torch.float64, requires_grad=True) for _ in range(count)]
    assert torch.autograd.gradcheck(function, (x, *p))
    assert torch.autograd.gradgradcheck(function, (x, *p))


def test_global_average_over_every_layout(photographs):
    x = photographs(3, 16)
    expected = torch.stack([torch.stack([channel.flatten().mean() for channel in image]) for image in x])
    torch.testing.assert_close(reference.global_average(x), expected)
    torch.testing.assert_close(reference.global_average(x.permute(0, 2, 3, 1), -1), expected)
    torch.testing.assert_close(reference.global_average(x.flatten(2).transpose(1, 2), -1), expected)
    torch.testing.assert_close(reference.global_average(expected), expected)
    half = torch.full((2, 4, 64, 64), 6e4, dtype=torch.float16)  # whose sum is beyond float16
    assert reference.global_average(half).dtype == torch.float32
    torch.testing.assert_close(reference.global_average(half), half[:, :, 0, 0].float())


@pytest.mark.parametrize("channel_dim", [1, -1])
@pytest.mark.parametrize("ndim", [2, 3, 4, 5])
def test_per_channel_broadcasts_along_the_channels_only(channel_dim, ndim):
    x = torch.randn(2, *range(3, 2 + ndim))
    channels = x.shape[channel_dim]
    for values in (torch.randn(channels), torch.randn(2, channels)):
        spread = reference.per_channel(values, x, channel_dim)
        product = (spread * x).movedim(channel_dim, 1)
        expected = values.reshape(-1, channels, *[1] * (ndim - 2)) * x.movedim(channel_dim, 1)
        torch.testing.assert_close(product, expected)
