"""The record of an injection, which a model keeps, and functions that read it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from quac_plugins.core.hooks import PRIOR_NAME
from quac_plugins.core.inject.config import QuACConfig
from quac_plugins.core.inject.images import Images
from quac_plugins.core.inject.sites import Site
from quac_plugins.core.module_names import parts, paths, tensor_names
from quac_plugins.core.prior.config import PriorConfig
from quac_plugins.core.prior.sites import PriorSite
from quac_plugins.core.quality.registry import QualityFunction

RECORD = "_quac_injection"
_OF_HOST = re.compile(r"(widths\.\d+\.)?host\.")  # behind a site's name: parameters of the activation that it keeps


@dataclass
class PriorInjection:
    """The degradation prior inside a host.

    Attributes:
        config: the config that was given to :func:`inject`.
        sites: the sites of the prior's modules, in the order of the calls.
        tap: the name of the tapped layer; None if nothing in the prior reads q.
        quality: the quality function; None if nothing in the prior reads q.
        frozen: parameters of the host that took gradients before, as :meth:`Injection.name_in_host` names them.
    """

    config: PriorConfig
    sites: list[PriorSite]
    tap: str | None
    quality: QualityFunction | None
    frozen: list[str]


@dataclass(repr=False)
class Injection:
    """The record of everything inside a host, from which it is saved, removed and described.

    Attributes:
        config: of the activations, as given to :func:`inject`; None if only a prior was put in.
        sites: of the activations, in module order.
        inside: name → the very module that was put in there (in a tuple, so that it is no second child of the host).
        tap: name of the layer that is tapped for the activations; None if they need no quality.
        quality: the activations' quality function; None if they need no quality.
        replaced: site name → the host's own module (in a tuple, so that it is no parameter of the host).
        prior: the degradation prior, if there is one.
        images: the form of the host's images.
        attributes: earlier values of attributes that a door has rewritten; :func:`remove` restores them.
        added: attributes that a door has added; :func:`remove` deletes them.
        changed: a door's function, called when the content of the host is no longer what the door injected.
        removed: a door's function, called when everything has been removed.
        kept: folder → function that clears it: states of finished fits, kept until the adapter is saved.
        host_parameters: the number of the host's own parameters.

    ``str`` gives a summary of a few lines, like PEFT's ``print_trainable_parameters``.

    Example:
        >>> import timm, quac_plugins as quac
        >>> print(quac.injection_of(timm.create_model("test_resnet_qacon")))
        Injection(
          qacon (init=preserve, norm=batch) at 7 places: conv1.2, conv1.5, act1, …, layer4.0.act1
          q: brisque (36 numbers) of the images that enter conv1.0
          parameters: 46,852 || host: 469,688 || 9.98 %
        )
    """

    config: QuACConfig | None = None
    sites: list[Site] = field(default_factory=list)
    inside: dict[str, tuple[nn.Module, ...]] = field(default_factory=dict)
    tap: str | None = None
    quality: QualityFunction | None = None
    replaced: dict[str, tuple[nn.Module, ...]] = field(default_factory=dict)
    prior: PriorInjection | None = None
    images: Images | None = None
    attributes: dict[str, Any] = field(default_factory=dict)
    added: list[str] = field(default_factory=list)
    changed: Callable[[nn.Module], None] | None = None
    removed: Callable[[nn.Module], None] | None = None
    kept: dict[str, Callable[[], None]] = field(default_factory=dict)
    host_parameters: int = 0

    @property
    def parameters(self) -> int:
        """Return the number of injected parameters, without the host's own activations that are kept."""
        named = ((f"{at}.{n}", p) for at, (module,) in self.inside.items() for n, p in module.named_parameters())
        return sum(p.numel() for name, p in named if self.name_in_host(name) is None)

    def __repr__(self) -> str:
        """Return modules, places, quality function and number of parameters."""
        lines = []
        if self.config is not None:
            c = self.config
            norm = f", norm={c.norm}" if c.is_driven else ""
            lines += [f"{c.activation} (init={c.init}{norm}) at {_places(self.sites)}", _reads(self.quality, self.tap)]
        if self.prior is not None:
            prior, p = self.prior, self.prior.config
            together = p.margins or p.fdm == "margin"  # one place serves all degradations
            best = "" if together else f", the best {p.top_k}"
            routed = f" for {len(p.experts)} degradations{best}" if p.experts else ""
            fdm = f"{p.fdm} and margins" if p.margins else p.fdm
            lines += [f"prior {fdm}{routed} at {_places(prior.sites)}", _reads(prior.quality, prior.tap)]
        share = f" || {100 * self.parameters / self.host_parameters:.3g} %" if self.host_parameters else ""
        lines += [f"parameters: {self.parameters:,} || host: {self.host_parameters:,}{share}"]
        return "\n  ".join(["Injection(", *(line for line in lines if line)]) + "\n)"

    def options_to_save(self, prior: bool = False) -> dict[str, Any]:
        """Return the options of the activations, or of the prior, for a file: names replace regular expressions."""
        held = self.prior if prior else self
        assert held is not None
        assert held.config is not None
        options = held.config.to_dict()
        key = "site" if prior else "where"
        if any(pattern.startswith("re:") for pattern in held.config.patterns):
            options[key] = [site.name for site in held.sites]
        return options

    def prefixes(self) -> tuple[str, ...]:
        """Return the beginnings of the names of injected tensors, activations before the prior."""
        return tuple(f"{name}." for name in sorted(self.inside, key=lambda name: name.endswith(f".{PRIOR_NAME}")))

    def name_in_host(self, name: str) -> str | None:
        """Return the host's own name of a tensor of the state dict; None for an injected tensor."""
        return _name_in_host(name, self.prefixes())


