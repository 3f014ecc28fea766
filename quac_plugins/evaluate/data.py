"""The images of a directory and their classes.

The structure tells two layouts apart:

- ``root/CLASS/**/image``: folders of classes, as torchvision's `ImageFolder`;
- ``root/CORRUPTION/SEVERITY/CLASS/**/image``: ImageNet-C, with the severities 1 to 5 as folder names.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from timm.data import ImageNetInfo, infer_imagenet_subset

from quac_plugins.core.deprecated import moved
from quac_plugins.core.files import read_json
from quac_plugins.degradations import image_seed
from quac_plugins.images import EXTENSIONS, folders_above, identity, image_files

__all__ = ["CLEAN", "ImageDirectory", "Item", "read_class_map"]

__getattr__ = moved(__name__, read_image="quac_plugins.images")
CLEAN = ("clean", 0)
"""The condition of images without corruption; a condition is a pair of corruption and severity."""

SYNSET = re.compile(r"n\d{8}")
_SPLITS = {"train", "val", "valid", "validation", "test"}


@dataclass(frozen=True)
class Item:
    """One image: its file, its class index and its name, the path below the classes' parent, with ``/``."""

    path: Path
    target: int
    key: str


class ImageDirectory:
    """The images of a directory and their classes.

    Class indices come from the first of these that applies: the class map; the place among the classes of ImageNet,
    when every folder is named by a synset (``n01440764``) and the network has as many classes as a known ImageNet;
    the place among the sorted folder names.

    Args:
        root: the directory.
        num_classes: the number of classes of the network, or None if unknown.
        class_map: a file as `read_class_map` reads it, or a mapping from folder name to class index.

    Attributes:
        conditions: maps (corruption, severity) to the list of its items, sorted by key. A directory of classes has one
            condition, `CLEAN`.
        is_imagenet_c: whether the second layout was found.

    Raises:
        FileNotFoundError: the directory or the class map does not exist.
        ValueError: there are no images, or a folder has no class index below ``num_classes``.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        num_classes: int | None = None,
        class_map: str | os.PathLike[str] | Mapping[str, int] | None = None,
    ):
        self.root = Path(root)
        if not self.root.is_dir():
            raise FileNotFoundError(f"there is no directory {self.root}")
        places = _imagenet_c_places(self.root)
        self.is_imagenet_c = bool(places)
        places = places or {CLEAN: self.root}
        names = sorted({folder.name for place in places.values() for folder in _folders(place)})
        if not names:
            raise ValueError(f"{self.root} holds no folders of classes; expected {self.root}/CLASS/image.jpg")
        inner = [name for name in names if name.lower() in _SPLITS]
        if inner and len(inner) == len(names) and class_map is None:
            raise ValueError(f"{self.root} holds splits, not classes: give one of them, such as {self.root / inner[0]}")
        self.class_to_index = _class_indices(names, num_classes, class_map)
        self.conditions = {condition: list(self._items(place)) for condition, place in places.items()}
        for condition, items in self.conditions.items():
            if not items:
                where = places[condition]
                raise ValueError(f"no images below {where} (extensions: {', '.join(sorted(EXTENSIONS))})")

    def _items(self, place: Path) -> Iterator[Item]:
        for folder in _folders(place):
            for path in image_files(folder):
                yield Item(path, self.class_to_index[folder.name], path.relative_to(place).as_posix())

    def limited(self, limit: int | None, seed: int) -> dict[tuple[str, int], list[Item]]:
        """Return the conditions with at most ``limit`` images each, the same images for every condition.

        The images of a class are put in an order that depends on the seed and their names alone, then the classes, in
        such an order too, give one image in turn. So ``limit`` images come from as many classes as possible.

        Raises:
            ValueError: the limit is below 1.
        """
        if limit is None:
            return self.conditions
        if limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}")
        keys = sorted({(item.target, item.key) for items in self.conditions.values() for item in items})
        classes: dict[int, list[str]] = {}
        for target, key in sorted(keys, key=lambda pair: image_seed(seed, "limit", 0, pair[1])):
            classes.setdefault(target, []).append(key)
        order = sorted(classes, key=lambda target: image_seed(seed, "class", 0, str(target)))
        turns = [(turn, place, key) for place, target in enumerate(order) for turn, key in enumerate(classes[target])]
        chosen = {key for _, _, key in sorted(turns)[:limit]}
        return {condition: [i for i in items if i.key in chosen] for condition, items in self.conditions.items()}


def read_class_map(path: str | os.PathLike[str]) -> dict[str, int]:
    """Read the class index of each folder.

    A ``.json`` file holds an object ``{"folder": index}`` or a list of folders in the order of their indices. Any other
    file is text: either every line is ``folder index``, or every line is a folder, the first having index 0.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file has another content.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no class map {path}")
    if path.suffix.lower() == ".json":
        content = read_json(path, what="the class map ")
    else:
        text = path.read_text(encoding="utf-8-sig")
        content = _parse_lines([line.strip() for line in text.splitlines() if line.strip()])
    if isinstance(content, list):
        content = {name: index for index, name in enumerate(content)}
    if not isinstance(content, dict) or not content:
        raise ValueError(f"the class map {path} must give folders and their indices")
    return _checked_map(content, str(path))


