"""Reading a few photographs from any source into one form: uint8 RGB arrays with names.

Names matter as much as pixels: with a seed, they decide which images are chosen, and all later draws. A file is named
by its path below the common folder, so that a folder and a list of its files mean the same; an image without a file is
named by its place.
"""

from __future__ import annotations

import heapq
import itertools
import operator
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import IterableDataset

from quac_plugins.degradations import image_seed
from quac_plugins.images import EXTENSIONS, image_files, read_image, to_uint8

__all__ = ["FewImages", "few_images"]


@dataclass
class FewImages:
    """A few images with names and, where known, degraded versions and labels.

    Attributes:
        clean: the images, each uint8 of shape (H, W, 3) in RGB; their sizes may differ.
        degraded: for pairs, the degraded version of each image, in the same size; else None.
        names: a distinct name for each image: the path below the common folder, with ``/``, or ``image 0`` and so on
            for images without files.
        labels: class indices if every image came with an integer; else None.
        unreadable: paths or names of images that could not be read and are left out.
    """

    clean: list[np.ndarray]
    degraded: list[np.ndarray] | None = None
    names: list[str] = field(default_factory=list)
    labels: list[int] | None = None
    unreadable: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.clean)

    def only(self, indices: Iterable[int]) -> FewImages:
        """Return some of the images, in the order of ``indices``."""
        chosen = list(indices)
        degraded = None if self.degraded is None else [self.degraded[i] for i in chosen]
        labels = None if self.labels is None else [self.labels[i] for i in chosen]
        return FewImages([self.clean[i] for i in chosen], degraded, [self.names[i] for i in chosen], labels)


@dataclass(frozen=True)
class _Listed:
    """An image that is not read yet: its name, its place in the result, its name in messages, and how to read it."""

    name: str
    place: str | int
    where: str
    load: Callable[[], tuple[Any, Any]]
    """Returns the image and its label; raises OSError if it cannot be read."""


_Entry = tuple[_Listed, ...]
"""An image alone, or the clean and the degraded one of a pair."""


