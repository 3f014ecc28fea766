"""The kernels of Triton, which need no GPU to be right: Triton's own interpreter runs them here."""

import importlib.util
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quac_plugins.core.kernels import operator
from quac_plugins.core.kernels.equations import FORMS
from quac_plugins.core.kernels.layouts import BELOW, layout_of

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="torch brings Triton along on Linux only"
)
SIZES = [((1, 600, 3), 2), ((2, 5, 70), 2), ((1, 2, 2100), 1), ((2, 37, 50), 1)]  # several tiles, pieces and groups


def check(equation, dtype):
    """Runs where TRITON_INTERPRET was set before Triton was imported."""
    from quac_plugins.core.kernels import gpu

    kernels = gpu.build(dtype)
    cases = [(*size, "", False) for size in (SIZES if equation is operator.plain.acon else SIZES[1:2])]
    if (equation, dtype) == (operator.plain.acon, torch.float32):
        cases += [(*SIZES[1 + k % 2 * 2], host, True) for k, host in enumerate(BELOW)]
    for sizes, channel, host, inside in cases:
        rng = torch.Generator().manual_seed(0)
        grad, x, given = (3 * torch.randn(sizes, generator=rng).to(dtype) for _ in range(3))
        count, channels = len(FORMS[equation].gather), sizes[channel]
        theta = [torch.rand(b, channels, generator=rng) for b in (sizes[0], 1, sizes[0])[:count]]
        start = (0.5, 0.25, 1.5)[:count] if inside else ()
        below = given if host == "below" else host
        options = (equation, start, below, layout_of(x.shape, x.stride(), channel))
        found = [kernels.run(None, x, theta, *options)]
        by_x, by = kernels.run(grad, x, theta, *options)
        wide, *theta = (t.double().requires_grad_() for t in (x, *theta))
        shaped = [operator.plain.per_channel(p, x, channel) for p in theta]
        y = operator._plain(wide, shaped, equation, start, below.double() if host == "below" else host)
        exact_by_x, *exact_by = torch.autograd.grad(y, [wide, *theta], grad.double())
        close = {"rtol": 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps, "atol": 2e-5}
        for one, other in ((found[0], y.detach()), (by_x, exact_by_x)):
            assert one.dtype == dtype
            torch.testing.assert_close(one.double(), other, **close)
        torch.testing.assert_close(
            [b.double().view_as(p) for b, p in zip(by, exact_by, strict=True)], exact_by, rtol=1e-4, atol=1e-3
        )
    for sizes in ((0, 4, 3), (2, 0, 3)):
        nothing = torch.ones(sizes)
        y, _ = kernels.run(
            nothing, nothing, [torch.ones(1, sizes[2])] * count, equation, (), "", (sizes[0], sizes[1], sizes[2], False)
        )
        assert y.shape == sizes


def test_they_are_the_expressions():
    code = "import itertools, test_gpu as t; from quac_plugins.core.kernels import gpu\n"
    code += "for case in itertools.product(t.FORMS, gpu.DTYPES): t.check(*case)\n"
    code += "t.operator._try(gpu.build(t.torch.float32), 'cpu', t.torch.float32)"
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}",
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("by_rows", [False, True], ids=["columns", "rows"])
@pytest.mark.parametrize("back", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("equation", FORMS, ids=lambda e: e.__name__)
def test_they_compile_for_a_gpu(equation, back, by_rows):
    """To machine code, without one: reads and writes of 16 bytes, and nothing kept outside of registers."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from quac_plugins.core.kernels import gpu

    kernel = gpu.backward if back else gpu.forward
    constants = {"EQUATION": equation.__name__, "START": True, "HOST": "relu", "PIXELS": 1024, "CHANNELS": 1}
    constants |= {"by_pixel": 1, "COUNT": len(FORMS[equation].gather), "TILES": 4}
    if not by_rows:
        constants |= {"PIXELS": 16, "CHANNELS": 64, "by_channel": 1}
        del constants["by_pixel"]
    names = list(inspect.signature(kernel.fn).parameters)
    constants = {name: value for name, value in constants.items() if name in names}
    pointers = [name for name in names if name.endswith("_of")]
    types = {name: "*fp32" if name.startswith(("t", "sums")) else "*bf16" for name in pointers}
    types |= dict.fromkeys(("s0", "s1", "s2"), "fp32")
    signature = {name: types.get(name, "i32") for name in names if name not in constants}
    even = [*pointers, "channels", "pixels", "by_batch", "by_channel", "by_pixel"]
    even = [name for name in even if name in signature]
    if "constants" in inspect.signature(ASTSource).parameters:  # Triton 3.2
        from triton.backends.compiler import AttrsDescriptor

        attributes = AttrsDescriptor()
        attributes.arg_properties = {"tt.divisibility": [names.index(name) for name in even]}
        source = ASTSource(kernel, signature, constants, attributes)
    else:
        attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in even}
        constexprs = {(names.index(name),): value for name, value in constants.items()}
        signature = {name: signature.get(name, "constexpr") for name in names}
        source = ASTSource(kernel, signature, constexprs, attributes)
    made = compile(source, target=GPUTarget("cuda", 90, 32))
    text = made.asm["ptx"]
    assert made.asm["cubin"]
    assert re.search(r"ld\.global\S*\.v4\.b32", text)
    assert re.search(r"st\.global\S*\.v4\.b32", text)
    assert "local" not in text
