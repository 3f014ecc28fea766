"""Training pictures drawn from a few images: views of them, and degraded versions of the views.

A picture depends on the seed, the image's name, the view, the degradation and its number alone, and neither on other
images, nor on the order, nor on the number of processes. Degrading happens at the network's resolution, after the crop,
as in ImageNet-C.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import multiprocessing
import operator
import pickle
import random
import re
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from quac_plugins.core.deprecated import renamed
from quac_plugins.degradations import check_severity, corrupt, corruption_names, image_seed
from quac_plugins.evaluate.images import worker_init
from quac_plugins.fit.sources import FewImages, to_uint8

__all__ = ["Degrade", "Draws", "held_out", "make_draws", "own_degradations"]

Degrade = Callable[..., Any] | Mapping[str, Callable[..., Any]]
"""A user's own degradation, or several by name."""

_BATCH = 8  # pictures that a worker makes at a time
_ASPECTS = (3 / 4, 4 / 3)  # of a random crop, relative to the network's input


@dataclass
class Draws:
    """Views of images and their degraded versions, at the size (h, w) of the network's input.

    Attributes:
        clean: the views, uint8 (V, h, w, 3), image after image.
        degraded: the degraded pictures, uint8 (N, h, w, 3).
        view: int64 (N,), the index of each degraded picture's view.
        image: int64 (V,), the index of each view's image.
        kind: int64 (N,), the index of each picture's degradation in ``kinds``.
        kinds: the corruptions, then the names of the user's functions (``"degrade"`` for one without a name), or
            ``"pairs"``; then ``"clean"``, if some of ``degraded`` are undegraded views.
        severity: int64 (N,), the severity of a corruption; 0 for all others.
    """

    clean: np.ndarray
    degraded: np.ndarray
    view: np.ndarray
    image: np.ndarray
    kind: np.ndarray
    kinds: list[str]
    severity: np.ndarray

    def __len__(self) -> int:
        return len(self.degraded)


