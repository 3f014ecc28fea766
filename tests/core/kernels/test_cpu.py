import pytest
import torch

from quac_plugins.core.kernels import operator, plain


@pytest.mark.parametrize("dim", [1, -1], ids=["rows", "columns"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_nothing_is_written_after_the_ends_of_rows(dtype, dim, monkeypatch):
    monkeypatch.setenv("QUAC_KERNELS", "native")
    buffers = []

    def guarded(t):
        buffers.append(torch.full((t.numel() + 128,), 7.0, dtype=t.dtype))
        return buffers[-1][64:-64].view(t.shape)

    for n in range(1, 70):
        x = torch.randn(2, 3, n).to(dtype).requires_grad_()
        theta = [torch.randn(2, 3, 1) if dim == 1 else torch.randn(2, 1, n) for _ in range(3)]
        theta = [p.double() if dtype == torch.float64 else p for p in theta]
        expected = plain.acon(x, *theta)
        (gradient,) = torch.autograd.grad(expected.sum(), x)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty_like", guarded)
            y = operator.activate(x, [p.requires_grad_() for p in theta], plain.acon, dim)
            (by_x,) = torch.autograd.grad(y.sum(), x)
        tolerance = {"rtol": max(torch.finfo(dtype).eps, 1e-5), "atol": 1e-5}
        torch.testing.assert_close((y, by_x), (expected, gradient), **tolerance)
    assert len(buffers) >= 69 * 5  # y, and the gradients of x and of θ
    assert all((b[:64] == 7).all() and (b[-64:] == 7).all() for b in buffers)