def _places(sites: Sequence[Site | PriorSite], most: int = 4) -> str:
    names = [site.name for site in sites]
    shown = names if len(names) <= most else [*names[: most - 1], "…", names[-1]]
    return f"{len(names)} place{'s' * (len(names) != 1)}: {', '.join(shown)}"


def _reads(quality: QualityFunction | None, tap: str | None) -> str:
    where = f" of the images that enter {tap or 'the model itself'}" if tap is not None else ""
    return f"q: {quality.name} ({quality.channels} numbers){where}" if quality is not None else ""


def _name_in_host(name: str, prefixes: tuple[str, ...]) -> str | None:
    prefix = next((p for p in prefixes if name.startswith(p)), None)
    if prefix is None:
        return name
    kept = _OF_HOST.match(name, len(prefix))
    return prefix + name[kept.end() :] if kept else None


def names_in_host(model: nn.Module) -> Callable[[str], str | None]:
    """Return a function like :meth:`Injection.name_in_host` for any path in a state dict, also through wrappers."""
    record, known = injection_of(model) or Injection(), paths(model)
    ours = {id(module) for (module,) in record.inside.values()}
    renamed = [(known[path], module) for path, module in model.named_modules(remove_duplicate=False)]
    prefixes = tuple(dict.fromkeys(f"{name}." for name, module in renamed if id(module) in ours))
    name_of = tensor_names(model)
    return lambda name: _name_in_host(name_of(name), prefixes)


def modules_inside(model: nn.Module) -> dict[str, nn.Module]:
    """Return name → module for everything that was injected.

    Raises:
        ValueError: a module is no longer in its place, so that the record is wrong.
    """
    record = injection_of(model) or Injection()
    current = parts(unwrap(model))
    for name, (module,) in record.inside.items():
        if current.get(name) is not module:
            now = next((other for other, candidate in current.items() if candidate is module), None)
            raise ValueError(
                f"what was put in at {name!r} is {'not in the model' if now is None else f'now at {now!r}'}: that part "
                "was replaced or moved. Put it back, or call quac_plugins.remove(model) and inject again"
            )
    return {name: module for name, (module,) in record.inside.items()}


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside ``torch.compile``, DistributedDataParallel, DataParallel or an averaged copy."""
    while RECORD not in model.__dict__:
        inner = model._modules.get("_orig_mod", model._modules.get("module"))
        if inner is None:
            break
        model = inner
    return model


def injection_of(model: nn.Module) -> Injection | None:
    """Return the record of a model (also of a wrapped one, see :func:`unwrap`); None if nothing was injected.

    Example:
        >>> import timm, quac_plugins as quac
        >>> quac.injection_of(timm.create_model("test_resnet")) is None
        True
    """
    return unwrap(model).__dict__.get(RECORD)


def nothing_inside(model: nn.Module, todo: str) -> ValueError:
    """Return the error for a model without an injection; it names parts that have one, such as a backbone."""
    inside = [name for name, module in unwrap(model).named_modules() if name and injection_of(module) is not None]
    if inside:
        todo = f"what holds it is {' and '.join(repr(name) for name in inside)}: give that module"
    return ValueError(f"{type(unwrap(model)).__name__} holds no QuAC and no prior; {todo}")