def few_images(
    images: Any = None,
    *,
    pairs: tuple[Any, Any] | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> FewImages:
    """Read a few images from any source, in an order that does not depend on the file system.

    Images are read by the rules of `quac_plugins.images`, turned as their EXIF says (photographs of a phone would lie
    on their side, also beside their partners in pairs), and files are sorted by name. A file that cannot be read is
    left out with a warning, unless nothing remains.

    Args:
        images, pairs, limit, seed: as the fields of `quac_plugins.fit.Data`. Of a Dataset with a length only the chosen
            items are asked for.

    Raises:
        FileNotFoundError: a folder or a file does not exist.
        TypeError: an item is no image, or an array of another dtype.
        ValueError: there are no images, or none can be read; an image is too small or has a wrong shape or range; pairs
            do not match; not exactly one of ``images`` and ``pairs`` is given; or ``limit`` is below 1.

    Example:
        >>> grey, colour = np.zeros((40, 50), np.uint8), torch.rand(3, 64, 48)
        >>> few = few_images([(grey, 3), (colour, 7)])
        >>> [image.shape for image in few.clean], few.names, few.labels
        ([(40, 50, 3), (64, 48, 3)], ['image 0', 'image 1'], [3, 7])
        >>> few_images(pairs=(colour / 2, colour), limit=1).degraded[0].max() < 129
        np.True_
    """
    if (images is None) == (pairs is None):
        both = "both" if images is not None else "neither"
        raise ValueError(f"give either images or pairs=(degraded, clean), got {both}")
    if limit is not None and operator.index(limit) < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    entries = _alone(images) if pairs is None else _matched(pairs)
    if isinstance(entries, list):
        _check_names([entry[0].name for entry in entries])
    read: list[tuple[_Listed, list[np.ndarray], int | None]] = []
    unreadable: dict[str, OSError] = {}
    for entry in _in_order(entries, limit, seed):
        if len(read) == limit:
            break
        pixels, labels = [], []
        for listed in entry:
            try:
                image, label = listed.load()
                pixels.append(to_uint8(image, listed.where))  # PIL may put decoding off until now
            except OSError as error:
                unreadable[listed.where] = error
                continue
            labels.append(_label(label))
            _check_side(pixels[-1], listed.where)
        if len(pixels) == len(entry):
            _check_pair(entry, pixels)
            read.append((entry[0], pixels, next((label for label in labels if label is not None), None)))
    if not read and not unreadable:
        raise ValueError("there are no images: give at least one")
    _report(unreadable, bool(read))
    read.sort(key=lambda item: item[0].place)
    known = [label for _, _, label in read if label is not None]
    return FewImages(
        clean=[pixels[0] for _, pixels, _ in read],
        degraded=None if pairs is None else [pixels[1] for _, pixels, _ in read],
        names=[listed.name for listed, _, _ in read],
        labels=known if len(known) == len(read) else None,
        unreadable=sorted(unreadable),
    )


def _in_order(entries: list[_Entry] | Iterator[_Entry], limit: int | None, seed: int) -> Iterable[_Entry]:
    """Return the entries in the order in which a limit takes them."""
    if limit is None:
        return entries

    def key(entry: _Entry) -> tuple[int, str | int]:
        return image_seed(seed, "limit", 0, entry[0].name), entry[0].place

    if isinstance(entries, list):
        return sorted(entries, key=key)
    return heapq.nsmallest(limit, entries, key=key)  # holds no more than these, however long the stream


def _alone(images: Any) -> list[_Entry] | Iterator[_Entry]:
    listed = _listed(images)
    return [(item,) for item in listed] if isinstance(listed, list) else ((item,) for item in listed)


def _listed(source: Any, role: str = "") -> list[_Listed] | Iterator[_Listed]:
    """List the images of a source; ``role`` tells the two sources of pairs apart in messages."""
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        return _folder(path, once=not role) if path.is_dir() else _files([path])
    if isinstance(source, Mapping | Set | bytes):
        raise TypeError(f"{role}images are given as {type(source).__name__}; expected {_KINDS}")
    if isinstance(source, np.ndarray | torch.Tensor | Image.Image):
        source = [source]
    lazy = hasattr(source, "__len__") and hasattr(source, "__getitem__") and not isinstance(source, IterableDataset)
    if lazy and not isinstance(source, list | tuple):
        listed = [_unread(source, index, f"{role}image {index}") for index in range(len(source))]
        if not listed:
            raise ValueError(f"there are no {role}images: give at least one")
        return listed
    if not isinstance(source, Iterable):
        raise TypeError(f"{role}images are given as {type(source).__name__}; expected {_KINDS}")
    stream = iter(source)
    first = list(itertools.islice(stream, 1))
    if not first:
        raise ValueError(f"there are no {role}images: give at least one")
    stream = itertools.chain(first, stream)
    if isinstance(first[0], str | os.PathLike):
        return _files(list(stream))
    if isinstance(first[0], tuple) and len(first[0]) == 2 and isinstance(first[0][0], str | os.PathLike):
        return _labelled_files(list(stream))
    return _unstacked(stream, role)


_KINDS = "a folder, files, arrays, tensors, PIL images, or a Dataset or another iterable of these"


def _labelled_files(items: list[Any]) -> list[_Listed]:
    """List tuples (file, label), as the samples of torchvision's ImageFolder are."""
    odd = next((item for item in items if not isinstance(item, tuple) or len(item) != 2), None)
    if odd is not None:
        raise TypeError(f"a list of tuples (file, label) holds a {type(odd).__name__} too")
    listed = _files([path for path, _ in items])
    return [
        replace(file, load=partial(lambda load, label: (load()[0], label), file.load, label))
        for file, (_, label) in zip(listed, items, strict=True)
    ]


def _folder(folder: Path, once: bool) -> list[_Listed]:
    files = image_files(folder, once)
    if not files:
        raise ValueError(f"no images below {folder} (extensions: {', '.join(sorted(EXTENSIONS))})")
    return [_file(path, path.relative_to(folder).as_posix()) for path in files]


def _files(paths: list[Any]) -> list[_Listed]:
    """List files in the given order."""
    odd = next((path for path in paths if not isinstance(path, str | os.PathLike)), None)
    if odd is not None:
        raise TypeError(f"a list of files holds a {type(odd).__name__} too: give files alone, or images alone")
    files = [Path(path) for path in paths]
    folders = [str(path) for path in files if path.is_dir()]
    if folders:
        raise ValueError(f"a list of files holds folders: {_some(folders)}; give one folder, or the files in them")
    missing = [str(path) for path in files if not path.exists()]
    if missing:
        raise FileNotFoundError(f"there is no file or folder {_some(missing)}")
    places = [Path(os.path.abspath(path)) for path in files]
    shared = os.path.commonpath([place.parent for place in places])
    return [_file(path, place.relative_to(shared).as_posix()) for path, place in zip(files, places, strict=True)]


def _file(path: Path, name: str) -> _Listed:
    return _Listed(name, name, str(path), lambda: (read_image(path, upright=True), None))


def _unread(dataset: Any, index: int, where: str) -> _Listed:
    return _Listed(f"image {index}", index, where, lambda: _split(dataset[index], where))


def _unstacked(items: Iterable[Any], role: str) -> Iterator[_Listed]:
    """List the images of items, of which arrays and tensors of four dimensions are stacks."""
    count = itertools.count()
    for item in items:
        image, label = _split(item, f"an item of the {role}images")
        stacked = isinstance(image, np.ndarray | torch.Tensor) and image.ndim == 4
        images = image if stacked else [image]
        labels = label if stacked and hasattr(label, "__len__") and len(label) == len(images) else [label] * len(images)
        for picture, its_label in zip(images, labels, strict=True):
            index = next(count)
            yield _Listed(f"image {index}", index, f"{role}image {index}", partial(tuple, (picture, its_label)))


def _split(item: Any, where: str) -> tuple[Any, Any]:
    """Return (image, label) of an item: an image, or a tuple of it and perhaps its label."""
    if not isinstance(item, tuple | list):
        return item, None
    if len(item) not in (1, 2):
        raise TypeError(f"{where} is a {type(item).__name__} of {len(item)}; expected an image or (image, label)")
    image, label = item if len(item) == 2 else (item[0], None)
    if isinstance(label, Image.Image) or getattr(label, "ndim", 0) > 2:
        raise TypeError(f"{where} holds two images, not an image and its label: give pairs=(degraded, clean)")
    return image, label


def _label(label: Any) -> int | None:
    if isinstance(label, torch.Tensor) and label.ndim == 0:
        label = label.item()
    return int(label) if isinstance(label, int | np.integer) and not isinstance(label, bool) else None


def _matched(pairs: Any) -> list[_Entry]:
    """List pairs, the clean image first."""
    if not isinstance(pairs, tuple) or len(pairs) != 2:
        what = f"a {type(pairs).__name__}" + (f" of {len(pairs)}" if hasattr(pairs, "__len__") else "")
        raise ValueError(f"pairs must be a tuple (degraded, clean) of two folders, lists or Datasets, got {what}")
    degraded, clean = (list(_listed(source, role)) for source, role in zip(pairs, ("degraded ", "clean "), strict=True))
    folders = [isinstance(source, str | os.PathLike) and Path(source).is_dir() for source in pairs]
    if any(folders) and not all(folders):
        raise ValueError(
            f"pairs are given as a folder ({pairs[folders.index(True)]}) and something else, which cannot "
            "be matched: give two folders, or two lists in the same order"
        )
    if all(folders):
        by_stem = [_by_stem(listed, folder) for listed, folder in zip((degraded, clean), pairs, strict=True)]
        alone = [sorted(by_stem[i].keys() - by_stem[1 - i].keys()) for i in range(2)]
        if any(alone):
            told = (f"{_some(names)} only in {folder}" for names, folder in zip(alone, pairs, strict=True) if names)
            raise ValueError(
                f"pairs are matched by name without extension, and some have no partner: {'; '.join(told)}"
            )
        return [(listed, by_stem[0][stem]) for stem, listed in by_stem[1].items()]
    if len(degraded) != len(clean):
        raise ValueError(
            f"pairs are matched by order, but there are {len(degraded)} degraded and {len(clean)} clean images"
        )
    # One clean image may have several degraded versions; then these tell the pairs apart.
    named_by = clean if len({listed.name for listed in clean}) == len(clean) else degraded
    return [
        (replace(c, name=named.name, place=named.place), d)
        for d, c, named in zip(degraded, clean, named_by, strict=True)
    ]


def _by_stem(listed: list[_Listed], folder: Any) -> dict[str, _Listed]:
    stems = [PurePosixPath(item.name).with_suffix("").as_posix() for item in listed]
    twice = [stem for stem, count in Counter(stems).items() if count > 1]
    if twice:
        raise ValueError(f"pairs are matched by name without extension, but {folder} holds several of {_some(twice)}")
    return dict(zip(stems, listed, strict=True))


def _check_names(names: list[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"given more than once: {_some(twice)}; give every image once")


def _check_side(pixels: np.ndarray, where: str, least: int = 32) -> None:
    if min(pixels.shape[:2]) < least:
        raise ValueError(
            f"{where} is {_size(pixels)}, too small: the shorter side must be at least {least}; leave it out"
        )


def _check_pair(entry: _Entry, pixels: list[np.ndarray]) -> None:
    if len(pixels) == 2 and pixels[0].shape != pixels[1].shape:
        raise ValueError(
            f"the two of a pair must have one size, but {entry[1].where} is {_size(pixels[1])} and {entry[0].where} is "
            f"{_size(pixels[0])}; crop or resize one of them"
        )


def _size(pixels: np.ndarray) -> str:
    return f"{pixels.shape[1]}×{pixels.shape[0]} (width×height)"


def _report(unreadable: dict[str, OSError], any_read: bool) -> None:
    if unreadable and not any_read:
        first = next(iter(unreadable.values()))
        raise ValueError(f"no image is left: {len(unreadable)} could not be read, the first because: {first}")
    if unreadable:
        warnings.warn(
            f"{len(unreadable)} could not be read and are left out: {_some(sorted(unreadable))}", stacklevel=3
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
