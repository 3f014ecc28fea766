"""The differences between an adapter and the host that is to load it, in words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor

from quac_plugins.core.inject.config import QuACConfig
from quac_plugins.core.options import QualityOptions
from quac_plugins.core.prior.config import PriorConfig

C = TypeVar("C", QuACConfig, PriorConfig)


def tensor_problems(expected: dict[str, Tensor], state: dict[str, Tensor]) -> list[str]:
    """List tensors that are missing, or have another shape or kind of numbers than expected."""
    problems = [f"missing tensor {name!r}" for name in expected if name not in state]
    pairs = {name: (state[name], tensor) for name, tensor in expected.items() if name in state}
    problems += [
        f"tensor {name!r} has shape {tuple(held.shape)}, expected {tuple(tensor.shape)}"
        for name, (held, tensor) in pairs.items()
        if held.shape != tensor.shape
    ]
    problems += [
        f"tensor {name!r} holds {held.dtype}, expected {tensor.dtype}"
        for name, (held, tensor) in pairs.items()
        if held.is_floating_point() != tensor.is_floating_point()
    ]
    return problems


def site_problems(host: dict[Any, Any], adapter: dict[Any, Any]) -> list[str]:
    """List sites that only the host or only the adapter has, or whose layouts differ."""
    problems = [f"site {key[0]!r} is in the adapter, not in this host" for key in adapter if key not in host]
    problems += [f"site {key[0]!r} is in this host, not in the adapter" for key in host if key not in adapter]
    return problems + [
        f"site {key[0]!r} has its channels on axis {adapter[key]}, in this host on {host[key]}"
        if isinstance(host[key], int)
        else f"site {key[0]!r} has layout {adapter[key]}, in this host {host[key]}"
        for key in host
        if key in adapter and adapter[key] != host[key]
    ]


def differences(adapter: QuACConfig, host: QuACConfig) -> list[str]:
    """List options whose differences no shape shows: parameters of another activation would give wrong numbers."""
    fields = ["activation", "init"]
    if host.is_driven:
        fields += ["norm", "reduction"]
    if host.activation_class.needs_quality:
        fields.append("tap")
    return _compare(adapter, host, fields, host.activation_class.needs_quality)


def prior_differences(adapter: PriorConfig, host: PriorConfig) -> list[str]:
    """List such options of a prior."""
    return _compare(adapter, host, ["fdm", "fdm_width", "fdm_act", "experts", "margins"], host.needs_quality)


def _compare(adapter: QualityOptions, host: QualityOptions, fields: list[str], needs_quality: bool) -> list[str]:
    if needs_quality and isinstance(host.quality, str) and not adapter.has_own_quality:
        fields = [*fields, "quality"]
    if adapter.mean is not None:  # explicit in the adapter; otherwise each host has its own, and q is the pictures'
        fields = [*fields, "mean", "std"]
    if needs_quality:
        fields = [*fields, "channel_order"]
    known = adapter.to_dict(), host.to_dict()
    pairs = [(field, known[0][field], known[1][field]) for field in fields]
    return [f"{field} is {a!r} in the adapter, {b!r} in this host" for field, a, b in pairs if a != b]


def without_normalization(config: C | None) -> C | None:
    """Return the config without mean and std, which adapters of this version keep with the images."""
    return replace(config, mean=None, std=None) if config is not None else None  # type: ignore[type-var]
