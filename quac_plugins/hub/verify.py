"""Verifying files: hash, size, and no pickle among the weights."""

from __future__ import annotations

import contextlib
import hashlib
import re
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz")
_SHA1, _SHA256 = re.compile(r"[0-9a-f]{40}\Z"), re.compile(r"[0-9a-f]{64}\Z")


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    return _digest(hashlib.sha256(), path)


def check_file(path: Path, sha256: str | None = None, size: int | None = None, said_by: str = "the registry") -> None:
    """Refuse a file that differs from the published one.

    Raises:
        ValueError: the size or the hash differs.
    """
    if size is not None and path.stat().st_size != size:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, but {said_by} says {size}; {_AGAIN}")
    if sha256 is not None and (actual := sha256_of(path)) != sha256:
        raise ValueError(f"{path} has the SHA-256 {actual}, but {said_by} says {sha256}; {_AGAIN}")


def check_hash(path: Path, said: str) -> None:
    """Refuse a file that differs from the Hub's.

    Args:
        path: the file.
        said: the Hub's hash: SHA-256 of a large file, git's hash of a small one.

    Raises:
        ValueError: the file has another hash.
    """
    if _SHA256.match(said):
        actual = sha256_of(path)
    else:
        actual = _digest(hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False), path)
    if actual != said:
        raise ValueError(
            f"{path} is damaged: its hash is {actual}, and the Hub said {said}; {_AGAIN} "
            "(quac pull … --force, or force=True)"
        )


def check_cached(path: Path) -> None:
    """Refuse a file of the Hub's cache that differs from the Hub's, or whose hash the cache does not know.

    The cache names every file by its ETag, which is a hash on the Hub. Mirrors may send other ETags, and caches without
    links (Windows) keep no such names.

    Raises:
        ValueError: the file has another hash, or there is no hash to compare.
    """
    blob = path.resolve()
    if blob.parent.name != "blobs" or not (_SHA256.match(blob.name) or _SHA1.match(blob.name)):
        raise ValueError(
            f"{path} cannot be compared with what the Hub has, since the cache knows no hash of it (it keeps the ETag "
            "that came with a file, where it can make links), and HF_HUB_OFFLINE forbids to ask. So it is not read. "
            "Unset it, or download the files by hand from where you trust them, and give their folder"
        )
    check_hash(blob, blob.name)


def refuse_pickles(names: Iterable[str], where: str, wanted: str) -> None:
    """Raise a ValueError, with the way to convert, if the only weights are files that can run code."""
    pickles = sorted(name for name in names if name.lower().endswith(PICKLES))
    if pickles:
        raise ValueError(
            f"{where} holds {pickles[0]} and no {wanted}. Such files can run any code when they are opened, so only "
            "safetensors are read. If you trust it, convert it: "
            f"safetensors.torch.save_file(torch.load({pickles[0]!r}, weights_only=True), {wanted!r})"
        )


@contextlib.contextmanager
def no_larger_than(files: Iterable[Path]) -> Iterator[None]:
    """Refuse, inside the context, to build a network that is larger than its weights, whatever its config asks for.

    Args:
        files: safetensors with the weights.

    Raises:
        ValueError: the network has more parameters than the files can hold; or a file is damaged.
    """
    files, mine = list(files), threading.get_ident()
    most = sum(path.stat().st_size for path in files) + _SLACK  # a number has a byte at least
    tensors = 1000
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                tensors += 2 * len(file.keys())  # parts may be made and replaced
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from error
    sizes = [0, 0]

    def count(module: nn.Module, name: str, parameter: Any) -> None:
        if parameter is None or threading.get_ident() != mine:
            return
        sizes[0], sizes[1] = sizes[0] + 1, sizes[1] + parameter.numel()
        if sizes[0] > tensors or sizes[1] > most:
            raise ValueError(
                f"the config asks for a network far larger than its weights ({', '.join(path.name for path in files)}, "
                f"{most - _SLACK} bytes); it is not built"
            )

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


_SLACK = 1 << 23  # numbers beside those in the files, as of a classifier of the user's
_AGAIN = "it was changed or cut off on its way: fetch it again"


def _digest(digest: hashlib._Hash, path: Path) -> str:
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
