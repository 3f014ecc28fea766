"""Small pictures packed into one ``.npz``, laid out as class folders."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np

from quac_plugins.core.files import write_file

__all__ = ["unpack"]

_KEYS = ("jpeg", "offsets", "labels", "classes")
_CLASS = re.compile(r"[\w][\w. -]*\Z")


def unpack(path: str | os.PathLike[str], folder: str | os.PathLike[str]) -> Path:
    """Write the pictures of a packed set, unchanged, as ``folder/CLASS/00000.jpg``, and return the folder.

    Args:
        path: an ``.npz`` with ``jpeg`` (uint8, all files one after another), ``offsets`` (N+1 positions of the files'
            starts and ends), ``labels`` (N class indices) and ``classes`` (names).
        folder: the folder, which is made if it is missing; existing pictures stay unchanged.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is no packed set; the message names the wrong part.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            jpeg, offsets, labels, classes = (arrays[key] for key in _KEYS)
    except Exception as error:  # what numpy raises for another file is not one class: EOFError, BadZipFile, KeyError, …
        raise ValueError(f"{path} is no packed set of pictures ({', '.join(_KEYS)}): {error}") from error
    names, labels = [str(name) for name in classes], labels.astype(np.int64)
    starts, ends = offsets[:-1].astype(np.int64), offsets[1:].astype(np.int64)
    for wrong, message in (
        (len(offsets) != len(labels) + 1, f"{len(offsets)} offsets for {len(labels)} labels, expected one more"),
        (((starts < 0) | (ends <= starts) | (ends > len(jpeg))).any(), "offsets that leave the bytes"),
        (len(labels) > 0 and not 0 <= labels.min() <= labels.max() < len(names), "labels that name no class"),
        (not all(_CLASS.match(name) for name in names), "classes that are no names of folders"),
        (names != sorted(set(names)), "classes that are not in the order of their names, by which folders are counted"),
    ):
        if wrong:
            raise ValueError(f"{path} holds {message}")
    for name in names:
        (Path(folder) / name).mkdir(parents=True, exist_ok=True)
    for index, label in enumerate(labels):
        file = Path(folder) / names[label] / f"{index:05}.jpg"
        if not file.exists():
            write_file(file, jpeg[starts[index] : ends[index]].tobytes(), sync=False)  # thousands, read at once
    return Path(folder)
