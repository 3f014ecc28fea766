"""The kernel of Triton, which needs no GPU to be right: Triton's own interpreter runs it here."""

import importlib.util
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quac_plugins.core.activations import gpu
from quac_plugins.core.activations.forms import FORMS
from quac_plugins.core.activations.loops import HOSTED, gradients, on_gpu

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="torch brings Triton along on Linux only"
)
SIZES = [(2, 300, 37), (1, 128, 64), (3, 1, 5), (2, 129, 130), (1, 16, 1)]


def numbers(equation, sizes, dtype, inside):
    """Inputs, coefficients, and those of the start where something is added inside."""
    rng = torch.Generator().manual_seed(0)
    grad, x = (3 * torch.randn(sizes, generator=rng) for _ in range(2))
    form, (batch, _, channels) = FORMS[equation], sizes
    c = torch.stack(form.coefficients(*torch.rand(form.arity, batch, channels, generator=rng)))
    start = form.coefficients(*torch.rand(form.arity, generator=rng)) if inside else ()
    return [grad.to(dtype), x.to(dtype)], c, tuple(map(float, start))


def expected(flat, c, equation, neutral, host):
    """In float64, by the expression."""
    by_x, parts = gradients(equation, *(t.double() for t in flat), list(c.double().unsqueeze(2)), list(neutral), host)
    return by_x, torch.stack([part.sum(1) for part in parts])


def check(equation, dtype):
    """Runs where TRITON_INTERPRET was set before Triton was imported."""
    half = dtype != torch.float32
    plain, hosted = ((sizes, False, "") for sizes in SIZES), ((SIZES[1], True, host) for host in ("", *HOSTED))
    for sizes, inside, host in (*plain, *hosted):
        flat, c, neutral = numbers(equation, sizes, dtype, inside)
        by_x, sums = on_gpu(flat, c, equation, neutral, host, by_rows=False)
        exact, exact_sums = expected(flat, c, equation, neutral, host)
        torch.testing.assert_close(by_x.double(), exact, rtol=torch.finfo(dtype).eps if half else 1e-5, atol=1e-5)
        torch.testing.assert_close(sums.double(), exact_sums, rtol=1e-4, atol=1e-3)
        assert by_x.dtype == dtype
        assert sums.dtype == torch.float32


@needs_triton
def test_it_is_the_expression():
    code = "import itertools, test_gpu as t; [t.check(*c) for c in itertools.product(t.FORMS, t.gpu.DTYPES)]"
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@needs_triton
@pytest.mark.parametrize("host", ["", *HOSTED])
@pytest.mark.parametrize("equation", FORMS)
def test_it_compiles_for_a_gpu(equation, host):
    """To machine code, without one: reads and writes of 16 bytes, and nothing kept outside of registers."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    neutral = tuple(0.5 for _ in range(FORMS[equation].arity)) if host else ()
    kernel = gpu.kernel(equation, neutral, HOSTED[host][1] if host else None)
    pointers = {"grad_of": "*bf16", "x_of": "*bf16", "c_of": "*fp32", "by_x_of": "*bf16", "sums_of": "*fp32"}
    signature = pointers | dict.fromkeys(("batch", "rows", "channels", "pieces"), "i32")
    constants = {"PIECE": 128, "ROWS": 16, "BLOCK": 64}
    names, even = [*signature, *constants], [*pointers, "channels"]
    if "constants" in inspect.signature(ASTSource).parameters:  # Triton 3.2
        from triton.backends.compiler import AttrsDescriptor

        attributes = AttrsDescriptor()
        attributes.arg_properties = {"tt.divisibility": [names.index(name) for name in even]}
        source = ASTSource(kernel, signature, constants, attributes)
    else:
        attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in even}
        constexprs = {(names.index(name),): value for name, value in constants.items()}
        source = ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constexprs, attributes)
    made = compile(source, target=GPUTarget("cuda", 90, 32))
    text = made.asm["ptx"]
    assert made.asm["cubin"]
    assert re.search(r"ld\.global\S*\.v4\.b32", text)
    assert re.search(r"st\.global\S*\.v4\.b32", text)
    assert "local" not in text


def test_an_operation_without_a_counterpart():
    with pytest.raises(NotImplementedError, match="sin has no counterpart in Triton here"):
        gpu.source("prelu", (), lambda x: torch.sin(x))


def test_nothing_of_nothing():
    for sizes in ((0, 4, 3), (2, 0, 3), (2, 4, 0)):
        by_x, sums = gpu.backward(torch.ones(sizes), torch.ones(sizes), torch.ones(1, sizes[0], sizes[2]), "swish", ())
        assert by_x.shape == sizes
        assert torch.equal(sums.sum(1), torch.zeros(sizes[0], 1, sizes[2]))
