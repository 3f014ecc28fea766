"""The expression over flat tensors: in equal parts and whole, as it is and compiled."""

import pytest
import torch
from test_gpu import numbers

from quac_plugins.core.activations.forms import FORMS
from quac_plugins.core.activations.loops import PART, _part, gradients, in_torch, value


@pytest.mark.parametrize(
    ("count", "compiled"), [(3136, False), (16199, False), (197, False), (49, False), (1, False), (3136, True)]
)
def test_rows_in_parts(count, compiled):
    flat, c, _ = numbers("acon", (2, count, 3), torch.float64, False)
    flat, c = [t.mT.contiguous() for t in flat], c.double()
    by_x, sums = in_torch(flat, c, "acon", (), "", True, compiled)
    expected, parts = gradients("acon", *flat, list(c.unsqueeze(3)), [], "")
    torch.testing.assert_close(by_x, expected)
    torch.testing.assert_close(sums, torch.stack([part.sum(2) for part in parts]))
    assert by_x.shape == flat[1].shape
    assert by_x.is_contiguous()


@pytest.mark.parametrize("by_rows", [False, True])
@pytest.mark.parametrize(("equation", "compiled"), [*((equation, False) for equation in FORMS), ("acon", True)])
def test_values(equation, by_rows, compiled):
    (_, x), c, neutral = numbers(equation, (2, 50, 3), torch.float32, True)
    x = x.mT.contiguous() if by_rows else x
    y = in_torch([x], c, equation, neutral, "relu", by_rows, compiled)
    shaped = list(c.double().unsqueeze(3 if by_rows else 2))
    torch.testing.assert_close(
        y.double(), value(equation, x.double(), shaped, list(neutral), "relu"), rtol=1e-5, atol=1e-5
    )


def test_parts_are_equal_and_long_enough():
    assert [_part(n) for n in (0, 1, 49, 128, 197, 256, 3136, 12544, 16199)] == [1, 1, 49, 128, 197, 128, 196, 128, 167]
    for n in range(1, 3000):
        part = _part(n)
        assert n % part == 0
        assert part == n or PART <= part < 16 * PART
