"""What a host says of itself, in one form: core knows no framework's attributes, and asks here.

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
    """What is known of a host; None, or nothing, where nobody says it.

    Attributes:
        architecture: its name among those of its framework.
        tag: the name of its weights.
        normalization: mean and std that its images come with.
        inner_normalization: mean and std that it gives its parts their images with, which come to it in [0, 1].
        input_size: (C, H, W) of the images that it is meant for.
        in_chans: channels that it was built for.
        prefix_tokens: tokens before those of the image's grid.
        stage_ends: names of the modules that end its stages, finest first or in any order.
        classifiers: names of the layers that give the scores of its classes.
        gives_features: whether it returns pooled features where others of its kind return scores.
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
    """Let a door read its framework's models: a function from any module to what it knows, by the fields' names.

    What it does not know it leaves out or gives as None. Of two readers that know a thing the later one is believed.

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
    """What the readers know of a model.

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
