"""timm's ``features_only``: injected modules get the same places as in the whole network.

Rules such as "auto" and "stages" ask how much of a network leads to a place, and what everything passes through. In a
network of features, which is cut off behind the last of them, or a graph that has no blocks, they would find other
places. So they are asked of the whole network, built for its shapes alone, and the network of features gets those
places that it still has.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import timm
import torch
from timm.models import FeatureGraphNet, get_notrace_modules
from torch import Tensor, nn
from torch.fx import Tracer
from torch.overrides import TorchFunctionMode

from quac_plugins.core.inject import PriorConfig, QuACConfig, inject
from quac_plugins.core.inject.containers import leave_out, runs_children
from quac_plugins.core.inject.sites import PLACES, Site, usable_sites
from quac_plugins.core.inject.surgery import find_places, inject_at
from quac_plugins.core.inject.trace import Trace, trace
from quac_plugins.core.prior.sites import PLACES as PRIOR_PLACES
from quac_plugins.core.prior.sites import PriorSite, usable_prior_sites

END = "end"  # a module that a graph is given behind a block
Config = QuACConfig | PriorConfig


@dataclass(frozen=True)
class Place:
    """A site of the whole network, and the names of all modules that return the tensor of the site."""

    site: Site | PriorSite
    names: tuple[str, ...]


@dataclass(frozen=True)
class Whole:
    """The places in the whole network that the rules of some configs mean.

    Attributes:
        places: one list for each config.
        images: the shape of the images of the trace.
    """

    places: list[list[Place]]
    images: tuple[int, ...]

    def put_into(self, model: nn.Module, configs: list[Config]) -> None:
        """Inject into a network of features at the places of the whole network."""
        for config, places in zip(configs, self.places, strict=True):
            if places:
                inject_at(model, config, partial(_find, places), torch.empty(1, *self.images))
            else:
                inject(model, config)

    def create_model(self, base: str, **kwargs: Any) -> nn.Module:
        """Build the network of features by ``timm.create_model``; a graph ("fx") knows the ends of blocks."""
        wanted = kwargs.get("feature_cls")
        if wanted is not FeatureGraphNet and str(wanted).lower() != "fx":
            return timm.create_model(base, **kwargs)
        ends = [place.names for places in self.places for place in places if _is_behind(place.site)]

        class Graph(FeatureGraphNet):
            def __init__(self, model: nn.Module, *args: Any, **kwargs: Any):
                for names in ends:
                    _mark(model, names)
                super().__init__(model, *args, **kwargs)
                self.__class__ = FeatureGraphNet  # type: ignore[assignment]

        model: Any = timm.create_model(base, **{**kwargs, "feature_cls": Graph})
        if hasattr(model, "_model_args"):  # which are saved
            model._model_args = {**model._model_args, "feature_cls": wanted}
        return model


def whole_network(base: str, configs: list[Config], **kwargs: Any) -> Whole:
    """Apply the rules of configs to the whole network.

    Args:
        base: timm's name of the network.
        configs: the configs of the modules to inject.
        **kwargs: arguments of ``timm.create_model`` for the network of features.

    Raises:
        ValueError: a rule finds nothing.
    """
    wrapper_options = ("features_only", "feature_cls", "feature_cfg", "out_indices", "checkpoint_path")
    make = partial(
        timm.create_model, base, **{key: value for key, value in kwargs.items() if key not in wrapper_options}
    )
    if not any(_patterns(config, True) for config in configs):
        return Whole([[] for _ in configs], ())
    host = of_shapes(make)
    if host is not None:
        with contextlib.suppress(RuntimeError, NotImplementedError):
            return _rules_in(host, configs)
    with torch.random.fork_rng(devices=[]):
        return _rules_in(make(), configs)


def of_shapes(make: Callable[[], nn.Module]) -> nn.Module | None:
    """Build a host, without weights, on the meta device.

    Return None for a host that reads the values of its tensors, or asks for weights, while it is built.

    Example:
        >>> next(of_shapes(lambda: nn.Linear(2, 3)).parameters()).is_meta
        True
    """
    generator, numpys = torch.get_rng_state(), np.random.get_state()
    try:
        with torch.device("meta"), _Numbers():
            return make()
    except Exception:
        return None
    finally:  # a real build draws what it would have drawn
        torch.set_rng_state(generator)
        np.random.set_state(numpys)


class _Numbers(TorchFunctionMode):
    """A mode in which ``linspace`` has numbers: most hosts with stochastic depth read them while they are built."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return func(*args, **({"device": "cpu", **kwargs} if func is torch.linspace else kwargs))


