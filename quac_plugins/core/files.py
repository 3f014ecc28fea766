"""Files that take the place of others: each at once, and those that belong together so that a reader can tell."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

BESIDE = ".quac-save-"  # begins the name of a folder whose files are about to take their places
_NO_ROOM = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "your quota on this disk is used up",
    errno.EFBIG: "no file may become so large here (ulimit -f)",
    errno.EROFS: "the disk can only be read",
}
_STALE = 3600  # seconds after which such a folder is one of a save that was killed


class _NotWritten(OSError):
    """An error of the disk that is told already."""


@contextlib.contextmanager
def disk_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Say of an error of the disk which file was not written, and why."""
    try:
        yield
    except OSError as error:
        reason = _NO_ROOM.get(error.errno or 0)
        if reason is None or isinstance(error, _NotWritten):
            raise
        told = _NotWritten(f"{os.fspath(path)} was not written: {reason}. Make room there, or give another place")
        told.errno = error.errno
        raise told from error


@contextlib.contextmanager
def replacing(folder: str | Path) -> Iterator[Path]:
    """A folder to write files into, which at the end take their places in ``folder``; others that lie there stay.

    A folder that is not there yet appears with all of them at once. In one that is there each file is replaced at once,
    weights (``.safetensors``) first. Until the last one is, those that are left lie in a subfolder ``BESIDE…``, where
    :func:`quac_plugins.core.inject.saved.read_adapter` finds the config of weights that have been replaced already.

    Raises:
        OSError: something could not be written; what was there is as it was, unless the disk refuses one of the files
            after another has taken its place: then those that are left stay in the subfolder, as after a kill.
    """
    folder = Path(folder)
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        new = not folder.exists()
        beside = (folder.parent if new else folder) / f"{BESIDE}{uuid.uuid4().hex}"
        beside.mkdir()
        left: list[Path] = []  # once the first has been moved: those whose place has still the old file
        try:
            yield beside
            if new:
                with contextlib.suppress(OSError):  # it has appeared meanwhile
                    beside.rename(folder)
                    return
                folder.mkdir(exist_ok=True)
            paths = sorted(beside.iterdir(), key=lambda path: path.suffix != ".safetensors")
            for place, path in enumerate(paths):
                os.replace(path, folder / path.name)
                left = paths[place + 1 :]
            for other in folder.glob(f"{BESIDE}*"):
                with contextlib.suppress(OSError):
                    if time.time() - other.stat().st_mtime > _STALE:
                        shutil.rmtree(other)
        finally:
            if not left:  # else a reader needs what is there, as after a kill
                shutil.rmtree(beside, ignore_errors=True)
