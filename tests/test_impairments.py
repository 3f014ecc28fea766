"""Degradations to restore from: seeded, aligned, stronger with severity, of any size."""

import numpy as np
import pytest
from skimage import data
from skimage.metrics import peak_signal_noise_ratio

from quac_plugins.impairments import IMPAIRMENTS, Impair, impair

PHOTO = data.astronaut()[100:228, 150:310]


@pytest.mark.parametrize("name", IMPAIRMENTS)
def test_it_gets_worse_with_severity_and_is_seeded(name):
    images = [impair(PHOTO, name, severity, seed=3) for severity in (1, 2.5, 5)]
    assert all(image.shape == PHOTO.shape and image.dtype == np.uint8 for image in images)
    quality = [peak_signal_noise_ratio(PHOTO, image) for image in images]
    assert 38 > quality[0] > quality[1] > quality[2] > 5
    assert np.array_equal(images[0], impair(PHOTO, name, 1, seed=3))
    if name not in ("blur", "downscale", "jpeg"):
        assert not np.array_equal(images[2], impair(PHOTO, name, 5, seed=4))


@pytest.mark.parametrize("name", IMPAIRMENTS)
def test_pixels_stay_where_they_are(name):
    """The best match of the degraded image with the clean one is without a shift."""
    found = impair(PHOTO, name, 3, seed=0)[4:-4, 4:-4].astype(float)
    grey = found.mean(axis=2) - found.mean()
    scores = {}
    for dy in (-2, 0, 2):
        for dx in (-2, 0, 2):
            part = PHOTO[4 + dy : 124 + dy, 4 + dx : 156 + dx].astype(float).mean(axis=2)
            scores[dy, dx] = float((grey * (part - part.mean())).sum() / part.std())
    assert max(scores, key=scores.get) == (0, 0)


@pytest.mark.parametrize("name", IMPAIRMENTS)
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (3, 2), (33, 17)])
def test_any_size(name, size):
    image = np.full((*size, 3), 90, np.uint8)
    assert impair(image, name, 5).shape == image.shape


def test_a_mixture_is_put_on_in_the_order_of_a_camera():
    mixed = impair(PHOTO, ["jpeg", "haze"], 4, seed=1)
    assert np.array_equal(mixed, impair(PHOTO, ["haze", "jpeg"], 4, seed=1))
    assert peak_signal_noise_ratio(PHOTO, mixed) < peak_signal_noise_ratio(PHOTO, impair(PHOTO, "jpeg", 4))


def test_draws_are_seeded_and_some_stay_clean():
    draws = [Impair(clean=0.3, seed=5), Impair(clean=0.3, seed=5)]
    small = PHOTO[:32, :32]
    images = [[draw(small) for _ in range(30)] for draw in draws]
    assert all(np.array_equal(a, b) for a, b in zip(*images, strict=True))
    clean = sum(np.array_equal(image, small) for image in images[0])
    assert 2 < clean < 20
    assert all(np.array_equal(Impair(clean=1.0)(small), small) for _ in range(3))


def test_some_degradations_are_drawn_more_often_than_others(monkeypatch):
    drawn = []
    monkeypatch.setattr("quac_plugins.impairments.impair", lambda image, names, *rest: drawn.extend(names))
    draw = Impair({"jpeg": 3, "noise": 1}, clean=0, mixed=0)
    for _ in range(400):
        draw(PHOTO)
    assert 260 < drawn.count("jpeg") < 340
    assert len(drawn) == 400
    for weights, message in (({"jpeg": 0}, "above 0"), ({"jpeg": float("nan")}, "above 0"), ({"fog": 1}, "'fog'")):
        with pytest.raises(ValueError, match=message):
            Impair(weights)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((PHOTO, "hase", 3), ValueError, "unknown degradation 'hase'; did you mean 'haze'"),
        ((PHOTO, "haze", 0), ValueError, "severity must be a number from 1 to 5, got 0"),
        ((PHOTO, "haze", True), ValueError, "severity"),
        ((PHOTO / 255, "haze", 3), TypeError, "uint8 array, got float64"),
        ((PHOTO[..., 0], "haze", 3), ValueError, r"shape \(H, W, 3\)"),
        (("photo.jpg", "haze", 3), TypeError, "got str"),
    ],
)
def test_an_argument_that_cannot_be(arguments, error, message):
    with pytest.raises(error, match=message):
        impair(*arguments)
