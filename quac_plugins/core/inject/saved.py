"""The two files of an adapter, read: its config, checked in itself, and its tensors."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from quac_plugins.core.inject.config import QuACConfig
from quac_plugins.core.inject.sites import Site
from quac_plugins.core.prior.config import PriorConfig
from quac_plugins.core.prior.fdm import LAYOUTS
from quac_plugins.core.prior.sites import PriorSite
from quac_plugins.core.quality.rows import EXPANSIONS

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
FORMATS = (1, 2)  # 2: with a degradation prior
_LIMIT = 4 << 20  # bytes of a config: a list of sites is far below


@dataclass
class Saved:
    """What an adapter's config says."""

    folder: Path
    config: QuACConfig | None
    sites: list[Site]
    prior: PriorConfig | None
    prior_sites: list[PriorSite]
    host: dict[str, Any]


def read_config(path: Path) -> Saved:
    """What ``adapter_config.json`` says.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is damaged; the message names the file.
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
        )
    except (KeyError, TypeError, ValueError, RecursionError) as error:  # JSONDecodeError is a ValueError
        what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} is not an adapter's config: {what}") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of ``adapter_model.safetensors`` by name; the errors of :func:`read_config`."""
    if not path.is_file():
        raise FileNotFoundError(f"no adapter in {path.parent}: {path.name} is missing")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from error


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
