import pytest
import torch

from quac_plugins.core.activations import cpu


@pytest.mark.parametrize("by_rows", [True, False], ids=["rows", "columns"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_ends_of_rows_are_read_and_written_to_the_number(dtype, by_rows):
    """Whatever the length of a row, nothing after it is written, and half precision is float32 that is rounded once."""
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    rng = torch.Generator().manual_seed(0)
    options = ((), "", by_rows)
    forward, exact = (cpu.kernel("acon", t, *options, False, False) for t in (dtype, wide))
    for n in range(1, 70):
        sizes = (2, 3, n)
        count, channels = 6 * n, 3 if by_rows else n
        x = torch.randn(count, generator=rng).to(dtype)
        c = torch.rand(3, 2, channels, generator=rng).to(wide)
        y, expected = torch.full((count + 64,), 7.0, dtype=dtype), torch.empty(count, dtype=wide)
        forward(x, c, y, *sizes, 1)
        exact(x.to(wide), c, expected, *sizes, 1)
        torch.testing.assert_close(y[:count], expected.to(dtype), rtol=0, atol=0)
        assert (y[count:] == 7).all()
        inputs = torch.randn(count, generator=rng).to(dtype), x
        by_x, sums = cpu.run(tuple(t.view(sizes) for t in inputs), sizes, c, "acon", *options)
        exact_by_x, exact_sums = cpu.run(tuple(t.to(wide).view(sizes) for t in inputs), sizes, c, "acon", *options)
        torch.testing.assert_close(by_x, exact_by_x.to(dtype), rtol=0, atol=0)
        torch.testing.assert_close(sums, exact_sums, rtol=0, atol=0)
