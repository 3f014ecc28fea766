"""Under preserve a host computes what it computed before, and what was put in learns at once."""

import copy

import pytest
import torch
from torch import nn

from quac_plugins.core.activations import ACTIVATIONS
from quac_plugins.core.activations.driver import NORMS, DrivenActivation

HOSTS = {
    "ReLU": nn.ReLU,
    "ReLU in place": lambda: nn.ReLU(inplace=True),
    "ReLU6": nn.ReLU6,
    "SiLU in place": lambda: nn.SiLU(inplace=True),
    "GELU": nn.GELU,
    "GELU tanh": lambda: nn.GELU(approximate="tanh"),
    "Hardswish": nn.Hardswish,
    "LeakyReLU": lambda: nn.LeakyReLU(0.2),
    "ELU": nn.ELU,
    "Mish": nn.Mish,
    "PReLU": lambda: nn.PReLU(8),
    "Softplus": nn.Softplus,
    "none": lambda: None,
}
NAMES = sorted(ACTIVATIONS)


def norms(name):
    return NORMS if issubclass(ACTIVATIONS[name], DrivenActivation) else (None,)


def make(name, norm, host, **kwargs):
    if norm is not None:
        kwargs["norm"] = norm
    if ACTIVATIONS[name].needs_quality:
        kwargs["quality_channels"] = 6
    return ACTIVATIONS[name](8, init="preserve", host=host, **kwargs)


def quality(name, batch=4):
    return (torch.randn(batch, 6) * 3,) if ACTIVATIONS[name].needs_quality else ()


def real_features(photographs):
    return nn.functional.conv2d(photographs(4, 24), torch.randn(8, 3, 3, 3)).detach() * 2


def expected(host, x):
    return copy.deepcopy(host)(x.clone()) if host is not None else x.clone()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", HOSTS)
def test_output_is_exactly_the_hosts(kind, name, photographs):
    inputs = (real_features(photographs), torch.randn(4, 8, 5, 5) * 4)
    for norm in norms(name):
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            host = HOSTS[kind]()
            host = host.to(dtype) if host else None
            module = make(name, norm, host).to(dtype)
            for features in inputs:
                for training in (True, False):
                    x = features.to(dtype)
                    kept = x.clone()
                    y = module.train(training)(x, *quality(name))
                    assert torch.equal(x, kept), "the input was written over"
                    assert y.dtype == dtype
                    assert torch.equal(y, expected(host, x)), (norm, dtype, training)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", HOSTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_output_is_exactly_the_hosts_under_autocast(kind, name, dtype, photographs):
    x = real_features(photographs).to(dtype)
    for norm in norms(name):
        host = HOSTS[kind]()
        module = make(name, norm, host)
        with torch.autocast("cpu", dtype=dtype), torch.no_grad():
            wanted, y = expected(host, x), module(x, *quality(name))
        assert y.dtype == wanted.dtype
        assert torch.equal(y, wanted)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", HOSTS)
def test_everything_put_in_learns_within_two_steps(kind, name):
    for norm in norms(name):
        module = make(name, norm, HOSTS[kind]())
        silent = {"fc1.bias", "fc2.bias"} if norm == "batch" else set()  # a batch norm takes them away
        learned = set()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for _ in range(2):
            x = torch.randn(4, 8, 5, 5) * 2
            optimizer.zero_grad()
            (module(x, *quality(name)) - torch.randn(4, 8, 5, 5)).square().sum().backward()
            learned |= {n for n, p in module.named_parameters() if p.grad is not None and p.grad.abs().max() > 1e-12}
            optimizer.step()
        wanted = {n for n, _ in module.named_parameters() if not n.startswith("host.")} - silent
        assert wanted <= learned, norm


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", HOSTS)
def test_gradient_to_the_input_is_the_hosts(kind, name):
    for norm in norms(name):
        host = HOSTS[kind]()
        module = make(name, norm, host).eval()
        x, weight = torch.randn(4, 8, 5, 5, requires_grad=True), torch.randn(4, 8, 5, 5)
        (wanted,) = torch.autograd.grad((expected(host, x) * weight).sum(), x)
        (gradient,) = torch.autograd.grad((module(x, *quality(name)) * weight).sum(), x)
        torch.testing.assert_close(gradient, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_preserved_too(name):
    for norm in norms(name):
        module, x = make(name, norm, nn.GELU(), channel_dim=-1), torch.randn(4, 10, 8)
        assert torch.equal(module(x, *quality(name)), nn.functional.gelu(x))


def test_the_host_itself_is_left_as_it_was():
    host = nn.ReLU(inplace=True)
    make("qacon", "layer", host)(torch.randn(4, 8, 2, 2), *quality("qacon"))
    assert host.inplace
    prelu = nn.PReLU(8)
    assert make("qacon", "layer", prelu).host.weight is prelu.weight


class Swish(nn.Module):
    """A class of the name of SiLU that computes something else, as in some libraries."""

    def forward(self, x):
        return x * torch.sigmoid(1.7 * x)


class GELU(nn.Module):
    """A class of the name of GELU that computes its tanh approximation, as in some libraries."""

    def forward(self, x):
        return nn.functional.gelu(x, approximate="tanh")


@pytest.mark.parametrize("host", [Swish(), GELU()], ids=["Swish", "GELU"])
@pytest.mark.parametrize("name", NAMES)
def test_a_host_is_known_by_what_it_computes_and_not_by_its_name(host, name):
    x = torch.randn(4, 8, 4, 4) * 3
    assert torch.equal(make(name, norms(name)[0], host)(x, *quality(name)), host(x))
