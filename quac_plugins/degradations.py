"""The corruptions of ImageNet-C by name, severity and seed.

The images are made by the library `imagecorruptions` (the fork published as `imagecorruptions-imaug`), a port of the
code of D. Hendrycks and T. Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations", ICLR 2019. What is added here is what an evaluation needs around it:

- the result depends on the image, the name, the severity and the seed alone: not on what ran before, on the thread, or
  on the process. The library draws from numpy's global generator; it is seeded for the call and put back after it.
  `impulse_noise` and `glass_blur` have generators of their own (the one of `glass_blur` lives in numba, where
  `np.random.seed` does not reach); they are given the seed as an argument;
- images below the library's 32 pixels are mirrored up to 32 and the corner with the image is cut out again;
- a drop-less draw of `spatter`, where the library divides by zero and returns a black image, leaves the image alone.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import operator
import os
import threading
import warnings
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from quac_plugins.core.deprecated import renamed
from quac_plugins.core.quality.degradation import GROUPS, KINDS

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "CORRUPTIONS",
    "EXTRA_CORRUPTIONS",
    "GROUPS",
    "SEVERITIES",
    "Corrupt",
    "corrupt",
    "corruption_names",
    "image_seed",
]

CORRUPTIONS: tuple[str, ...] = KINDS[1:]
"""The 15 corruptions of ImageNet-C, in the paper's order."""

EXTRA_CORRUPTIONS: tuple[str, ...] = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
"""The 4 corruptions that the paper keeps for validation."""

SEVERITIES: tuple[int, ...] = (1, 2, 3, 4, 5)

_KNOWN = CORRUPTIONS + EXTRA_CORRUPTIONS
_SETS = {"all": CORRUPTIONS, "extra": EXTRA_CORRUPTIONS, "every": _KNOWN, "all+extra": _KNOWN, **GROUPS}
_OWN_GENERATOR = ("impulse_noise", "glass_blur")
_MIN_SIDE = 32
_LOCK = threading.Lock()


def _renew_lock() -> None:
    """Renew the lock in a forked process: another thread may have held it, so that waiting would not end."""
    global _LOCK
    _LOCK = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def corruption_names(spec: str | Iterable[str]) -> list[str]:
    """Resolve a description of corruptions into their names, without repetition, in the order given.

    Args:
        spec: names or sets of names, as one comma-separated string or an iterable of strings. Sets are ``"all"`` (the
            15 of the benchmark), ``"extra"`` (the 4 for validation), ``"every"`` or ``"all+extra"`` (the 19) and the
            groups ``"noise"``, ``"blur"``, ``"weather"``, ``"digital"``. Case does not matter, nor ``-`` for ``_``.

    Raises:
        ValueError: if a name is unknown.

    Example:
        >>> corruption_names("weather, contrast")
        ['snow', 'frost', 'fog', 'brightness', 'contrast']
        >>> len(corruption_names("all")), len(corruption_names(["every"]))
        (15, 19)
    """
    if not isinstance(spec, str) and not isinstance(spec, Iterable):
        raise ValueError(f"corruptions must be a string or several strings, got {type(spec).__name__}")
    names: dict[str, None] = {}
    for part in [spec] if isinstance(spec, str) else spec:
        if not isinstance(part, str):
            raise ValueError(f"a corruption is named by a string, got {part!r}")
        for word in part.split(","):
            key = word.strip().lower().replace("-", "_").replace(" ", "_")
            if key in _SETS:
                names.update(dict.fromkeys(_SETS[key]))
            elif key in _KNOWN:
                names[key] = None
            elif key:
                raise ValueError(_unknown(word.strip()))
    return list(names)


def _unknown(word: str) -> str:
    near = difflib.get_close_matches(word.lower(), [*_KNOWN, *_SETS], n=2)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    return f"unknown corruption {word!r}.{hint} Known: {', '.join(_KNOWN)}; sets: {', '.join(_SETS)}"


def check_severity(severity: Any) -> int:
    """Return the severity as an int in 1..5.

    Raises:
        ValueError: if it is anything else.
    """
    try:
        value = operator.index(severity)
    except TypeError:
        value = 0
    if isinstance(severity, bool) or value not in SEVERITIES:
        raise ValueError(f"severity must be an integer from 1 to 5, got {severity!r}")
    return value