@renamed(workers="num_workers")
def make_draws(
    few: FewImages,
    size: tuple[int, int],
    *,
    corruptions: str | Iterable[str] = (),
    severities: int | Iterable[int] = (),
    views: int = 1,
    draws: int = 1,
    clean_share: float = 0.0,
    degrade: Degrade | None = None,
    seed: int = 0,
    num_workers: int = 0,
    crop: Callable[[Image.Image], torch.Tensor] | None = None,
    scales: tuple[float, float] = (0.5, 1.0),
) -> Draws:
    """Draw training pictures: for each image ``views`` views, for each view ``draws`` pictures of each degradation.

    The first view of an image is the whole image, as in an evaluation; the others are random crops, half of them
    mirrored. The degradations come from pairs, or from corruptions, the user's functions, or both.

    Args:
        few: the images. Their names must differ, since the randomness depends on them.
        size: (h, w) of the network's input.
        corruptions: names or sets of `quac_plugins.degradations.corruption_names`.
        severities: one or several, from 1 to 5; the pictures of a view take them in turn, from a random one on.
        views: the number of views of each image.
        draws: the number of pictures for each view and degradation; always one for pairs.
        clean_share: the share of undegraded views among all pictures, from 0 to below 1. They are added to the others.
        degrade: a function, or several by name, as in `quac_plugins.fit.Data`.
        seed: the seed of all draws.
        num_workers: the number of processes that degrade; 0 means this process. The result is the same.
        crop: a function PIL image → uint8 tensor (3, h, w) for the first view, such as
            `quac_plugins.evaluate.preprocessing.Crop`. None: resize until the image covers the size, and crop the
            middle.
        scales: the smallest and the largest side of a random crop, relative to the image's side.

    Raises:
        ImportError: corruptions are requested, and `imagecorruptions` is not installed.
        RuntimeError: ``degrade`` raises an error; the message names the image.
        TypeError: ``degrade`` returns no image.
        ValueError: an argument is out of range, there is not exactly one source of degradations, or ``degrade`` returns
            another size or range.

    Example:
        >>> few = FewImages([np.full((60, 80, 3), 90, np.uint8)], names=["grey"])
        >>> drawn = make_draws(few, (32, 32), corruptions="contrast,fog", severities=[2, 4], views=3, draws=2)
        >>> drawn.clean.shape, drawn.degraded.shape, drawn.kinds
        ((3, 32, 32, 3), (12, 32, 32, 3), ['contrast', 'fog'])
        >>> drawn.view.tolist(), drawn.kind.tolist()
        ([0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2], [0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1])
    """
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size must be (height, width) with sides from 1 on, got {tuple(size)}")
    names = corruption_names(corruptions)
    levels = [check_severity(s) for s in (severities if isinstance(severities, Iterable) else [severities])]
    functions = own_degradations(degrade)
    _check_sources(few, names, levels, functions)
    for what, value, least in (("views", views, 1), ("draws", draws, 1), ("num_workers", num_workers, 0)):
        if operator.index(value) < least:
            raise ValueError(f"{what} must be at least {least}, got {value}")
    if not 0 <= clean_share < 1:
        raise ValueError(f"clean_share must be at least 0 and below 1, got {clean_share}")
    keys = [f"{name}\0{view}" for name in few.names for view in range(views)]
    if few.degraded is not None:
        kinds, tasks = ["pairs"], [_Task(view, 0, 0, 0) for view in range(len(keys))]
    else:
        drawn = {**dict.fromkeys(names, levels), **{name: [0] for name in functions}}
        kinds, tasks = list(drawn), list(_tasks(keys, drawn, draws, seed))
    same = _identical(keys, len(tasks), clean_share, seed)
    image = np.repeat(np.arange(len(few)), views)
    clean = _views(few.clean, few.names, size, views, seed, crop, scales)
    degraded = np.empty((len(tasks) + len(same), *size, 3), dtype=np.uint8)
    if few.degraded is not None:
        degraded[: len(tasks)] = _views(few.degraded, few.names, size, views, seed, crop, scales)
    else:
        pictures = _Degraded(clean, tasks, kinds, [few.names[index] for index in image], functions)
        _fill(degraded[: len(tasks)], pictures, num_workers)
    degraded[len(tasks) :] = clean[same]
    return Draws(
        clean=clean,
        degraded=degraded,
        view=np.array([task.view for task in tasks] + same, dtype=np.int64),
        image=image,
        kind=np.array([task.kind for task in tasks] + [len(kinds)] * len(same), dtype=np.int64),
        kinds=kinds + ["clean"] * bool(same),
        severity=np.array([task.severity for task in tasks] + [0] * len(same), dtype=np.int64),
    )


def own_degradations(degrade: Degrade | None) -> dict[str, Callable[..., Any]]:
    """Return the user's own degradations by name; a function without a name is ``"degrade"``.

    Raises:
        ValueError: ``degrade`` is neither a function nor functions by name, or a name is taken by a corruption.

    Example:
        >>> list(own_degradations({"rain": lambda image: image})), list(own_degradations(lambda image: image))
        (['rain'], ['degrade'])
    """
    if degrade is None:
        return {}
    functions = dict(degrade) if isinstance(degrade, Mapping) else {"degrade": degrade}
    if not functions or not all(isinstance(name, str) and callable(f) for name, f in functions.items()):
        raise ValueError(f"degrade must be a function from image to image, or several by name, got {degrade!r}")
    if wrong := [name for name in functions if not re.fullmatch(r"\w[\w -]*", name)]:
        raise ValueError(f"degrade={{{wrong[0]!r}: …}}: a name has letters, digits, _, - and spaces, no others")
    if taken := sorted(set(functions) & {*corruption_names("every"), "clean", "identity", "pairs", "prior", "start"}):
        raise ValueError(f"degrade={{{taken[0]!r}: …}}: this name is taken; give the function another one")
    return functions


def held_out(n_images: int, share: float = 0.2, seed: int = 0) -> tuple[list[int], list[int]]:
    """Split the indices of images into those to train on and those to hold out, both sorted.

    Of several images the rounded share is held out, but at least one, and one remains; a single image is not held out.

    Raises:
        ValueError: there is no image, or the share is not above 0 and below 1.

    Example:
        >>> train, held = held_out(10)
        >>> len(train), len(held), held_out(1)
        (8, 2, ([0], []))
    """
    if n_images < 1:
        raise ValueError(f"there must be an image at least, got n_images={n_images}")
    if not 0 < share < 1:
        raise ValueError(f"share must be above 0 and below 1, got {share}")
    count = min(n_images - 1, max(1, math.floor(n_images * share + 0.5)))
    order = sorted(range(n_images), key=lambda index: image_seed(seed, "held out", 0, str(index)))
    return sorted(order[count:]), sorted(order[:count])


