"""Degradations to restore from: same size, aligned pixel for pixel, of continuous strength, in any mixture.

Unlike the corruptions of ImageNet-C (:mod:`quac_plugins.degradations`), which move pixels about, every impairment has
a clean image that a network can learn to restore. The models are the usual ones: Gaussian blur and noise, JPEG, bicubic
down-scaling, a camera's curve and shot noise in the dark, streaks added for rain, and for haze I = J t + A (1 − t),
t = exp(−β d) (Koschmieder, 1924).
"""

from __future__ import annotations

import importlib
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np

from quac_plugins.core.options import one_of, whole_number

Impairment = Callable[[np.ndarray, float, np.random.Generator], np.ndarray]

IMPAIRMENTS: dict[str, Impairment] = {}
"""Name → function of an image (H, W, 3) in [0, 1], a strength from 0 to 1 and a generator; in the order of a camera:
what happens before the lens comes first, what a file format does last."""


def impairment(function: Impairment) -> Impairment:
    """Put a function into the table under its name."""
    IMPAIRMENTS[function.__name__] = function
    return function


def _between(low: float, high: float, strength: float) -> float:
    return low + (high - low) * strength


def _smooth(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Make a random field (H, W) from 0 to 1 that changes over about a third of the image."""
    from PIL import Image

    coarse = Image.fromarray(rng.random((4, 4)).astype(np.float32))
    field = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    return (field - field.min()) / max(float(np.ptp(field)), 1e-6)


def _scipy(part: str) -> Any:
    try:
        return importlib.import_module(f"scipy.{part}")
    except ImportError as error:
        raise ImportError(f'degradations need scipy: pip install "quac-plugins[evaluate]" ({error})') from error


@impairment
def haze(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Add air light that grows with a smooth depth: 67 % to 12 % of the farthest points' light are left."""
    height, width = image.shape[:2]
    upwards = np.linspace(1, 0, height)[:, None]
    depth = 0.3 + 0.7 * (0.5 * upwards + 0.5 * _smooth(rng, height, width))
    left = np.exp(-_between(0.4, 2.1, strength) * depth)[..., None]
    return image * left + rng.uniform(0.75, 0.95) * (1 - left)


@impairment
def rain(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Add bright streaks of one direction, 9 to 25 pixels long."""
    fftconvolve = _scipy("signal").fftconvolve

    length = round(_between(9, 25, strength))
    angle = rng.uniform(-0.5, 0.5)
    kernel = np.zeros((length, length))
    along = np.linspace(-0.5, 0.5, 4 * length) * (length - 1)
    rows, columns = along * math.cos(angle) + (length - 1) / 2, along * math.sin(angle) + (length - 1) / 2
    kernel[rows.round().astype(int), columns.round().astype(int)] = 1
    drops = (rng.random(image.shape[:2]) < _between(0.002, 0.012, strength)) * rng.uniform(0.4, 1, image.shape[:2])
    streaks = fftconvolve(drops, kernel, mode="same")
    return image + (0.8 * np.clip(streaks, 0, 1))[..., None] * (1 - image)


@impairment
def low_light(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Reduce the light through a camera's curve (gamma 2.2), and add the shot noise of dark pictures."""
    light = _between(0.5, 0.06, strength) * np.clip(image, 0, 1) ** 2.2
    photons = _between(4000, 1500, strength)
    return np.clip(rng.poisson(light * photons) / photons, 0, 1) ** (1 / 2.2)


@impairment
def blur(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Blur with a Gaussian of 0.6 to 3 pixels."""
    gaussian_filter = _scipy("ndimage").gaussian_filter

    return gaussian_filter(image, (*(_between(0.6, 3.0, strength),) * 2, 0), mode="reflect")


@impairment
def downscale(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Scale down by 1.5 to 4 and up again, bicubic."""
    from PIL import Image

    height, width = image.shape[:2]
    factor = _between(1.5, 4.0, strength)
    small = (max(round(width / factor), 1), max(round(height / factor), 1))
    picture = Image.fromarray(_bytes(image))
    smaller = picture.resize(small, Image.Resampling.BICUBIC)
    return np.asarray(smaller.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float64) / 255


@impairment
def noise(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Add white Gaussian noise of 8 to 50 of 255."""
    return image + rng.normal(0, _between(8, 50, strength) / 255, image.shape)


@impairment
def jpeg(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Compress as JPEG of quality 60 down to 8."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(_bytes(image)).save(file, "JPEG", quality=round(_between(60, 8, strength)))
    return np.asarray(Image.open(file), dtype=np.float64) / 255


def _bytes(image: np.ndarray) -> np.ndarray:
    return (np.clip(image, 0, 1) * 255).round().astype(np.uint8)


def impair(image: np.ndarray, names: str | Sequence[str], severity: Any, seed: int = 0) -> np.ndarray:
    """Degrade an image.

    Args:
        image: uint8 (H, W, 3), RGB.
        names: a name in ``IMPAIRMENTS``, or several, which are applied in the order of ``IMPAIRMENTS``.
        severity: a number from 1 (mild) to 5 (severe).
        seed: the seed; equal seeds give equal images.

    Returns:
        uint8 (H, W, 3), aligned with the image.

    Raises:
        TypeError: the image is no uint8 array.
        ValueError: the shape, a name or the severity is wrong.

    Example:
        >>> image = np.full((32, 48, 3), 128, np.uint8)
        >>> impair(image, ["noise", "jpeg"], 3).shape
        (32, 48, 3)
    """
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        got = image.dtype if isinstance(image, np.ndarray) else type(image).__name__
        raise TypeError(f"expected an image as a uint8 array, got {got}")
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"expected an image of shape (H, W, 3), got {image.shape}")
    wanted = [names] if isinstance(names, str) else list(names)
    for name in wanted:
        one_of("degradation", name, list(IMPAIRMENTS))
    if isinstance(severity, bool) or not isinstance(severity, Real) or not 1 <= float(severity) <= 5:
        raise ValueError(f"severity must be a number from 1 to 5, got {severity!r}")
    rng = np.random.default_rng(seed)
    values = image / 255
    for name, function in IMPAIRMENTS.items():
        if name in wanted:
            values = np.clip(function(values, (float(severity) - 1) / 4, rng), 0, 1)
    return _bytes(values)


class Impair:
    """A transform that draws degradations for training: one, a mixture of two, or none.

    Args:
        names: names in ``IMPAIRMENTS``, or name → relative frequency. None: all names, equally often.
        clean: the share of images that stay unchanged.
        mixed: the share of the degraded images that get two degradations.
        seed: the seed of the draws. Each worker of a loader has a copy of this object and draws the same: make one
            object for every image, with its own seed, where workers and epochs should differ.

    Raises:
        ValueError: a name, a weight or a share is wrong.

    Example:
        >>> Impair(seed=1)(np.zeros((16, 16, 3), np.uint8)).shape
        (16, 16, 3)
    """

    def __init__(
        self,
        names: Iterable[str] | Mapping[str, float] | None = None,
        clean: float = 0.1,
        mixed: float = 0.3,
        seed: int = 0,
    ):
        self.names = list(names) if names is not None else list(IMPAIRMENTS)
        for name in self.names:
            one_of("degradation", name, list(IMPAIRMENTS))
        whole_number("seed", seed, 0)
        if not self.names or not (0 <= clean <= 1 and 0 <= mixed <= 1):
            raise ValueError(f"Impair needs a name, and shares from 0 to 1, got {self.names}, {clean}, {mixed}")
        self.clean, self.mixed = clean, mixed
        self.shares: np.ndarray | None = None
        if isinstance(names, Mapping):
            weights = np.array([float(names[name]) for name in self.names])
            if not (np.isfinite(weights).all() and (weights > 0).all()):
                raise ValueError(f"how often a degradation is drawn must be a number above 0, got {dict(names)}")
            self.shares = weights / weights.sum()
        self.rng = np.random.default_rng(seed)

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Degrade an image, uint8 (H, W, 3); the errors are the ones of :func:`impair`."""
        if self.rng.random() < self.clean:
            return image
        count = 2 if self.rng.random() < self.mixed and len(self.names) > 1 else 1
        names = [str(name) for name in self.rng.choice(self.names, count, replace=False, p=self.shares)]
        return impair(image, names, float(self.rng.uniform(1, 5)), int(self.rng.integers(2**31)))
