"""Where the detail of an image is: what mirrors, turns, blurs and noise do to the numbers."""

import numpy as np
import torch

from quac_plugins.core.quality.detail import CHANNELS, detail
from quac_plugins.degradations import corrupt

RINGS, COARSE_RINGS = slice(0, 3), slice(5, 8)  # radial over tangential
SIDES, DIAGONALS, BRIGHT = 3, 4, 12


def test_turned_and_mirrored_images_swap_directions(photographs):
    x = photographs(2, 96).double()
    q, turned, mirrored = detail(x), detail(x.transpose(2, 3)), detail(x.flip(3))
    signs = torch.ones(CHANNELS, dtype=torch.double)
    signs[SIDES] = -1
    torch.testing.assert_close(turned, q * signs)
    signs[SIDES], signs[DIAGONALS] = 1, -1
    torch.testing.assert_close(mirrored, q * signs)


def test_a_zoom_spares_the_tangents_and_noise_of_light_is_in_bright_parts(photographs):
    pixels = (photographs(2, 128) * 255).byte().permute(0, 2, 3, 1).numpy()

    def of(kind):
        changed = np.stack([corrupt(picture, kind, 3, seed) for seed, picture in enumerate(pixels)])
        return detail(torch.from_numpy(changed).permute(0, 3, 1, 2).float() / 255)

    clean, zoomed = detail(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255), of("zoom_blur")
    assert bool((zoomed[:, 1:3] < clean[:, 1:3] - 0.2).all())
    assert float((of("shot_noise") - of("gaussian_noise"))[:, BRIGHT].min()) > 0.1


def test_any_size_alone_and_in_a_batch_finite_with_gradients(photographs):
    for size in ((1, 1), (1, 40), (7, 2), (33, 50)):
        x = photographs(3, 64)[..., : size[0], : size[1]].requires_grad_()
        q = detail(x)
        assert q.shape == (3, CHANNELS)
        torch.testing.assert_close(q, torch.cat([detail(image[None]) for image in x]))
        (gradient,) = torch.autograd.grad(q.sum(), x)
        assert bool(q.isfinite().all())
        assert bool(gradient.isfinite().all())
    assert bool(detail(torch.full((1, 3, 64, 64), 0.5)).isfinite().all())
