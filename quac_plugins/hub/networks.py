"""Networks of diffusers and transformers, and pipelines, from the Hub: verified files, safetensors alone."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quac_plugins.core.files import read_json
from quac_plugins.hub.fetch import fetch
from quac_plugins.hub.verify import refuse_pickles

_WEIGHTS = "diffusion_pytorch_model"
_SHARD = re.compile(r"[\w][\w.-]*\.safetensors\Z")
_FETCHING = {"revision": "revision", "token": "token", "force_download": "force", "cache_dir": "cache_dir"}
_NOT_NEEDED = ("local_files_only", "proxies", "resume_download")  # a folder has it all
_LIMIT = 64 << 20  # bytes of the list of a large network's shards


def verified_network(source: Any, options: Mapping[str, Any], weights: str = _WEIGHTS) -> tuple[Any, dict[str, Any]]:
    """Return a verified folder and options for a network's ``from_pretrained``, which then reads safetensors alone.

    Args:
        source: a folder, or ``"org/name"`` of the Hub.
        options: options of ``from_pretrained``: ``subfolder``, ``variant``, ``revision``, …
        weights: the name of the files of weights, without endings.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError: see :func:`quac_plugins.hub.fetch.fetch`.
        ValueError: a file has another hash than the Hub tells, or there are no safetensors.
    """
    kept = safe(options)
    if os.path.isdir(source):
        return source, kept
    loading = fetching(kept)
    folder = fetch_network(str(source), kept.get("subfolder"), kept.get("variant"), weights, **loading)
    return str(folder), kept


def verified_pipeline(
    source: str, parts: Mapping[str, set[str]], options: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """Return a verified folder and options for a pipeline's ``from_pretrained``, with the known parts alone.

    Args:
        source: a folder, or ``"org/name"`` of the Hub.
        parts: name of a part → its allowed classes, ``"library.Class"``; a scheduler, or a network.
        options: options of ``from_pretrained``; a part among them is not fetched.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError: see :func:`quac_plugins.hub.fetch.fetch`.
        ValueError: as in :func:`verified_network`; or ``model_index.json`` names another class of a part.
    """
    kept, folder, index = safe(options), Path(source), "model_index.json"
    if not folder.is_dir():
        loading = fetching(kept)
        folder = fetch(source, files=(index,), **loading)
        loading["revision"] = folder.name
        for name in parts:
            if name == "scheduler" and name not in kept:
                fetch(source, files=(index, "scheduler/scheduler_config.json"), **loading)
            elif name not in kept:
                fetch_network(source, name, kept.get("variant"), **loading)
    if (folder / index).is_file():  # else diffusers says what is missing
        entries = read_json(folder / index)
        for name, known in parts.items():
            told = entries.get(name) if isinstance(entries, dict) else None
            named = ".".join(map(str, told)) if isinstance(told, list) else told
            if named not in known:
                raise ValueError(
                    f"{folder / index} names {named!r} as {name}, which this pipeline is not made of; it takes "
                    f"{' or '.join(sorted(known))}"
                )
    return str(folder), kept


def fetch_network(
    repo_id: str, subfolder: str | None, variant: str | None, called: str = _WEIGHTS, **options: Any
) -> Path:
    """Fetch one network of a commit, verified, and return the folder; its weights may be in several files."""
    inside, middle = f"{subfolder}/" if subfolder else "", f".{variant}" if variant else ""
    config, weights = f"{inside}config.json", f"{inside}{called}{middle}.safetensors"
    index = f"{inside}{called}.safetensors.index{middle}.json"
    folder = fetch(repo_id, files=(config,), optional=(weights, index), **options)
    commit = {**options, "revision": folder.name}
    if not (folder / index).is_file():
        return fetch(repo_id, files=(config, weights), **commit)  # or the error that says what is there
    entries = read_json(folder / index, _LIMIT)
    shards = entries.get("weight_map") if isinstance(entries, dict) else None
    names = set(shards.values()) if isinstance(shards, dict) else set()
    if not names or not all(isinstance(name, str) and _SHARD.match(name) for name in names):
        raise ValueError(f"{folder / index} is no list of the files of a network's weights")
    return fetch(repo_id, files=(config, *(f"{inside}{name}" for name in sorted(names))), **commit)


def weights_in(folder: Any, options: Mapping[str, Any]) -> list[Path]:
    """Return the safetensors of a network in a folder, at least one file.

    Raises:
        FileNotFoundError: the folder holds no weights.
        ValueError: the folder holds a pickle and no safetensors.
    """
    inside = Path(folder) / (options.get("subfolder") or "")
    weights = sorted(inside.glob("*.safetensors"))
    if not weights:
        wanted = f"{_WEIGHTS}.safetensors"
        refuse_pickles((path.name for path in inside.glob("*")), str(inside), wanted)
        raise FileNotFoundError(f"{inside} holds no {wanted}")
    return weights


def safe(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options of ``from_pretrained`` with which diffusers opens no pickle."""
    if options.get("use_safetensors") is False:
        raise ValueError("use_safetensors=False would open a pickle, which can run any code: only safetensors are read")
    return {**options, "use_safetensors": True}


def fetching(options: dict[str, Any]) -> dict[str, Any]:
    """Take the options of a download out of ``from_pretrained``'s, under the names of :func:`fetch`."""
    fetched = {ours: options.pop(theirs) for theirs, ours in _FETCHING.items() if theirs in options}
    for name in _NOT_NEEDED:
        options.pop(name, None)
    return {name: value for name, value in fetched.items() if value is not None}