def _parse_lines(lines: list[str]) -> dict[str, int] | list[str]:
    pairs = [line.rsplit(None, 1) for line in lines]
    if all(len(pair) == 2 and pair[1].isdecimal() for pair in pairs):
        return {name: int(index) for name, index in pairs}
    return lines


def _checked_map(content: Mapping[str, int], where: str) -> dict[str, int]:
    for name, index in content.items():
        if not isinstance(name, str) or isinstance(index, bool) or not isinstance(index, int) or index < 0:
            raise ValueError(f"{where}: the class index of {name!r} must be an integer from 0 on, got {index!r}")
    return dict(content)


def _class_indices(
    names: list[str], num_classes: int | None, class_map: str | os.PathLike[str] | Mapping[str, int] | None
) -> dict[str, int]:
    if class_map is not None:
        mapping = _checked_map(class_map, "class_map") if isinstance(class_map, Mapping) else read_class_map(class_map)
        source = "the class map"
    else:
        mapping, source = _inferred_indices(names, num_classes)
    missing = [name for name in names if name not in mapping]
    if missing:
        raise ValueError(f"{source} has no index for {_some(missing)}; give a class map that names every folder")
    beyond = [name for name in names if num_classes and mapping[name] >= num_classes]
    if beyond:
        listed = ", ".join(f"{name} → {mapping[name]}" for name in beyond[:3])
        raise ValueError(f"the network has {num_classes} classes, but {source} gives {listed}")
    return {name: mapping[name] for name in names}


def _inferred_indices(names: list[str], num_classes: int | None) -> tuple[dict[str, int], str]:
    subset = infer_imagenet_subset({"num_classes": num_classes}) if num_classes else None
    synsets = [name for name in names if SYNSET.fullmatch(name)]
    if subset and synsets:
        return {name: i for i, name in enumerate(ImageNetInfo(subset).label_names())}, f"the list of {subset}"
    if num_classes and len(names) < num_classes:
        warnings.warn(
            f"{len(names)} folders for a network of {num_classes} classes: their indices are taken from their sorted "
            "order; give a class map if that is not meant",
            stacklevel=4,
        )
    elif all(name.isdecimal() for name in names) and names != sorted(names, key=int):
        warnings.warn("the folders are named by numbers, and sorted as text: 10 comes before 2", stacklevel=4)
    return {name: i for i, name in enumerate(names)}, "the sorted order of the folders"


def _imagenet_c_places(root: Path) -> dict[tuple[str, int], Path]:
    places = {}
    for corruption in _folders(root):
        severities = _folders(corruption)
        if not severities or any(folder.name not in "12345" or len(folder.name) != 1 for folder in severities):
            return {}
        for folder in severities:
            if not _folders(folder):
                return {}
            places[corruption.name, int(folder.name)] = folder
    return places


def _folders(root: Path) -> list[Path]:
    """Return the folders in a folder, sorted, without links that lead back to it or above it."""
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    above = folders_above(root)
    circles = [str(folder) for folder in folders if identity(folder) in above]
    if circles:
        warnings.warn(f"links that lead back to {root} are no folders of classes: {_some(circles)}", stacklevel=2)
    return [folder for folder in folders if str(folder) not in circles]


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