def _rules_in(host: nn.Module, configs: list[Config]) -> Whole:
    seen = trace(host)
    return Whole([_places(host, config, seen) for config in configs], (seen.in_chans, *seen.image_size))


def _patterns(config: Config, are_rules: bool) -> Any:
    """Return the config with only its rules, or only its other patterns; None without any."""
    key, rules = ("where", PLACES) if isinstance(config, QuACConfig) else ("site", PRIOR_PLACES)
    kept: Any = [pattern for pattern in config.patterns if (pattern in rules) == are_rules]
    return replace(config, **{key: kept}) if kept else None


def _places(host: nn.Module, config: Config, seen: Trace) -> list[Place]:
    rules = _patterns(config, True)
    sites = find_places(host, rules, seen) if rules is not None else []
    nodes = {feature.name: feature.node for feature in seen.features if feature.is_new}
    usable = {site.name for site in _usable(host, config, seen) if _is_behind(site)}
    places = []
    for site in sites:
        same = [name for name in usable & set(nodes) if _is_behind(site) and nodes[name] == nodes.get(site.name)]
        same.sort(key=lambda name: (name.count("."), name))
        places.append(Place(site, tuple(dict.fromkeys([site.name, *same]))))
    return places


def _usable(model: nn.Module, config: Config, seen: Trace) -> list[Any]:
    if isinstance(config, QuACConfig):
        return usable_sites(model, seen)
    leave_out(model, seen)
    return usable_prior_sites(model, seen)


def _is_behind(site: Site | PriorSite) -> bool:
    return isinstance(site, PriorSite) or site.after


def _find(places: list[Place], model: nn.Module, config: Config, seen: Trace) -> list[Any]:
    """Return the sites of a config in a network of features: existing ``places``, and sites by name."""
    usable = _usable(model, config, seen)
    usable_sites = {(site.name, _is_behind(site)): site for site in usable}
    called = {*seen.calls, *(feature.name for feature in seen.features), *seen.others}
    others = _patterns(config, False)
    matches = find_places(model, others, seen) if others is not None else []
    for place in places:
        names = [name for place_name in place.names for name in _names_in(model, place_name)]
        sites = [site for name in names if (site := usable_sites.get((name, _is_behind(place.site)))) is not None]
        if sites and _alike(sites[0], place.site):
            matches.append(sites[0])
        elif not sites and (lost := [name for name in names if name in called]):
            raise ValueError(
                f"{lost[0]!r} cannot be used in {type(model).__name__}, though {place.site.name!r} can in the whole "
                "network: put it into that, and take its features by forward_intermediates"
            )
    if not matches:
        listing = ", ".join(place.site.name for place in places)
        raise ValueError(
            f"{type(model).__name__} has none of the places that are meant in the whole network ({listing}): take more "
            "features (out_indices), or name a module of this network"
        )
    return [site for site in usable if site in matches]


def _names_in(model: nn.Module, name: str) -> list[str]:
    """Return the names that timm's wrappers of features may give a module of the wrapped network."""
    inside = [f"{child}." for child in model._modules][:1] if len(model._modules) == 1 else []
    plain = [name, name.replace(".", "_", 1), *(inner + name for inner in inside)]
    return [*plain, *(f"{name_}.{END}" for name_ in plain)]


def _alike(site: Any, other: Any) -> bool:
    """Return whether a site has the same form as in the whole network, which timm may have cut off."""
    if isinstance(site, PriorSite):
        return (site.channels, site.layout, site.stride) == (other.channels, other.layout, other.stride)
    return site.channel_dim == other.channel_dim and set(site.channels) <= set(other.channels)


def _mark(model: nn.Module, names: tuple[str, ...]) -> None:
    """Make the end of a block a module of a graph, which keeps leaves alone."""
    modules = dict(model.named_modules())
    leaves = tuple(get_notrace_modules())
    if any(isinstance(modules[name], leaves) or Tracer().is_leaf_module(modules[name], name) for name in names):
        return
    module = modules[names[0]]
    if END not in module._modules:
        module.add_module(END, nn.Identity())
        if not runs_children(module):
            module.register_forward_hook(_end)


def _end(module: Any, args: tuple, output: Tensor) -> Tensor:
    return module.end(output)