def _check_sources(few: FewImages, names: list[str], levels: list[int], functions: Mapping[str, Any]) -> None:
    if not few.clean:
        raise ValueError("there are no images to draw from")
    if len(set(few.names)) != len(few.clean) or len(few.names) != len(few.clean):
        raise ValueError(f"{len(few.clean)} images need as many different names, got {few.names}")
    if (few.degraded is not None) == bool(names or functions):
        got = "pairs beside others" if few.degraded is not None else "none"
        raise ValueError(f"give degradations: pairs of images, or else corruptions, degrade, or both; got {got}")
    if names and not levels:
        raise ValueError("corruptions are asked for, but no severity")


def _views(
    images: list[np.ndarray],
    names: list[str],
    size: tuple[int, int],
    views: int,
    seed: int,
    crop: Any,
    scales: tuple[float, float],
) -> np.ndarray:
    """Return the views, uint8 (images · views, h, w, 3). Boxes depend on size and name alone: pairs stay aligned."""
    result = np.empty((len(images) * views, *size, 3), dtype=np.uint8)
    for index, (pixels, name) in enumerate(zip(images, names, strict=True)):
        image = Image.fromarray(pixels)
        result[index * views] = _whole(image, size) if crop is None else _cropped(image, size, crop)
        for view in range(1, views):
            rng = np.random.default_rng(image_seed(seed, "view", view, name))
            result[index * views + view] = _random_view(image, size, rng, scales)
    return result


def _whole(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    scale = max(size[0] / image.height, size[1] / image.width)
    height, width = max(size[0], round(image.height * scale)), max(size[1], round(image.width * scale))
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(resized)[top : top + size[0], left : left + size[1]]


def _cropped(image: Image.Image, size: tuple[int, int], crop: Any) -> np.ndarray:
    pixels = crop(image)
    if not isinstance(pixels, torch.Tensor) or pixels.dtype != torch.uint8 or pixels.shape != (3, *size):
        what = f"{pixels.dtype} {tuple(pixels.shape)}" if isinstance(pixels, torch.Tensor) else type(pixels).__name__
        raise ValueError(f"crop must return a uint8 tensor of shape {(3, *size)}, got {what}")
    return pixels.permute(1, 2, 0).numpy()


def _random_view(
    image: Image.Image, size: tuple[int, int], rng: np.random.Generator, scales: tuple[float, float]
) -> np.ndarray:
    """Cut out a box of about the network's aspect, resize it, and mirror it half of the time."""
    scale = rng.uniform(*scales)
    aspect = math.exp(rng.uniform(math.log(_ASPECTS[0]), math.log(_ASPECTS[1])))
    place, mirrored = rng.random(2), rng.random() < 0.5
    unit = min(image.height / size[0], image.width / size[1]) * scale  # pixels of the image for one of the network
    height = min(image.height, max(1, round(size[0] * unit / math.sqrt(aspect))))
    width = min(image.width, max(1, round(size[1] * unit * math.sqrt(aspect))))
    top, left = (int(place[0] * (image.height - height + 1)), int(place[1] * (image.width - width + 1)))
    part = image.crop((left, top, left + width, top + height))
    pixels = np.asarray(part.resize((size[1], size[0]), Image.Resampling.BICUBIC))
    return pixels[:, ::-1] if mirrored else pixels


class _Task(NamedTuple):
    """One picture: its view, its kind, and the severity and the seed of the degradation."""

    view: int
    kind: int
    severity: int
    seed: int


def _tasks(keys: list[str], kinds: dict[str, list[int]], draws: int, seed: int) -> Iterator[_Task]:
    """Yield the pictures of every view; ``kinds`` maps each degradation to its severities."""
    for view, key in enumerate(keys):
        for kind, (name, levels) in enumerate(kinds.items()):
            first = image_seed(seed, name, 0, key)
            for draw in range(draws):
                severity = levels[(first + draw) % len(levels)]
                yield _Task(view, kind, severity, image_seed(seed, name, severity, f"{key}\0{draw}"))


def _identical(keys: list[str], count: int, share: float, seed: int) -> list[int]:
    """Return the views that are pictures too, as many as the share of all pictures demands."""
    order = sorted(range(len(keys)), key=lambda view: image_seed(seed, "clean", 0, keys[view]))
    return [order[i % len(order)] for i in range(round(count * share / (1 - share)))]


class _Degraded(Dataset):
    """Maps the index of a task to its picture, uint8 (h, w, 3)."""

    def __init__(
        self, clean: np.ndarray, tasks: list[_Task], kinds: list[str], images: list[str], functions: Mapping[str, Any]
    ):
        self.clean, self.tasks, self.kinds, self.images, self.functions = clean, tasks, kinds, images, functions

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, index: int) -> np.ndarray:
        task = self.tasks[index]
        kind = self.kinds[task.kind]
        if kind not in self.functions:
            return corrupt(self.clean[task.view], kind, task.severity, task.seed)
        return _by_function(self.functions[kind], self.clean[task.view], task.seed, self.images[task.view])


