"""Published models by name: their files, and the config of their hosts."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quac_plugins.core.naming import split_name
from quac_plugins.hub.fetch import FILES, MODEL_FILES, fetch
from quac_plugins.hub.verify import check_file
from quac_plugins.registry import KINDS, Entry, published


@dataclass(frozen=True)
class Published:
    """An entry of the registry, or a name that ``QUAC_HUB`` sends to the user's organization.

    Attributes:
        name: ``NAME.TAG``.
        entry: the registry's entry, or None.
        organization: the organization whose repository ``organization/NAME.TAG`` replaces the published one, or None.
        door: the framework, ``"timm"`` or ``"diffusers"``.
    """

    name: str
    entry: Entry | None
    organization: str | None = None
    door: str = "timm"

    @property
    def kind(self) -> str:
        """Return ``"adapter"``, ``"model"`` or ``"pipeline"``."""
        return self.entry.kind if self.entry is not None else KINDS[self.door][0]

    @property
    def model_args(self) -> dict[str, Any]:
        """Return the arguments with which the network is built."""
        return dict(self.entry.model_args) if self.entry is not None else {}

    def host_cfg(self, pretrained_cfg: Any) -> Any:
        """Return the host's pretrained config for timm: the base's tag under an adapter, else the model's own config.

        Args:
            pretrained_cfg: the user's ``pretrained_cfg``.
        """
        if self.entry is None:
            return None  # the base's default weights
        if self.entry.kind == "adapter":
            return self.entry.base or (None if pretrained_cfg == self.entry.tag else pretrained_cfg)
        return pretrained_cfg_of(self.entry)

    def folder(self, revision: str | None = None) -> Path:
        """Return the folder of the files, verified.

        Args:
            revision: a revision on the Hub other than the registry's, whose hash is then not compared.

        Raises:
            FileNotFoundError, PermissionError, ConnectionError, ValueError: see :func:`quac_plugins.hub.fetch.fetch`.
        """
        files = FILES[self.kind]
        if self.organization is not None:
            return fetch(f"{self.organization}/{self.name}", revision, files=files)
        assert self.entry is not None
        known: Any = {"sha256": self.entry.sha256, "size": self.entry.size}
        if self.entry.repo is not None and revision is not None:
            return fetch(self.entry.repo, revision, files=files)
        if self.entry.repo is not None:
            return fetch(self.entry.repo, self.entry.revision, files=files, **known)
        weights = self.entry.folder / files[-1]
        if not weights.is_file():
            raise FileNotFoundError(f"{self.name} is to be embedded, but {weights} is missing; reinstall quac-plugins")
        check_file(weights, **known)
        return self.entry.folder


def find_published(name: str, known_to_host: bool = False, door: str = "timm") -> Published | None:
    """Find the model ``NAME.TAG`` in the registry, or with ``QUAC_HUB`` in the user's organization; None without one.

    Args:
        name: ``NAME.TAG``.
        known_to_host: whether the tag is one of the host's own weights, which no organization replaces.
        door: the framework, ``"timm"`` or ``"diffusers"``.
    """
    entry, organization = published(door).get(name), os.environ.get("QUAC_HUB") or None
    if entry is None and (organization is None or known_to_host):
        return None
    return Published(name, entry, organization, door)


def pretrained_cfg_of(entry: Entry) -> Any:
    """Return an entry as timm's config of pretrained weights: the architecture's, with the entry's differences."""
    import timm
    from timm.models import PretrainedCfg

    host = split_name(entry.architecture)[0]
    architecture = timm.get_pretrained_cfg(host, allow_unregistered=True) or PretrainedCfg()
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in entry.input.items()}
    source: dict[str, Any] = {"url": "", "hf_hub_id": None, "hf_hub_filename": None, "file": None, "source": None}
    if entry.repo is None:
        source["file"] = str(entry.folder / MODEL_FILES[-1])
    else:
        source |= {"hf_hub_id": f"{entry.repo}@{entry.revision}", "hf_hub_filename": MODEL_FILES[-1]}
    named = {"architecture": entry.architecture, "tag": entry.tag, "license": entry.license, "custom_load": False}
    return replace(architecture, **{**named, **source, **values})
