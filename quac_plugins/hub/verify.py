"""Whether files are what they are said to be: hash, size, and no pickle among the weights."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz")
_SHA1, _SHA256 = re.compile(r"[0-9a-f]{40}\Z"), re.compile(r"[0-9a-f]{64}\Z")


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    return _digest(hashlib.sha256(), path)


def check_file(path: Path, sha256: str | None = None, size: int | None = None, said_by: str = "the registry") -> None:
    """Refuse a file that is not the one that was published.

    Raises:
        ValueError: its size or its hash is another one.
    """
    if size is not None and path.stat().st_size != size:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, but {said_by} says {size}; {_AGAIN}")
    if sha256 is not None and (found := sha256_of(path)) != sha256:
        raise ValueError(f"{path} has the SHA-256 {found}, but {said_by} says {sha256}; {_AGAIN}")


def check_cached(path: Path) -> None:
    """Refuse a file of the Hub's cache that is not what the Hub said it sent.

    The cache names every file by the hash that the Hub gave: SHA-256 for large files, git's for small ones. Caches
    without links (Windows) keep no such names, and there nothing can be checked.

    Raises:
        ValueError: the bytes have another hash.
    """
    blob = path.resolve()
    if blob.parent.name != "blobs":
        return
    if _SHA256.match(blob.name):
        found = sha256_of(blob)
    elif _SHA1.match(blob.name):
        found = _digest(hashlib.sha1(f"blob {blob.stat().st_size}\0".encode(), usedforsecurity=False), blob)
    else:
        return
    if found != blob.name:
        raise ValueError(
            f"{path} is damaged: its hash is {found}, and the Hub said {blob.name}; {_AGAIN} "
            "(quac pull … --force, or force=True)"
        )


def refuse_pickles(names: Iterable[str], where: str, wanted: str) -> None:
    """Raise ValueError, with the way to convert, if weights are there only as files that can run code."""
    found = sorted(name for name in names if name.lower().endswith(PICKLES))
    if found:
        raise ValueError(
            f"{where} holds {found[0]} and no {wanted}. Such files can run any code when they are opened, so only "
            "safetensors are read. If you trust it, convert it: "
            f"safetensors.torch.save_file(torch.load({found[0]!r}, weights_only=True), {wanted!r})"
        )


_AGAIN = "it was changed or cut off on its way: fetch it again"


def _digest(digest: hashlib._Hash, path: Path) -> str:
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
