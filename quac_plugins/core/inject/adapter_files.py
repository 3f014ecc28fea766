"""The two files of an adapter: its config, checked in itself, and its tensors, which belong together.

``adapter_config.json`` is an object of

- ``peft_type``: ``"QUAC"``; ``format``: 1, or 2 with a degradation prior,
- ``config``, ``sites``, ``tap``: the :class:`QuACConfig` (null: no activations), its sites, the layer that is tapped,
- ``prior`` (format 2): ``config``, ``sites`` and ``tap`` of the prior,
- ``host``: what :func:`quac_plugins.core.inject.fingerprint.describe_host` says of the host,
- ``qualities``: name → hash of the weights of each quality function that has such, as they were when this was saved,
- ``images``: what is known of the host's images, :class:`quac_plugins.core.inject.images.Images`,
- ``sha256``: of ``adapter_model.safetensors``.

Adapters of earlier versions lack the last three, and are read without.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from quac_plugins.core.files import BESIDE, replacing
from quac_plugins.core.inject.config import QuACConfig
from quac_plugins.core.inject.images import Images
from quac_plugins.core.inject.sites import Site
from quac_plugins.core.prior.config import PriorConfig
from quac_plugins.core.prior.fdm import LAYOUTS
from quac_plugins.core.prior.sites import PriorSite
from quac_plugins.core.quality.expansion import EXPANSIONS

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
FORMATS = (1, 2)  # 2: with a degradation prior
_TRIES, _PAUSE = 4, 0.05  # how often, and with how many seconds between, files are read that do not belong together
_MOST_SAID = 1000  # letters of an error, which may quote what the config holds
_LIMIT = 4 << 20  # bytes of a config: a list of sites is far below


@dataclass
class Saved:
    """The content of an adapter's config."""

    folder: Path
    config: QuACConfig | None
    sites: list[Site]
    prior: PriorConfig | None
    prior_sites: list[PriorSite]
    host: dict[str, Any]
    images: Images | None = None
    sha256: str | None = None
    qualities: dict[str, Any] = field(default_factory=dict)


def write_adapter(folder: Path, config: dict[str, Any], state: dict[str, Tensor]) -> None:
    """Write both files, the config with the hash of the tensors' file; OSError if they cannot be written."""
    weights = safetensors.torch.save(state, metadata={"format": "pt"})
    config = {**config, "sha256": hashlib.sha256(weights).hexdigest()}
    with replacing(folder) as beside:
        (beside / WEIGHTS_NAME).write_bytes(weights)  # by Python's own words for a full disk, and by the umask
        (beside / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_adapter(folder: Path) -> tuple[Saved, dict[str, Tensor]]:
    """Read the config and its tensors, also while another adapter is being saved into the folder.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or the files belong to two adapters; the message names the file.
    """
    for _ in range(_TRIES):
        saved, weights = read_config(folder / CONFIG_NAME), _read_bytes(folder / WEIGHTS_NAME)
        digest = hashlib.sha256(weights).hexdigest()
        # of a save that goes on, or was killed, the weights may be in place and their config not yet
        others = [
            config_beside for path in folder.glob(f"{BESIDE}*/{CONFIG_NAME}") if (config_beside := _read_quietly(path))
        ]
        if saved.sha256 != digest:
            saved = next((replace(other, folder=folder) for other in others if other.sha256 == digest), saved)
        if saved.sha256 in (None, digest):
            return saved, _tensors(folder / WEIGHTS_NAME, weights)
        time.sleep(_PAUSE)
    _tensors(folder / WEIGHTS_NAME, weights)  # it may not even be such a file
    raise ValueError(
        f"{folder / WEIGHTS_NAME} has the SHA-256 {digest}, and {CONFIG_NAME} is of a file with {saved.sha256}: it is "
        "damaged, or the two files are of two adapters. Copy both again from where they come"
    )


def _read_quietly(path: Path) -> Saved | None:
    try:
        return read_config(path)
    except (OSError, ValueError):  # it has gone to its place, or is not written yet
        return None


def read_config(path: Path) -> Saved:
    """Read ``adapter_config.json``.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged; the message names it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no adapter in {path.parent}: {path.name} is missing")
    if path.stat().st_size > _LIMIT:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; an adapter's config has at most {_LIMIT}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise TypeError(f"holds a {type(values).__name__}, not an object")
        if values.get("peft_type") != "QUAC":
            raise ValueError(f"peft_type is {values.get('peft_type')!r}, not 'QUAC'")
        if values.get("format") not in FORMATS:
            raise ValueError(f"format is {values.get('format')!r}; this version reads {FORMATS[0]} and {FORMATS[1]}")
        config, prior = values["config"], values.get("prior")
        if config is None and prior is None:
            raise ValueError("it holds neither activations nor a prior")
        prior_config, prior_sites = _read_prior(prior) if prior is not None else (None, [])
        return Saved(
            folder=path.parent,
            config=QuACConfig.from_dict(config) if config is not None else None,
            sites=[_read_site(site) for site in values["sites"]],
            prior=prior_config,
            prior_sites=prior_sites,
            host=dict(values["host"]),
            images=Images.from_dict(values["images"]) if values.get("images") is not None else None,
            sha256=_digest(values.get("sha256")),
            qualities=dict(values.get("qualities") or {}),
        )
    except (KeyError, TypeError, ValueError, RecursionError) as error:  # JSONDecodeError is a ValueError
        what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} is not an adapter's config: {what[:_MOST_SAID]}") from error


def _read_bytes(path: Path) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(f"no adapter in {path.parent}: {path.name} is missing")
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error


def _tensors(path: Path, content: bytes) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(content)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from error


def _digest(value: Any) -> str | None:
    if value is not None and not (isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value)):
        raise ValueError(f"sha256 is {value!r}")
    return value


def _read_site(values: dict[str, Any]) -> Site:
    site = Site(**{**values, "channels": tuple(values["channels"])})
    if not (
        isinstance(site.name, str)
        and all(isinstance(width, int) for width in site.channels)
        and site.channel_dim in (1, -1)
        and site.expand_q in EXPANSIONS
        and isinstance(site.after, bool)
    ):
        raise ValueError(f"a site is {values!r}")
    return site


def _read_prior(values: dict[str, Any]) -> tuple[PriorConfig, list[PriorSite]]:
    sites = [_read_prior_site(site) for site in values["sites"]]
    if not sites or len({site.name for site in sites}) < len(sites):
        raise ValueError("the sites of the prior must be at least one, and different ones")
    return PriorConfig.from_dict(values["config"]), sites


def _read_prior_site(values: dict[str, Any]) -> PriorSite:
    site = PriorSite(**{**values, "grid": tuple(values["grid"] or ()) or None})
    numbers = (site.channels, site.prefix, site.stride, *(site.grid or ()))
    if not (
        isinstance(site.name, str)
        and site.layout in LAYOUTS
        and all(type(number) is int and 0 <= number < 1 << 20 for number in numbers)
        and (len(site.grid) == 2 and all(site.grid) if site.grid else site.layout != "tokens")
        and site.channels
    ):
        raise ValueError(f"a site of the prior is {values!r}")
    return site
