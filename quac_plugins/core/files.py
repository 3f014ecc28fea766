"""Files that are written: whole or not at all, into what they name, and over no file that is none of ours.

Each is written beside its place, synced to the disk and renamed, so that neither a reader nor a crash sees a part of
it; those that belong together so that a reader can tell. What a path names is what is written: a device or a pipe gets
the bytes and stays what it is, a link leads to the file that is replaced. An error of the disk says which file it is
about, and what to do.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

__all__ = ["copy_files", "disk_errors", "read_json", "replacing", "same_file", "write_file"]

BESIDE = ".quac-save-"  # begins the name of a folder whose files are about to take their places
_NO_ROOM = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "your quota on this disk is used up",
    errno.EFBIG: "no file may become so large here (ulimit -f)",
    errno.EROFS: "the disk can only be read",
}
_DESCRIPTOR = re.compile(r"/(?:dev|proc/(?:self|thread-self|\d+))/fd/(\d+)\Z")
_STANDARD = {"/dev/stdin": 0, "/dev/stdout": 1, "/dev/stderr": 2}
_STALE = 3600  # seconds after which such a folder is one of a save that was killed


class _NotWritten(OSError):
    """An error of the disk whose message already names the file."""


@contextlib.contextmanager
def disk_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Name the file, and the reason, in the message of an error of the disk."""
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
    """Yield a folder to write files into; at the end the files move into ``folder``, whose other files stay.

    A folder that is not there yet appears with all of them at once. In one that is there each file is replaced at once,
    weights (``.safetensors``) first. Until the last one is, those that are left lie in a subfolder ``BESIDE…``, where
    :func:`quac_plugins.core.inject.adapter_files.read_adapter` finds the config of weights that have been replaced.

    Raises:
        OSError: a file could not be written; the old files are as before, unless the disk refuses a file after another
            has moved: then the remaining files stay in the subfolder, as after a kill.
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
            paths = sorted(beside.iterdir(), key=lambda path: path.suffix != ".safetensors")
            for path in paths:
                _sync(path)
            if new:
                with contextlib.suppress(OSError):  # it has appeared meanwhile
                    beside.rename(folder)
                    return
                folder.mkdir(exist_ok=True)
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


def write_file(path: str | os.PathLike[str], content: bytes, sync: bool = True) -> None:
    """Write a file: a reader sees the old one or the whole new one, never a part.

    The bytes first go to a temporary file in the same folder, which is made if it is missing. A link stays, and its
    target is replaced. A device, a pipe or ``/dev/stdout`` is written into.

    Args:
        path: the file.
        content: the new bytes.
        sync: put the bytes on the disk before the file gets its name; needed for a file that cannot be made again.

    Raises:
        OSError: the file cannot be written; the old file is as before.
    """
    with disk_errors(path):
        descriptor = _descriptor(path)
        if descriptor is not None:  # opened anew, a file behind it would be written over from its beginning
            sys.stdout.flush()
            with os.fdopen(os.dup(descriptor), "wb") as file:
                file.write(content)
            return
        target = Path(os.path.realpath(path))
        if target.exists() and not target.is_file():
            with open(target, "wb") as file:
                file.write(content)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(f".quac-{uuid.uuid4().hex}")
        try:
            beside.write_bytes(content)
            if target.exists():
                beside.chmod(target.stat().st_mode & 0o777)
            if sync:
                _sync(beside)
            os.replace(beside, target)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise


def copy_files(files: Iterable[Path], folder: str | os.PathLike[str], overwrite: bool = False) -> Path:
    """Copy files into a folder, which is made if it is missing: all of them, or none.

    Raises:
        FileExistsError: the folder holds another file of the same name, and ``overwrite`` is False.
        NotADirectoryError: the folder is a file.
        OSError: the files cannot be written.
    """
    folder, files = Path(folder), sorted(files)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file, not a folder to write into")
    for path in files:
        target = folder / path.name
        if target.is_dir():
            raise IsADirectoryError(
                f"{target} is a folder, and {path.name} would have to go there; give another folder"
            )
        if os.path.lexists(target) and not overwrite and not _equal(path, target):
            raise FileExistsError(
                f"{target} is there already, and is another file; give another folder, or --overwrite (overwrite=True)"
            )
    with replacing(folder) as beside:
        for path in files:
            shutil.copyfile(path, beside / path.name)
    return folder


def read_json(path: str | os.PathLike[str], most: int = 256 << 20, what: str = "") -> Any:
    """Read a JSON file from any source: a bad file raises an error and does no other harm.

    Args:
        path: the file.
        most: the largest size, in bytes.
        what: the beginning of error messages.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is too large, not UTF-8, not JSON, or nested too deeply.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{what}{os.fspath(path)} is no file that is there")
    if (size := os.path.getsize(path)) > most:
        raise ValueError(f"{what}{os.fspath(path)} has {size} bytes, where {most} are the most that can be expected")
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        told = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"{what}{os.fspath(path)} is not JSON that can be read: {told}") from error


def same_file(first: str | os.PathLike[str], second: str | os.PathLike[str]) -> bool:
    """Return whether two paths lead to one file, by links or by name; the file need not exist yet."""
    with contextlib.suppress(OSError):
        return os.path.samefile(first, second)
    return os.path.realpath(first) == os.path.realpath(second)


def _sync(path: Path) -> None:
    """Put the bytes of a file on the disk before it gets its name, so that a crash leaves the old or the new file."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _descriptor(path: str | os.PathLike[str]) -> int | None:
    """Return the number of the open file that a path such as ``/dev/stdout`` or ``/dev/fd/3`` stands for, or None."""
    name = os.path.abspath(path)
    for _ in range(40):
        if name in _STANDARD:
            return _STANDARD[name]
        if match := _DESCRIPTOR.match(name):
            return int(match[1])
        if not os.path.islink(name):
            return None
        name = os.path.normpath(os.path.join(os.path.dirname(name), os.readlink(name)))
    return None


def _equal(first: Path, second: Path) -> bool:
    same_size = second.is_file() and first.stat().st_size == second.stat().st_size
    return same_size and first.read_bytes() == second.read_bytes()
