"""The arguments of a traced host: images alone, or images and other arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

Example = Tensor | tuple | Mapping[str, Any]


@dataclass(frozen=True)
class Arguments:
    """The arguments of a host; the images are the first of them.

    Attributes:
        images: (B, C, H, W), or the tokens (B, N, C) of images.
        others: positional arguments after the images.
        named: arguments by name; the images are among them if ``first`` is their name.
        first: name of the images' argument, None if it is positional.
    """

    images: Tensor
    others: tuple[Any, ...] = ()
    named: tuple[tuple[str, Any], ...] = ()
    first: str | None = None

    @property
    def alone(self) -> bool:
        """Return whether the host takes images and nothing else."""
        return not self.others and not self.named and self.first is None

    def call(self, function: Callable[..., Any]) -> Any:
        """Call the host, or a method of it."""
        if self.first is not None:
            return function(**{self.first: self.images}, **dict(self.named))
        return function(self.images, *self.others, **dict(self.named))

    def of_batch(self, batch: int, like: nn.Module, make: Callable[[Tensor, tuple[int, ...]], Tensor]) -> Arguments:
        """Return the arguments for another batch; ``make(tensor, shape)`` makes each tensor with a row for each image.

        Floating point tensors go to the precision, and all to the device, of the host's parameters.
        """
        first = next((p for p in like.parameters() if p.is_floating_point()), None)
        rows = len(self.images)

        def change(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if first is not None:
                dtype = first.dtype if value.is_floating_point() else value.dtype
                value = value.to(dtype=dtype, device=first.device)
            return make(value, (batch, *value.shape[1:])) if value.ndim and len(value) == rows else value

        images, others, named = tree_map(change, (self.images, self.others, dict(self.named)))
        return replace(self, images=images, others=others, named=tuple(named.items()))


def arguments_of(example: Example | None, size: Callable[[], tuple[int, int, int]], tokens: bool = False) -> Arguments:
    """Return the arguments of a user's example; without an example, one image of ``size()``.

    Raises:
        ValueError: the example does not begin with images (B, C, H, W) or, with ``tokens``, tokens (B, N, C).

    Example:
        >>> arguments_of((torch.rand(2, 4, 8, 8), 10), lambda: (3, 8, 8)).others
        (10,)
    """
    if example is None:
        return Arguments(torch.empty(1, *size()))
    arguments = None
    if isinstance(example, Tensor):
        arguments = Arguments(example)
    elif isinstance(example, tuple) and example:
        arguments = Arguments(example[0], example[1:])
    elif isinstance(example, Mapping) and example:
        first = next(iter(example))
        arguments = Arguments(
            example[first], named=tuple((k, v) for k, v in example.items() if k != first), first=first
        )
    value = arguments.images if arguments is not None else example
    if (
        arguments is None
        or not isinstance(value, Tensor)
        or value.ndim not in (3 if tokens else 4, 4)
        or not len(value)
    ):
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            "example must be a tensor of images (B, C, H, W), or the host's arguments that begin with them (a tuple, "
            f"or a dict by name), or with tokens (B, N, C) where q is given (tap='given'), got {got}"
        )
    return arguments if arguments.images.is_floating_point() else replace(arguments, images=arguments.images.float())
