"""Luminance and half size in C++: to the bit what they are operation by operation."""

import pytest
import torch

from quac_plugins.core.quality import brisque as by_operation
from quac_plugins.core.quality.brisque_cpu import scales_of

SHAPES = [
    (2, 3, 224, 224), (3, 3, 37, 51), (1, 1, 64, 33), (2, 3, 1, 1), (1, 3, 1, 9), (1, 3, 2, 2), (1, 3, 3, 2),
    (2, 3, 65, 130), (1, 1, 5, 300),
]  # fmt: skip


def check(images):
    grey = by_operation._grey(images)
    down, across = (by_operation._taps(size, max(1, size // 2), images) for size in images.shape[2:])
    found = scales_of(by_operation._compiled(), images, across, down)
    assert torch.equal(found[0], grey)
    assert torch.equal(found[1], by_operation._halve(grey))


@pytest.mark.parametrize("shape", SHAPES)
def test_scales_are_equal(shape):
    images = torch.rand(shape)
    check(images)
    check(3 * images - 1)
    check((images * 255).round() / 255)
    broken = images.clone()
    broken[0, 0].view(-1)[::7] = float("nan")
    broken[-1, -1].view(-1)[::5] = float("inf")
    broken[-1, -1].view(-1)[::3] = -float("inf")
    check(broken)


def test_scales_of_photographs_are_equal(photographs):
    for images in (photographs(3, 200), photographs(2, 151)):
        check(images)
        check(images.contiguous(memory_format=torch.channels_last))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_signs_and_modes(dtype, photographs, monkeypatch):
    images = photographs(2, 64).to(dtype)
    monkeypatch.setenv("QUAC_KERNELS", "native")
    expected = by_operation.brisque(images)
    torch.testing.assert_close(by_operation.brisque(torch._neg_view(-images)), expected)
    with torch.device("meta"):
        torch.testing.assert_close(by_operation.brisque(images), expected)
    torch.testing.assert_close(by_operation.brisque(torch.nn.Parameter(images, requires_grad=False)), expected)
