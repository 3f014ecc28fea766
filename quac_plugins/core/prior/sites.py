"""The possible places of a degradation prior in a host, and the layout of the features at each.

A prior changes the output of a module. So the output must be one picture of features for each image: channels before or
after the pixels, or tokens on a grid. The place decides whether a prior works at all: after the first layer, which
tells too little, but early, at full detail.
"""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from quac_plugins.core.host.facts import facts_of
from quac_plugins.core.inject.trace import OURS, Feature, Trace
from quac_plugins.core.module_names import module_at
from quac_plugins.core.naming import matcher

PLACES = ("auto", "stages", "norms")
Grid = tuple[int, int]
_QUARTER = 0.25
_WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear)
_FEW = 2  # layers: one is no depth
_MOST_PREFIXES = 16


@dataclass(frozen=True)
class PriorSite:
    """A place in a host for a degradation prior: after a module.

    Attributes:
        name: the name of the module.
        channels: C.
        layout: ``"nchw"``, ``"nhwc"`` or ``"tokens"`` (B, N, C).
        prefix: the number of tokens before the grid's (class, registers).
        grid: (h, w) of the tokens of the traced images, N = prefix + h·w; None for the other layouts.
        stride: height of the image over height of the features, rounded; 0 for larger features.
        margin: margins are put in here beside the FDMs of other places.
    """

    name: str
    channels: int
    layout: str
    prefix: int = 0
    grid: Grid | None = None
    stride: int = 0
    margin: bool = False

    def positions(self, image: tuple[int, int]) -> int:
        """Return the number of feature positions of an image (H, W) at this site."""
        return math.prod(-(-side // max(self.stride, 1)) for side in image)


@dataclass(frozen=True)
class _Place:
    site: PriorSite
    feature: Feature
    main: bool = False
    spans: bool = False  # several resolutions of the main path end inside: a list of stages, and no stage

    @property
    def key(self) -> Any:
        """Return a key that is equal for modules that return the same tensor: a prior after either does the same."""
        return self.feature.node if self.feature.is_new else self.site.name


def find_prior_sites(model: nn.Module, seen: Trace, patterns: list[str], margins: bool = False) -> list[PriorSite]:
    """Return the places that ``patterns`` mean, in the order of the host's computation.

    Args:
        model: the host.
        seen: the trace of the host, see :func:`quac_plugins.core.inject.trace.trace`.
        patterns: any of

            - ``"auto"``: the end of the finest resolution at which the host computes with more than its first layer,
              within the first quarter of its layers (see below).
            - ``"stages"``: ``auto``, and after it the end of every coarser resolution; in a host of one resolution
              the ends of the second, third and fourth quarter of its depth. The host names these ends itself where
              it can (``HostFacts.stage_ends``).
            - ``"norms"``: every norm, before the activation where the norm's own module activates (timm's
              ``BatchNormAct2d``); in a host whose norms are folded into its convolutions, every convolution.
            - a module name; a glob (``"layer?"``); ``"re:"`` and a regular expression (searched for).

            Of several modules that a pattern matches and that return the same tensor, it means the outermost, but no
            list of stages (several resolutions end inside) if it matches the last of them too: not every path through
            the host calls the list.
        margins: find the places of ``"norms"`` for margins too, where there is nothing else.

    The main path of a host is made of the modules whose output everything passes that the host makes of the image
    (``Feature.cut``). What is inside a block is not on it: a block is a module in which branches meet that its own
    modules return apart, and every module of the same class, unless it holds more than half of the host's layers.
    Neither is on it what a module that lowers the resolution computes before it does so with one layer or none, nor the
    end of a network inside the host that can also be run by its ``forward_intermediates``, which goes past it. Of the
    main path ``auto`` takes the modules that at least two layers and at most a quarter of all lead to; of these, the
    finest resolution; there, the last. If no module is so early, it is the first on the main path that two layers lead
    to, in the first half; if there is none (parallel branches from the image on), the first usable module.

    Raises:
        ValueError: a pattern matches nothing usable; the message lists what there is.

    Example:
        >>> import timm
        >>> from quac_plugins.core.inject.trace import trace
        >>> host = timm.create_model("mobilenetv2_050")
        >>> find_prior_sites(host, trace(host), ["auto"])
        [PriorSite(name='blocks.0', channels=8, layout='nchw', prefix=0, grid=None, stride=2, margin=False)]
    """
    places, unusable = _places(model, seen)
    chosen: dict[Any, _Place] = {}
    for pattern in patterns:
        matching = _matching(model, seen, places, pattern)
        if not matching:
            raise ValueError(_nothing(model, places, unusable, pattern))
        for place in matching:
            chosen.setdefault(place.key, place)
    sites = {place.site.name: place.site for place in chosen.values()}
    for place in _matching(model, seen, places, "norms") if margins else ():
        sites.setdefault(place.site.name, replace(place.site, margin=True))
    if margins and not any(site.margin for site in sites.values()):
        raise ValueError(f"margins=True finds no norm of {type(model).__name__} where there is no FDM already")
    return [sites[place.site.name] for place in places if place.site.name in sites]


def usable_prior_sites(model: nn.Module, seen: Trace) -> list[PriorSite]:
    """Return every module that a prior can follow, in the order of the host's computation."""
    return [place.site for place in _places(model, seen)[0]]


def _places(model: nn.Module, seen: Trace) -> tuple[list[_Place], dict[str, str]]:
    """Return the usable modules in the order of their returns, and the other modules with reasons."""
    calls: dict[str, list[Feature]] = {}
    for feature in seen.features:
        calls.setdefault(feature.name, []).append(feature)
    usable: list[_Place] = []
    prefix = facts_of(model).prefix_tokens
    unusable = {name: why for name, why in seen.others.items() if OURS not in name}
    for name, features in calls.items():
        if OURS in name:
            continue
        site: PriorSite | str
        if name in seen.others:
            site = f"{seen.others[name]} in some of its calls"
        elif len(features) > 1:
            site = f"is called {len(features)} times in one pass"
        else:
            site = _site(features[0], seen.image_size, prefix)
        if isinstance(site, str):
            unusable[name] = site
        else:
            usable.append(_Place(site, features[0]))
    off = _off_the_main_path(model, seen, usable)
    main = {p.site.name: p.site.stride for p in usable if p.site.name not in off}
    spans = {outer for name, stride in main.items() for outer in _around(name) if main.get(outer, stride) != stride}
    return [replace(p, main=p.site.name in main, spans=p.site.name in spans) for p in usable], unusable


def _site(feature: Feature, image: tuple[int, int], known_prefix: int | None) -> PriorSite | str:
    call = feature.call
    shape = f"its output (B, {', '.join(map(str, call.shape[1:]))})"
    if call.batch_axis != 0:
        return f"its output has the images on axis {call.batch_axis}, not on axis 0"
    if call.fold is not None:
        return "its output has other things than images on axis 0 (windows, patches, heads)"
    if len(call.shape) == 3:
        if call.channel_dim != -1:
            return f"{shape} has its channels on axis {call.channel_dim}, not last"
        for prefix in (known_prefix or 0, *range(_MOST_PREFIXES + 1)):
            grid = _grid(call.shape[1] - prefix, image)
            if grid is not None and (prefix == known_prefix or 2 * prefix <= grid[0] * grid[1]):
                return PriorSite(feature.name, call.channels, "tokens", prefix, grid, round(image[0] / grid[0]))
        return f"{shape} has {call.shape[1]} tokens, which are no grid over the image of {image[0]}×{image[1]}"
    if call.channel_dim not in (1, -1):
        return f"{shape} has its channels on axis {call.channel_dim}, neither 1 nor last"
    height, width = _room(feature)
    if min(height, width) < 2:
        return f"{shape} has no room left: {height}×{width}"
    down, across = image[0] / height, image[1] / width
    if abs(down - across) > 0.3 * max(down, across):  # heads × tokens, or axes that mean something else yet
        return f"{shape} is not a picture of the image's {image[0]}×{image[1]}"
    return PriorSite(feature.name, call.channels, "nchw" if call.channel_dim == 1 else "nhwc", stride=round(down))


def _room(feature: Feature) -> tuple[int, ...]:
    """Return (h, w) of a feature with four axes."""
    return feature.call.shape[2:] if feature.call.channel_dim == 1 else feature.call.shape[1:3]


def _grid(tokens: int, image: tuple[int, int]) -> tuple[int, int] | None:
    height, width = image
    for stride in range(2, min(image) // 2 + 1):
        if not height % stride and not width % stride and (height // stride) * (width // stride) == tokens:
            return height // stride, width // stride
    return None


def _off_the_main_path(model: nn.Module, seen: Trace, usable: list[_Place]) -> set[str]:
    """Return the names of the usable modules beside the main path; see :func:`find_prior_sites`."""
    half = seen.layers / 2
    # the modules that blocks and steps can be: the rest are the host itself, by whatever name
    parts = {f.name: f for f in seen.features if f.cut and f.is_new and f.layers - f.before <= half}
    blocks = set()
    for feature in seen.features:
        if not feature.cut:
            within = next((name for name in _around(feature.name) if name in parts), None)
            if within is not None:
                blocks.add(within)
    classes = {type(module_at(model, name)) for name in blocks} - {nn.Sequential}
    blocks |= {name for name in parts if type(module_at(model, name)) in classes}
    heads = {name for name, feature in parts.items() if len(feature.call.shape) == 4 and min(_room(feature)) < 2}
    strides = {place.site.name: place.site.stride for place in usable}
    off = set()
    for place in usable:
        name, stride, feature = place.site.name, place.site.stride, place.feature
        around = [outer for outer in _around(name) if outer in parts]
        if not (feature.cut and feature.is_new) or any(outer in blocks or outer in heads for outer in around):
            off.add(name)
        elif any(strides.get(o, stride) > stride and feature.layers - parts[o].before < _FEW for o in around):
            off.add(name)  # the beginning of a step to a coarser resolution
        elif callable(getattr(module_at(model, name), "forward_intermediates", None)):
            off.add(name)  # a network in the host, which is also called by that: past what is behind it
    return off


def _around(name: str) -> Iterable[str]:
    """Return the names of the modules around a module, the innermost first."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _matching(model: nn.Module, seen: Trace, places: list[_Place], pattern: str) -> list[_Place]:
    if pattern == "norms":
        return _norms(model, places)
    if pattern in PLACES:
        first = _auto(seen, places)
        if first is None or pattern == "auto":
            return [first] if first is not None else []
        return [first, *_later(model, places, first)]
    matches = matcher("site", pattern)
    return _outermost(place for place in places if matches(place.site.name))


def _norms(model: nn.Module, places: list[_Place]) -> list[_Place]:
    """Return the places behind every norm; without norms, behind every convolution."""
    modules = {place.site.name: module_at(model, place.site.name) for place in places}
    behind = {}
    for name, module in model.named_modules():
        if is_norm(module):
            activates = isinstance(getattr(module, "act", None), nn.Module) and "drop" in module._modules
            behind[f"{name}.drop" if activates else name] = module
    # what normalizes the images themselves is no norm of features
    norms = [place for place in places if place.site.name in behind and place.feature.layers]
    return norms or [place for place in places if isinstance(modules[place.site.name], nn.Conv2d)]


def is_norm(module: nn.Module) -> bool:
    """Return whether a module is a norm of torch, or of a framework by its class name."""
    return "norm" in type(module).__name__.lower() and not any(isinstance(m, _WEIGHTED) for m in module.modules())


def returns_new_memory(model: nn.Module, name: str) -> bool:
    """Return whether nobody else holds a layer's output, as behind norms and convolutions of torch and timm."""
    module = module_at(model, name)
    if type(module) is nn.Identity and name.endswith(".drop"):  # between a norm and its activation
        module = module_at(model, name.removesuffix(".drop"))
    library = type(module).__module__.partition(".")[0]
    return library in ("torch", "timm") and (is_norm(module) or isinstance(module, nn.Conv2d))


def _outermost(places: Iterable[_Place]) -> list[_Place]:
    """Keep one place for each tensor: the outermost, but a stage rather than a list, which not every path calls."""
    outermost: dict[Any, _Place] = {}
    for place in places:
        known = outermost.setdefault(place.key, place)
        if (place.spans, place.site.name.count(".")) < (known.spans, known.site.name.count(".")):
            outermost[place.key] = place
    return list(outermost.values())


def _auto(seen: Trace, places: list[_Place]) -> _Place | None:
    deep = [place for place in _outermost(p for p in places if p.main) if place.feature.depth >= _FEW]
    early = [place for place in deep if place.feature.layers <= _QUARTER * seen.layers]
    if early:
        finest = min(place.site.stride for place in early)
        return [place for place in early if place.site.stride == finest][-1]
    first = [place for place in deep if place.feature.layers <= seen.layers / 2] or _outermost(places)
    return first[0] if first else None


def _later(model: nn.Module, places: list[_Place], first: _Place) -> list[_Place]:
    """Return the ends of the stages after ``first``."""
    main = _outermost(place for place in places if place.main)
    named = _named(model, places, main)
    strides = {place.site.stride for place in named}
    # where the host names the ends of its stages, a stage ends there and not at a norm behind it, and what is coarser
    # than all of them belongs to the head
    ends = [p for p in main if not strides or (p.site.stride < max(strides) and p.site.stride not in strides)]
    ends = [p for p in places if p in ends or p in named]
    ends = [p for p in ends if p.feature.layers > first.feature.layers]
    last: dict[int, _Place] = {}
    for place in ends:
        norm = isinstance(module_at(model, place.site.name), nn.LayerNorm)
        if norm and place.site.layout == "tokens" and place.site.stride in last:
            continue  # behind a stage's blocks, which may be told the grid of the tokens as a norm never is
        if place.site.stride > first.site.stride and place.site.stride >= max(last, default=0):
            last[place.site.stride] = place
    if last:
        return list(last.values())
    quarters = []
    depth = ends[-1].feature.layers if ends else 0  # with a classifier behind it or without
    for part in (2, 3, 4):
        quarters += [place for place in ends if place.feature.layers <= math.ceil(part * _QUARTER * depth)][-1:]
    return quarters


def _named(model: nn.Module, places: list[_Place], main: list[_Place]) -> list[_Place]:
    """Return the main path's places that the host names as ends of its stages, if it names usable ones."""
    names = facts_of(model).stage_ends
    named = [place for place in places if place.site.name in names]
    if len(named) < len(names):
        return []
    makers = {place.key: place for place in main}  # of tensors that the named module only hands on
    named = [place if place.main else makers.get(place.feature.node, place) for place in named]
    return [place for place in named if place.main]


def _nothing(model: nn.Module, places: list[_Place], unusable: dict[str, str], pattern: str) -> str:
    host = type(model).__name__
    if not places:
        some = [f"{name} ({why})" for name, why in list(unusable.items())[:5]]
        return (
            f"site={pattern!r} finds nothing: a degradation prior comes after a module that returns a feature map of "
            f"the image (4-D or tokens), and no module of {host} does{': ' + ', '.join(some) if some else ''}"
        )
    matched = {name: why for name, why in unusable.items() if fnmatch.fnmatchcase(name, pattern)}
    known = {name for name, _ in model.named_modules() if name}
    if pattern in known and pattern not in matched:
        inside = "belongs to what was put in" if OURS in pattern else "is never called with what depends on the image"
        matched = {pattern: inside}
    if matched:
        some = [f"{name}: {why}" for name, why in list(matched.items())[:3]]
        reason = f"site={pattern!r} cannot be used in {host}. {'; '.join(some)}{' …' if len(matched) > 3 else ''}."
    else:
        names = [place.site.name for place in places]
        close = difflib.get_close_matches(pattern, [*PLACES, *names], n=3)
        hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        reason = f"site={pattern!r} matches no module of {host} that a degradation prior can come after.{hint}"
    return f"{reason} Usable: {_listing(places)}. Places: {', '.join(PLACES)}; regular expressions are written 're:…'"


def _listing(places: list[_Place], most: int = 20) -> str:
    """List some usable modules, the outermost of the main path before others."""
    listed = _outermost(places)
    first = sorted(listed, key=lambda place: (not place.main, place.site.name.count(".")))[:most]
    shown = ", ".join(
        f"{p.site.name} ({p.site.channels} channels, stride {p.site.stride})" for p in listed if p in first
    )
    return shown + (f", … ({len(listed)} in all)" if len(listed) > most else "")