def _by_function(degrade: Any, pixels: np.ndarray, seed: int, image: str) -> np.ndarray:
    """Degrade a picture by a user's function."""
    name = getattr(degrade, "__name__", type(degrade).__name__)
    extra = {"rng": np.random.default_rng(seed)} if _takes_rng(degrade) else {}
    with _global_seeds(seed):
        try:
            result = degrade(pixels.copy(), **extra)
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            raise RuntimeError(f"the degrade function {name} failed on the image {image}: {what}") from error
    where = f"what the degrade function {name} returned for the image {image}"
    degraded = to_uint8(result, where)
    if degraded.shape != pixels.shape:
        got, expected = (f"{height}×{width}" for height, width, _ in (degraded.shape, pixels.shape))
        raise ValueError(f"{where} is {got} (height×width), expected {expected}, as it was given: resize it back")
    return degraded


def _takes_rng(function: Any) -> bool:
    try:
        parameter = inspect.signature(function).parameters.get("rng")
    except (TypeError, ValueError):  # functions of C may have no signature
        return False
    return parameter is not None and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)


@contextlib.contextmanager
def _global_seeds(seed: int) -> Iterator[None]:
    """Seed the global generators of Python, numpy and torch (on the CPU), and restore them."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class _Batches(Dataset):
    """Maps an index to a uint8 tensor of consecutive pictures, or to the error that one of them raised.

    An error that is raised in a worker reaches the user in the middle of a traceback, and the DataLoader then takes
    seconds to close.
    """

    def __init__(self, pictures: _Degraded):
        self.pictures = pictures

    def __len__(self) -> int:
        return -(-len(self.pictures) // _BATCH)

    def __getitem__(self, index: int) -> torch.Tensor | tuple[Exception, str]:
        indices = range(index * _BATCH, min((index + 1) * _BATCH, len(self.pictures)))
        try:
            return torch.from_numpy(np.stack([self.pictures[i] for i in indices]))
        except Exception as error:
            return error, traceback.format_exc()


def _fill(result: np.ndarray, pictures: _Degraded, num_workers: int) -> None:
    if not num_workers:
        for index in range(len(pictures)):
            result[index] = pictures[index]
        return
    if multiprocessing.get_start_method() != "fork":
        _check_can_be_sent(pictures.functions)
    batches = _Batches(pictures)
    loader = DataLoader(
        batches,  # type: ignore[arg-type]
        batch_size=None,
        num_workers=min(num_workers, len(batches)),
        worker_init_fn=worker_init,
        generator=torch.Generator(),
    )
    for index, batch in enumerate(loader):
        if not isinstance(batch, torch.Tensor):
            error, trace = batch
            raise error from RuntimeError(f"in a worker process:\n{trace}")
        result[index * _BATCH : index * _BATCH + len(batch)] = batch.numpy()


def _check_can_be_sent(functions: Mapping[str, Any]) -> None:
    try:
        pickle.dumps(dict(functions))
    except Exception as error:
        raise ValueError(
            f"the degrade function cannot be sent to worker processes ({error}): define it at the top of a module, or "
            "give num_workers=0"
        ) from error
