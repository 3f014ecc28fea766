"""The facts of a host in one form: core knows no framework's attributes, and asks here.

Each door adds a reader of its framework's models when it is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

Normalization = tuple[tuple[float, ...], tuple[float, ...]]
Reader = Callable[[nn.Module], dict[str, Any]]
_READERS: list[Reader] = []


@dataclass(frozen=True)
class HostFacts:
    """The facts that readers know of a host; None or empty where no reader knows.

    Attributes:
        architecture: the name of the host's architecture in its framework.
        tag: the name of the host's weights.
        normalization: mean and std with which the host's images are normalized.
        inner_normalization: mean and std with which a host that takes images in [0, 1] normalizes them for its parts.
        input_size: (C, H, W) of the images that the host is meant for.
        in_chans: the number of channels that the host was built for.
        prefix_tokens: the number of tokens before the tokens of the image's grid.
        stage_ends: names of the modules that end the host's stages, in any order.
        classifiers: names of the layers that compute the scores of the classes.
        gives_features: whether the host returns pooled features and not scores.
    """

    architecture: str | None = None
    tag: str | None = None
    normalization: Normalization | None = None
    inner_normalization: Normalization | None = None
    input_size: tuple[int, int, int] | None = None
    in_chans: int | None = None
    prefix_tokens: int | None = None
    stage_ends: tuple[str, ...] = ()
    classifiers: tuple[str, ...] = ()
    gives_features: bool = False


def add_reader(reader: Reader) -> Reader:
    """Add a function that reads the facts of one framework's models.

    Args:
        reader: maps any module to a dict, field of :class:`HostFacts` → value, without the unknown fields or with None
            for them. Of two readers that know a field, the later one counts.

    Returns:
        The reader, so that this function can decorate it.

    Example:
        >>> @add_reader
        ... def read(model):
        ...     return {"input_size": getattr(model, "my_size", None)}
        >>> model = nn.Identity()
        >>> model.my_size = (3, 32, 32)
        >>> facts_of(model).input_size
        (3, 32, 32)
        >>> _READERS.remove(read)
    """
    _READERS.append(reader)
    return reader


def facts_of(model: nn.Module) -> HostFacts:
    """Ask all readers about a model, and return its facts.

    Example:
        >>> import timm, quac_plugins
        >>> facts = facts_of(timm.create_model("test_resnet"))
        >>> facts.architecture, facts.input_size, facts.classifiers
        ('test_resnet', (3, 160, 160), ('fc',))
    """
    known: dict[str, Any] = {}
    for reader in _READERS:
        known |= {name: value for name, value in reader(model).items() if value is not None}
    return HostFacts(**{field.name: known[field.name] for field in fields(HostFacts) if field.name in known})
