"""Sites: which activations of a host a config means."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, replace

from torch import nn

from quac_plugins.core.inject.hosts import is_activation
from quac_plugins.core.inject.trace import OURS, Call, Trace
from quac_plugins.core.module_names import parts
from quac_plugins.core.naming import matcher

PLACES = ("auto", "spatial", "all", "last")
# "auto" is "spatial" where that reaches a fifth of the activations: below, it is hardly more than the stem (tokens,
# pre-activation networks, separable convolutions whose second half is 1×1)
_AUTO_SHARE = 0.2


@dataclass(frozen=True)
class Site:
    """A place in a host where an activation is injected.

    Attributes:
        name: module name of the activation that is replaced, or of the module whose output is activated (``after``).
        channels: C.
        channel_dim: 1 or −1.
        expand_q: how q's rows are laid out there, from the trace: ``"error"`` (one row an image), ``"interleave"``,
            ``"tile"``.
        after: the module is kept, and the site comes after it.
    """

    name: str
    channels: tuple[int, ...]
    channel_dim: int
    expand_q: str = "error"
    after: bool = False


def find_sites(model: nn.Module, seen: Trace, patterns: list[str]) -> tuple[list[Site], dict[str, str]]:
    """Return the sites that match ``patterns``, and, with reasons, the activations that cannot be sites.

    Raises:
        ValueError: a pattern matches nothing; the message lists the activations.
    """
    usable, unusable = _usable(model, seen)
    chosen: dict[tuple[str, bool], Site] = {}
    for pattern in patterns:
        sites = _matching(model, seen, usable, pattern)
        if not sites:
            raise ValueError(_nothing(model, seen, usable, unusable, pattern))
        chosen.update({(site.name, site.after): site for site in sites})
    order = list(parts(model))
    return sorted(chosen.values(), key=lambda site: (order.index(site.name), site.after)), unusable


def usable_sites(model: nn.Module, seen: Trace) -> list[Site]:
    """Return every possible site, in module order: activations, and modules that an activation can follow."""
    sites = [_site(feature.name, [feature.call]) for feature in seen.features if OURS not in feature.name]
    behind = [replace(site, after=True) for site in sites if isinstance(site, Site)]
    return [*_usable(model, seen)[0].values(), *behind]


def _usable(model: nn.Module, seen: Trace) -> tuple[dict[str, Site], dict[str, str]]:
    usable, unusable = {}, {}
    inside: tuple[str, ...] = ()
    for name, module in parts(model).items():
        if not is_activation(module) or (inside and name.startswith(inside)) or OURS in name:
            continue
        inside += (name + ".",)
        calls = seen.calls.get(name)
        if not calls:
            unusable[name] = "not called on anything that depends on the image"
            continue
        site = _site(name, calls)
        if isinstance(site, str):
            unusable[name] = site
        else:
            usable[name] = site
    return usable, unusable


def _site(name: str, calls: list[Call]) -> Site | str:
    layouts = {(call.channel_dim, call.fold) for call in calls}
    for call in calls:
        if call.batch_axis != 0:
            return f"the images are on axis {call.batch_axis} of {len(call.shape)}, not on axis 0"
        if call.channel_dim not in (1, -1):
            return f"the channels are on axis {call.channel_dim} of {len(call.shape)}, neither 1 nor last"
        if call.fold == "mixed":
            return "the images are interleaved with other axes on both sides"
    if len({dim for dim, _ in layouts}) > 1:
        return "called with channels on axis 1 and on the last axis"
    folds = {fold for _, fold in layouts if fold}
    if len(folds) > 1:
        return "called with batches of different order"
    widths = tuple(dict.fromkeys(call.channels for call in calls))
    return Site(name, widths, calls[0].channel_dim, next(iter(folds), "error"))


def _matching(model: nn.Module, seen: Trace, usable: dict[str, Site], pattern: str) -> list[Site]:
    if pattern == "auto":
        spatial = _matching(model, seen, usable, "spatial")
        if spatial and len(spatial) >= len(usable) * _AUTO_SHARE:
            return spatial
        return list(usable.values()) or _last(seen)
    if pattern == "all":
        return list(usable.values())
    if pattern == "spatial":
        return [site for name, site in usable.items() if any(call.kernel > 1 for call in seen.calls[name])]
    if pattern == "last":
        return _last(seen)
    matches = matcher("where", pattern)
    return [site for name, site in usable.items() if matches(name)]


def _last(seen: Trace) -> list[Site]:
    if seen.last is None:
        return []
    name, call = seen.last
    site = _site(name, [call])
    return [] if isinstance(site, str) else [Site(name, site.channels, site.channel_dim, site.expand_q, after=True)]


def _nothing(model: nn.Module, seen: Trace, usable: dict[str, Site], unusable: dict[str, str], pattern: str) -> str:
    host = type(model).__name__
    if pattern in PLACES:
        reason = {
            "spatial": f"no activation of {host} follows a convolution of more than 1×1 (use where='all' or 'auto')",
            "all": f"{host} has no activation module",
            "last": f"no module of {host} returns its features",
            "auto": f"{host} has neither an activation module nor a module that returns its features",
        }[pattern]
        listing = f" Activations: {_some(usable)}" if usable else ""
        return f"where={pattern!r} finds nothing: {reason}.{listing}{_why_not(unusable)}"
    others = [name for name in parts(model) if name and fnmatch.fnmatchcase(name, pattern)]
    others = [name for name in others if name not in unusable]
    note = f" It matches modules that are not activations: {_some(others)}." if others else ""
    return (
        f"where={pattern!r} matches no activation of {host}.{note} Activations: {_some(usable) or 'none'}"
        f"{_why_not(unusable)} Places: {', '.join(PLACES)}; regular expressions are written 're:…'"
    )


def _some(names) -> str:  # type: ignore[no-untyped-def]
    names = list(names)
    return ", ".join(names[:30]) + (f", … ({len(names)} in all)" if len(names) > 30 else "")


def _why_not(unusable: dict[str, str]) -> str:
    if not unusable:
        return ""
    some = [f"{name} ({why})" for name, why in list(unusable.items())[:5]]
    return f" Not usable: {'; '.join(some)}{' …' if len(unusable) > 5 else ''}."