def corrupt(image: np.ndarray | Image.Image, name: str, severity: int, seed: int = 0) -> np.ndarray:
    """Corrupt one image. The same arguments give the same result in every thread and process.

    numpy's global generator is left as it was. Calls from several threads take turns; code in other threads that
    draws from numpy's global generator at the same moment is outside of that lock.

    Args:
        image: uint8 of shape (H, W, 3) in RGB, (H, W) or (H, W, 1) in grey, or a PIL image of any mode. Any size.
        name: one of `CORRUPTIONS` or `EXTRA_CORRUPTIONS`.
        severity: 1 (mild) to 5 (severe).
        seed: an integer from 0 on; taken modulo 2**32.

    Returns:
        A new uint8 array of shape (H, W, 3), also for a grey image: frost and spatter have colours.

    Raises:
        ImportError: if `imagecorruptions` is not installed.
        TypeError: if the image is no uint8 array and no PIL image.
        ValueError: if its shape, the name or the severity is none of the above.

    Example:
        >>> image = np.full((48, 64, 3), 200, dtype=np.uint8)
        >>> foggy = corrupt(image, "fog", 3, seed=1)
        >>> foggy.shape, foggy.dtype
        ((48, 64, 3), dtype('uint8'))
        >>> bool((foggy == corrupt(image, "fog", 3, seed=1)).all())
        True
    """
    if name not in _KNOWN:
        raise ValueError(_unknown(str(name)))
    level, seed = check_severity(severity), operator.index(seed) % 2**32
    pixels = _as_rgb(image)
    height, width = pixels.shape[:2]
    pad = (max(0, _MIN_SIDE - height), max(0, _MIN_SIDE - width))
    padded = np.pad(pixels, ((0, pad[0]), (0, pad[1]), (0, 0)), mode="symmetric") if any(pad) else pixels
    library = _library()
    seeds = {"seed": seed} if name in _OWN_GENERATOR else {}
    with _LOCK, _global_numpy_seed(seed), np.errstate(invalid="raise" if name == "spatter" else "ignore"):
        try:
            result = library.corrupt(padded, severity=level, corruption_name=name, **seeds)
        except FloatingPointError:  # 0 / 0: not one drop of the spatter fell on this image
            result = padded
    return np.array(result[:height, :width])


def image_seed(seed: int, name: str, severity: int, key: str) -> int:
    """Return a seed of 32 bits for one image, the same on every machine and in every process.

    Args:
        seed: the seed of the whole run.
        name: the corruption.
        severity: its severity.
        key: what names the image, for instance its path inside the data set.

    Example:
        >>> image_seed(0, "fog", 3, "n01440764/1.jpg")
        3247320534
        >>> image_seed(0, "fog", 3, "n01440764/1.jpg") == image_seed(0, "fog", 3, "n01440764/2.jpg")
        False
    """
    text = "\0".join([str(operator.index(seed)), name, str(operator.index(severity)), key])
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=4).digest(), "big")


@renamed(severity="severities")
class Corrupt:
    """A transform that corrupts images, for the pipelines of torchvision and timm; put it before the tensor conversion.

    With several names or severities each image draws one of each. With a ``seed`` the draw and the noise are a function
    of the seed and of the image's pixels, so that neither the order nor the number of workers matters. Without one they
    come from torch's generator, which a ``DataLoader`` seeds differently for each worker and epoch: for training.

    Args:
        names: a corruption, a set of corruptions or several of them, as in `corruption_names`.
        severities: one severity or several, each from 1 to 5.
        seed: the seed, or None for fresh draws.

    Raises:
        ValueError: if there is no name or severity, or an unknown one.

    Example:
        >>> transform = Corrupt(["fog", "contrast"], severities=[1, 3], seed=0)
        >>> transform(np.zeros((40, 40, 3), dtype=np.uint8)).shape
        (40, 40, 3)
        >>> transform
        Corrupt(['fog', 'contrast'], severities=[1, 3], seed=0)
    """

    def __init__(self, names: str | Iterable[str], severities: int | Iterable[int] = 3, seed: int | None = 0):
        self.names = corruption_names(names)
        levels = severities if isinstance(severities, Iterable) else [severities]
        self.severities = [check_severity(level) for level in levels]
        self.seed = None if seed is None else operator.index(seed)
        if not self.names or not self.severities:
            raise ValueError("Corrupt needs at least one corruption and one severity")

    def __call__(self, image: np.ndarray | Image.Image) -> Any:
        """Corrupt an image as `corrupt` takes it; a PIL image gives a PIL image (RGB), an array gives an array."""
        pixels = _as_rgb(image)
        draw = self._draw(pixels)
        name = self.names[draw % len(self.names)]
        severity = self.severities[draw // len(self.names) % len(self.severities)]
        result = corrupt(pixels, name, severity, image_seed(draw, name, severity, ""))
        if isinstance(image, np.ndarray):
            return result
        from PIL import Image

        return Image.fromarray(result)

    def _draw(self, pixels: np.ndarray) -> int:
        if self.seed is None:
            import torch

            return int(torch.randint(2**62, (1,)))
        text = str((self.seed, pixels.shape)).encode() + np.ascontiguousarray(pixels).tobytes()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")

    def __repr__(self) -> str:
        return f"Corrupt({self.names}, severities={self.severities}, seed={self.seed})"


def _as_rgb(image: Any) -> np.ndarray:
    if hasattr(image, "convert") and hasattr(image, "mode"):
        from quac_plugins.images import to_uint8

        return to_uint8(image, upright=False)
    if not isinstance(image, np.ndarray):
        raise TypeError(f"expected a numpy array or a PIL image, got {type(image).__name__}")
    if image.dtype != np.uint8:
        raise TypeError(f"expected an image of dtype uint8 with values in 0..255, got {image.dtype}; round it first")
    if image.ndim == 2:
        image = image[..., None]
    if image.ndim != 3 or image.shape[2] not in (1, 3) or 0 in image.shape:
        raise ValueError(f"expected an image of shape (H, W), (H, W, 1) or (H, W, 3), got {image.shape}")
    return np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image


@contextlib.contextmanager
def _global_numpy_seed(seed: int) -> Iterator[None]:
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(state)


def _library() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import imagecorruptions
    except ImportError as error:
        message = f'corruptions need imagecorruptions: pip install "quac-plugins[evaluate]" ({error})'
        raise ImportError(message) from error
    return imagecorruptions
