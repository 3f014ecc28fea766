"""The base of all activations: channels and their axis, preserve, and the table of names.

An activation is one class: ``name``, ``numbers`` (how many numbers a channel it asks of its driver), ``equation`` and
``neutral`` (the values of the equation's parameters under preserve). Defining the class puts it into the table.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from quac_plugins.core.graphs import called_whole
from quac_plugins.core.hooks import without_hooks
from quac_plugins.core.kernels import activate
from quac_plugins.core.kernels.plain import per_channel
from quac_plugins.core.naming import unknown
from quac_plugins.core.quality.context import QualityContext

INITS = ("paper", "preserve")
HOSTS: dict[type[nn.Module], str] = {
    nn.Identity: "identity", nn.ReLU: "relu", nn.ReLU6: "relu6", nn.Hardswish: "hardswish"
}  # fmt: skip
"""Host activations that kernels compute themselves; others are given to them to read."""

ACTIVATIONS: dict[str, type[ChannelActivation]] = {}


def resolve_activation(name: str) -> type[ChannelActivation]:
    """Return the activation class of a name such as ``"qacon"``.

    Raises:
        ValueError: no activation has the name; the message lists the known names.

    Example:
        >>> resolve_activation("qacon").__name__
        'QACON'
    """
    if isinstance(name, str) and name in ACTIVATIONS:
        return ACTIVATIONS[name]
    raise unknown("unknown activation", name, sorted(ACTIVATIONS))


class ChannelActivation(nn.Module):
    """An activation with parameters for every channel.

    Under ``init="preserve"`` it computes host(x) + f(x; θ) − f(x; θ⁰), where θ⁰ are the parameters' values at
    initialization: exactly host(x) at first, bit for bit, while every parameter has its gradient of f at once. Where
    f(·; θ⁰) is the host's function (SiLU for ACON, ReLU for PReLU, GELU for the gated GELU), f(x; θ) is what it stays.

    Args:
        channels: C.
        channel_dim: axis of the channels, 1 (NCHW) or −1 (tokens, NHWC).
        init: ``"paper"`` or ``"preserve"``.
        host: under preserve, the activation whose function is kept; the identity by default.
    """

    name: ClassVar[str] = ""
    numbers: ClassVar[int] = 0
    neutral: ClassVar[tuple[float, ...]] = ()
    needs_quality: ClassVar[bool] = False
    equation: ClassVar[Callable[..., Tensor]]  # y = f(x, *parameters), the parameters broadcastable against x

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not cls.__dict__.get("name"):  # a subclass without a name of its own does not take its parent's place
            return
        taken = ACTIVATIONS.get(cls.name)
        if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"the activation name {cls.name!r} is taken by {taken.__module__}.{taken.__qualname__}")
        missing = [what for what in ("equation", "neutral") if not getattr(cls, what, None)]
        if missing or len(cls.neutral) < cls.numbers:
            what = " and ".join(missing) or f"{cls.numbers} values in neutral"
            raise TypeError(f"activation {cls.name!r} ({cls.__qualname__}) must give {what}")
        ACTIVATIONS[cls.name] = cls

    def __init__(self, channels: int, channel_dim: int = 1, init: str = "paper", host: nn.Module | None = None):
        super().__init__()
        if init not in INITS:
            raise ValueError(f"unknown init {init!r}; known: {', '.join(INITS)}")
        if channel_dim not in (1, -1):
            raise ValueError(f"channel_dim must be 1 (NCHW) or -1 (tokens, NHWC), got {channel_dim}")
        if not isinstance(channels, int) or channels < 1:
            raise ValueError(f"channels must be a whole number ≥ 1, got {channels!r}")
        self.channels = channels
        self.channel_dim = channel_dim
        self.init = init
        self.layer = type(self).__name__
        self.context: QualityContext | None = None
        self.host: nn.Module | None = None
        if init == "preserve":
            self.host = _out_of_place(host) if host is not None else nn.Identity()

    # -- what a subclass says

    def values(self, x: Tensor, q: Tensor | None) -> tuple[Tensor, ...]:
        """Return the parameters for x (and q), each broadcastable against x; every subclass defines this method."""
        raise TypeError(f"{type(self).__name__} does not say where its parameters come from")

    # -- what all share

    def forward(self, x: Tensor, q: Tensor | None = None) -> Tensor:
        """Activate x.

        Args:
            x: (B, C, H, W) or any shape with channels at ``channel_dim``; floating point.
            q: (B, Q) or (B, Q, 1, 1) quality features. None: the tap gives them.

        Returns:
            y, with the shape and dtype of x.
        """
        if (node := called_whole(self, x)) is not None:
            return node
        self._check(x)
        start, below = ((), "") if self.host is None else (self.neutral, HOSTS.get(type(self.host)) or self.host)
        y = activate(x, self.values(x, q), self.equation, self.channel_dim, start, below)
        if self.context is not None:
            self.context.mark(y)
        return y

    def shaped(self, parameter: Tensor, x: Tensor) -> Tensor:
        """Reshape a parameter (1, C, 1, 1) so that it broadcasts along the channels of x."""
        if x.ndim == 4 and self.channel_dim == 1:
            return parameter
        return per_channel(parameter.flatten(), x, self.channel_dim)

    def _check(self, x: Tensor) -> None:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"layer {self.layer!r} ({type(self).__name__}) expects a floating point tensor, got {got}")
        if x.ndim < 2 or x.shape[self.channel_dim] != self.channels:
            where = "axis 1" if self.channel_dim == 1 else "the last axis"
            raise ValueError(
                f"layer {self.layer!r} ({type(self).__name__}) expects {self.channels} channels on {where}, "
                f"got shape {tuple(x.shape)}"
            )

    def extra_repr(self) -> str:
        """Return the number of channels and their axis, for ``print(model)``."""
        return f"{self.channels}, channel_dim={self.channel_dim}, init={self.init!r}"


def _out_of_place(host: nn.Module) -> nn.Module:
    """Copy the host's activation, with shared parameters, so that it keeps its input x, which is read again later."""
    host = without_hooks(copy.copy(host))  # they see what the site returns
    if getattr(host, "inplace", False):
        setattr(host, "inplace", False)  # noqa: B010  (not an attribute that nn.Module declares)
    return host
