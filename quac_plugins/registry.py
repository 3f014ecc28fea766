"""Reads registry/ and hub/, which ship in the wheel as package data and lie at the top of a checkout."""

from __future__ import annotations

import sys
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def data_folder(name: str) -> Path:
    """The folder ``registry`` or ``hub``: in the wheel inside the package, in a checkout beside it.

    Raises:
        FileNotFoundError: the installation holds no such folder.
    """
    package = Path(str(resources.files("quac_plugins")))
    for folder in (package / "_data" / name, package.parent / name):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"this installation of quac_plugins holds no {name}/ folder; reinstall the package")


def registry_file(name: str) -> str:
    """Path of a file of the registry, such as ``"timm.toml"``.

    Raises:
        FileNotFoundError: there is no such file; the message lists those that are.

    Example:
        >>> registry_file("timm.toml").endswith("timm.toml")
        True
    """
    folder = data_folder("registry")
    path = (folder / name).resolve()
    if not path.is_file() or folder.resolve() not in path.parents:
        known = sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file() and f.name[0] != ".")
        raise FileNotFoundError(f"the registry has no file {name!r}; it has: {', '.join(known)}")
    return str(path)


@lru_cache(maxsize=1)
def published() -> dict[str, dict[str, Any]]:
    """Published models by name, ``NAME_qacon.TAG`` → entry, from ``registry/timm.toml``."""
    with open(registry_file("timm.toml"), "rb") as file:
        return tomllib.load(file)
