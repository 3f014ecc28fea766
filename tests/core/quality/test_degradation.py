"""The quality function that names degradations, with the weights that come with the package."""

from pathlib import Path

import numpy as np
import pytest
import torch

import quac_plugins as quac
from quac_plugins.core.quality.degradation import CLEAN, KINDS, degradation
from quac_plugins.degradations import CORRUPTIONS, corrupt


def degraded(images, kind, severity):
    pixels = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    made = np.stack([corrupt(image, kind, severity, seed) for seed, image in enumerate(pixels)])
    return torch.from_numpy(made).permute(0, 3, 1, 2).float() / 255


@pytest.fixture(scope="module")
def told(photographs):
    """Kind → what is said of four photographs of 160×160."""
    images = photographs(4, 160)
    left = {"zoom_blur", "frost"}  # slow; with files that OpenCV 4.9 cannot open
    found = {kind: degradation(degraded(images, kind, 4)) for kind in CORRUPTIONS if kind not in left}
    return {CLEAN: degradation(images), **found}


def test_its_kinds_are_clean_and_the_corruptions():
    assert (CLEAN, *CORRUPTIONS) == KINDS
    function = quac.resolve_quality("degradation")
    assert (function.kinds, function.channels, function.function) == (KINDS, 17, degradation)
    assert quac.resolve_quality("brisque").kinds == ()
    weights = Path(quac.__file__).parent / "core/quality/degradation.safetensors"
    assert weights.stat().st_size < 120_000


def test_it_names_the_degradations_of_photographs(told):
    right = {kind: float((q[:, :16].argmax(1) == KINDS.index(kind)).float().mean()) for kind, q in told.items()}
    noises = told["shot_noise"][:, 1:3].sum(1)  # which look alike
    assert float(noises.min()) > 0.5
    assert right.pop(CLEAN) >= 0.75
    assert sum(right.values()) / len(right) > 0.7
    severe = torch.cat([q[:, 16] for kind, q in told.items() if kind not in (CLEAN, "brightness", "elastic_transform")])
    assert float(severe.mean()) > 2.5 > float(told[CLEAN][:, 16].mean())


def test_probabilities_and_a_severity_whatever_comes_in(photographs):
    images = photographs(3, 48)
    images[0] = 0.5
    images[1, :, 3, 5] = torch.nan
    images[2, 0, 0, 0] = torch.inf
    for x in (images, images.double(), images.half(), images[:, :, :1, :1], images[:, :1]):
        q = degradation(x)
        assert q.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
        assert bool(q.isfinite().all())
        torch.testing.assert_close(q[:, :16].sum(1), torch.ones(3, dtype=q.dtype))
        assert bool(((q[:, 16] >= 0) & (q[:, 16] <= 5)).all())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(degradation(images), degradation(images))


def test_alone_in_a_batch_and_in_a_graph_the_same(photographs):
    images = photographs(3, 64)
    expected = degradation(images)
    torch.testing.assert_close(
        torch.cat([degradation(image[None]) for image in images]), expected, atol=1e-4, rtol=1e-3
    )
    compiled = torch.compile(degradation, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images), expected, atol=1e-3, rtol=1e-2)
