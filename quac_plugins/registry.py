"""Reading registry/ and hub/, which ship in the wheel as package data and lie at the top of a checkout."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from quac_plugins.core.files import write_file

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def data_folder(name: str) -> Path:
    """Return the folder ``registry`` or ``hub``: in the wheel inside the package, in a checkout beside it.

    Raises:
        FileNotFoundError: the installation does not hold the folder.
    """
    package = Path(str(resources.files("quac_plugins")))
    for folder in (package / "_data" / name, package.parent / name):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"this installation of quac_plugins holds no {name}/ folder; reinstall the package")


def registry_file(name: str) -> str:
    """Return the path of a file of the registry, such as ``"timm.toml"``.

    Raises:
        FileNotFoundError: the file does not exist; the message lists the existing files.

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


@dataclass(frozen=True)
class Entry:
    """A published model: one table of ``registry/timm.toml`` or ``registry/diffusers.toml``.

    Attributes:
        name: ``NAME.TAG``, as ``timm.create_model`` or ``QuACRestorationPipeline.from_pretrained`` takes it.
        kind: ``"adapter"`` (over the host's own weights), ``"model"`` (whole) or ``"pipeline"`` (of diffusers).
        sha256, size: hash, and size in bytes, of the weights' file.
        license: the SPDX name of the license.
        repo, revision: ``org/name`` on the Hub, and the commit. None: the files are embedded, in ``hub/NAME.TAG``.
        base: the tag of the host's weights under an adapter.
        input: mean, std, input_size, interpolation, crop_pct, num_classes, … of timm's pretrained config.
        model_args: arguments of ``timm.create_model`` with which the weights were trained.
        metrics: figure → value, such as ``top1`` and ``top1_std`` in percent, or ``psnr`` in dB.
    """

    name: str
    kind: str
    sha256: str
    size: int
    license: str
    repo: str | None = None
    revision: str | None = None
    base: str | None = None
    input: dict[str, Any] = field(default_factory=dict)
    model_args: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def architecture(self) -> str:
        """Return the name without the tag."""
        return self.name.partition(".")[0]

    @property
    def tag(self) -> str:
        """Return the part of the name after the dot."""
        return self.name.partition(".")[2]

    @property
    def folder(self) -> Path:
        """Return the folder of the embedded files, which may not exist."""
        return data_folder("hub") / self.name


_INPUT = (
    "mean",
    "std",
    "input_size",
    "interpolation",
    "crop_pct",
    "num_classes",
    "pool_size",
    "first_conv",
    "classifier",
)
KINDS = {"timm": ("adapter", "model"), "diffusers": ("pipeline",)}  # registry file → what it holds
_NAME = re.compile(r"[a-z0-9_]+\.[a-z0-9_]+\Z")
_TYPES = {"size": int, "input": dict, "model_args": dict, "metrics": dict}


def is_published_name(name: str) -> bool:
    """Return whether a name has the form ``NAME.TAG``, of lower-case letters, digits and ``_``."""
    return _NAME.match(name) is not None


def read_entries(path: str | Path) -> dict[str, Entry]:
    """Read every entry of a registry file, checked field by field.

    Raises:
        ValueError: the file is no TOML, or a field is missing, unknown or of a wrong type; the message names it.
    """
    try:
        tables = read_toml(path)
        kinds = KINDS.get(Path(path).stem, tuple(kind for kinds in KINDS.values() for kind in kinds))
        return {name: _entry(name, table, kinds) for name, table in tables.items()}
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is no TOML: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_toml(path: str | Path) -> dict[str, Any]:
    """Read the tables of a TOML file; ValueError for any other file."""
    with open(path, "rb") as file:
        return tomllib.load(file)


def _entry(name: str, table: Any, kinds: tuple[str, ...]) -> Entry:
    where = f'["{name}"]'
    if not is_published_name(name):
        raise ValueError(f"{where}: a published model is named NAME.TAG, of lower-case letters, digits and _")
    if not isinstance(table, dict):
        raise ValueError(f"{where} must be a table, got {table!r}")
    known = {f.name: f for f in fields(Entry) if f.name != "name"}
    needed = [key for key, f in known.items() if f.default is MISSING and f.default_factory is MISSING]
    for problem, keys in (
        ("unknown", sorted(set(table) - set(known))),
        ("missing", [key for key in needed if key not in table]),
    ):
        if keys:
            raise ValueError(f"{where}: {problem} {', '.join(keys)}; an entry has {', '.join(known)}")
    for key, value in table.items():
        wanted = _TYPES.get(key, str)
        if not isinstance(value, wanted) or isinstance(value, bool):
            raise ValueError(f"{where}: {key} must be of type {wanted.__name__}, got {value!r}")
    entry = Entry(name=name, **table)
    for wrong, message in (
        (entry.kind not in kinds, f"kind must be {' or '.join(map(repr, kinds))}, got {entry.kind!r}"),
        (
            not re.fullmatch(r"[0-9a-f]{64}", entry.sha256),
            f"sha256 must be 64 hexadecimal digits, got {entry.sha256!r}",
        ),
        (entry.size < 1, f"size must be in bytes, got {entry.size}"),
        ((entry.repo is None) != (entry.revision is None), "repo and revision go together"),
        (
            entry.revision is not None and not re.fullmatch(r"[0-9a-f]{40}", entry.revision),
            f"revision must be a commit of 40 hexadecimal digits, which cannot move, got {entry.revision!r}",
        ),
        (
            entry.base is not None and entry.kind != "adapter",
            "base is for adapters: a whole model brings its own weights",
        ),
        (bool(set(entry.input) - set(_INPUT)), f"input knows {', '.join(_INPUT)}, got {', '.join(entry.input)}"),
        (
            not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in entry.metrics.values()),
            f"metrics must be numbers, got {entry.metrics!r}",
        ),
    ):
        if wrong:
            raise ValueError(f"{where}: {message}")
    return entry


def write_entry(path: str | Path, name: str, values: dict[str, Any]) -> None:
    """Write an entry at the end of a registry file; it replaces an entry of the same name.

    Args:
        path: the file.
        name: ``NAME.TAG``.
        values: fields of :class:`Entry` by name; None and {} are left out.
    """
    text = Path(path).read_text(encoding="utf-8")
    others = re.sub(rf'\n*^\["{re.escape(name)}"\]\n(?:[^\[\n].*\n)*', "\n", text, flags=re.M)
    table = "".join(f"{key} = {_toml(value)}\n" for key, value in values.items() if value not in (None, {}))
    write_file(path, f'{others.rstrip()}\n\n["{name}"]\n{table}'.encode())


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{k} = {_toml(v)}" for k, v in value.items() if v is not None) + " }"
    return json.dumps(value)


@cache
def published(door: str = "timm") -> dict[str, Entry]:
    """Return the published models of a framework, ``NAME.TAG`` → entry, from ``registry/DOOR.toml``.

    Args:
        door: ``"timm"`` or ``"diffusers"``.
    """
    return read_entries(registry_file(f"{door}.toml"))
