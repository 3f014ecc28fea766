"""Margins: a scale and a shift for every channel of a host's norms and for each degradation, chosen by quality.

A degradation moves the distribution of a channel by a margin of its own: on this observation rests the deep degradation
prior (Wang et al., CVPR 2020). The smallest feature de-drifting module moves the distribution back: behind a norm, or
behind a convolution into which a norm was folded, the features x become

    y = (1 + Σ_k w_k(q) scale_k) · x + Σ_k w_k(q) shift_k

where w_k(q) is the share of degradation k in the image, which the gate computes from its quality feature q. A picture
that q knows for clean hardly changes. If q tells a severity, each degradation has a margin for a mild and one for a
strong case, and cases between them are interpolated. Margins add no multiply-add of a convolution, and a single
degradation can be folded into the host (:func:`quac_plugins.fuse`).
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from quac_plugins.core.graphs import called_whole, in_graph
from quac_plugins.core.hooks import PRIOR_NAME, add_hook
from quac_plugins.core.precision import full_precision
from quac_plugins.core.prior.fdm import FDM, LAYOUTS, all_zero
from quac_plugins.core.prior.routed import Gate
from quac_plugins.core.prior.sites import Grid, PriorSite
from quac_plugins.core.private import hides_memory, hooked_everywhere
from quac_plugins.core.quality.context import QualityContext, QualityError

SEVERITIES = (2.0, 4.0)
"""The severities that margins are kept for, where q tells one; beyond them the nearer one is used."""


class _Latest(NamedTuple):
    """Results of one q; replaced as a whole, since threads share a model."""

    q: Tensor
    mode: tuple[bool, bool]  # with gradients, of inference
    shares: Tensor
    made: dict[weakref.ref[Margin], tuple[Tensor, Tensor]]  # scale and shift of each place


class Mixture(nn.Module):
    """The shares of the margins for each image: one module for all places of a host, which runs once for each batch.

    Args:
        quality_channels: Q.
        experts: the number of degradations with margins, K.
        told: see :class:`Gate`.
        severity: the index of the severity, 0 to 5, in q. None: q tells no severity.

    Attributes:
        given: shares (B, K·S) that replace q's, while a fit knows the degradation of each image; else None.
    """

    _latest: _Latest | None = None
    _places: tuple[weakref.ref[Margin], ...] = ()  # that have asked

    def __init__(self, quality_channels: int, experts: int, told: Sequence[int] = (), severity: int | None = None):
        super().__init__()
        self.gate = Gate(quality_channels, experts + 1, told)
        self.severity = severity
        self.given: Tensor | None = None

    def forward(self, q: Tensor, afresh: bool = True) -> Tensor:
        """Compute shares (B, K·S) of q (B, Q), at least float32; each row sums to at most one.

        Args:
            q: quality features.
            afresh: compute the shares; False returns the latest shares if they are of the same q.
        """
        if in_graph():
            return self._of(q)
        mode, latest = (torch.is_grad_enabled(), torch.is_inference_mode_enabled()), self._latest
        if not afresh and latest is not None and latest.q is q and latest.mode == mode:
            return latest.shares
        shares, made = self._of(q), {}
        if afresh and not mode[0]:
            with full_precision(shares):
                made = {ref: place.mixed(shares) for ref in self._places if (place := ref()) is not None}
        # what has a gradient belongs to one graph: it is made anew at each place
        self._latest = None if shares.requires_grad else _Latest(q, mode, shares, made)
        return shares

    def made(self, place: Margin, shares: Tensor) -> tuple[Tensor, Tensor] | None:
        """Hand out scale and shift of a place, once for each batch; None where the place makes them.

        Those of all places are made one after the other at the first of them: between the layers of a host each would
        take several times as long, its code and data being out of the processor's caches.
        """
        latest, ref = self._latest, weakref.ref(place)
        if torch.is_grad_enabled() or in_graph() or latest is None or latest.shares is not shares:
            return None
        if ref not in self._places:
            self._places = (*(other for other in self._places if other() is not None), ref)
        return latest.made.pop(ref, None)

    def _of(self, q: Tensor) -> Tensor:
        q = q.to(self.gate.fc1.weight.device)
        with full_precision(q):
            return spread(self.gate(q).softmax(dim=1)[:, 1:], self.severities(q))

    def severities(self, q: Tensor) -> Tensor | None:
        """Return the severities (B,) in q (B, Q), or None if q tells none."""
        return None if self.severity is None else q[:, self.severity].to(torch.promote_types(q.dtype, torch.float32))

    @property
    def kept(self) -> int:
        """Return S, the number of severities with margins."""
        return 1 if self.severity is None else len(SEVERITIES)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_latest": None, "_places": (), "given": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Mixture:
        memo[id(self)] = new = type(self).__new__(type(self))
        new.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        return new


def spread(chosen: Tensor, severity: Tensor | None) -> Tensor:
    """Spread the shares of degradations (B, K) over the severities with margins: (B, K·S).

    Example:
        >>> spread(torch.tensor([[1.0, 0.0]]), torch.tensor([2.5])).tolist()
        [[0.75, 0.25, 0.0, 0.0]]
    """
    if severity is None:
        return chosen
    mild, strong = SEVERITIES
    part = ((severity.to(chosen) - mild) / (strong - mild)).clamp(0, 1)[:, None]
    return torch.stack([chosen * (1 - part), chosen * part], dim=2).flatten(1)


class Margin(FDM):
    """The margins at one place of a host.

    Args:
        site: the site of the margins.
        experts: the number of degradations with margins, K; 0: a single margin, for all images.
        mixture: the module that computes each image's shares; the host's first place owns it, later places refer to it.
        owns: whether this place owns the mixture.
        of_residual: the margin moves the residual of an FDM, which has to vanish for clean pictures: the scales are
            added to the sum of the shares, and not to 1.

    Attributes:
        table: (K·S, 2·C), or (1, 2·C) for a single margin: scales minus one, then shifts.
        over: whether the margin alone reads the layer's output, which it then may overwrite.
        observer: a function of margin and features that replaces the computation, while statistics are taken.

    Example:
        >>> import torch
        >>> module = Margin(PriorSite("bn1", 8, "nchw", stride=2))
        >>> x = torch.randn(2, 8, 5, 5)
        >>> torch.equal(module(x), x)
        True
    """

    name = "margin"
    places = "norms"
    over = False
    of_residual = False

    def __init__(
        self,
        site: PriorSite,
        experts: int = 0,
        mixture: Mixture | None = None,
        owns: bool = False,
        of_residual: bool = False,
    ):
        nn.Module.__init__(self)
        self.site, self.of_residual = site, of_residual
        self.layer = site.name
        self.image_size: Any = None
        self.context: QualityContext | None = None
        self.observer: Callable[[Margin, Tensor], Tensor] | None = None
        rows = experts * mixture.kept if mixture is not None else 1
        self.table = nn.Parameter(torch.zeros(rows, 2 * site.channels))
        self.mixture = mixture if owns else None
        self._others = (mixture,)  # in a tuple, so that its parameters are in the state dict once

    @property
    def scale(self) -> Tensor:
        """Return the scales minus one, (K·S, C)."""
        return self.table[:, : self.site.channels]

    @property
    def shift(self) -> Tensor:
        """Return the shifts, (K·S, C)."""
        return self.table[:, self.site.channels :]

    @property
    def shared(self) -> Mixture | None:
        """Return the mixture of all places; None for a single margin."""
        return self._others[0]

    def shares(self, x: Tensor) -> Tensor | None:
        """Compute shares (B, K·S) for features x of B images; None for a single margin."""
        mixture = self.shared
        if mixture is None:
            return None
        if mixture.given is not None:
            return mixture.given
        if self.context is None:
            raise QualityError(f"the margin after {self.layer!r} has no quality features: it is not inside a model")
        q = self.context.current(x, self.layer)
        if q.shape[0] != x.shape[0]:
            raise QualityError(
                f"the margin after {self.layer!r} got features of {x.shape[0]} images, but quality features of "
                f"{q.shape[0]}"
            )
        return mixture(q, afresh=self.mixture is not None).to(x.device)

    def forward(  # type: ignore[override]
        self, x: Tensor, grid: Grid | None = None, over: bool = False
    ) -> Tensor:
        """Scale and shift the channels of features x of the site's layout; shape and dtype stay.

        Args:
            x: features.
            grid: unused, as channels have no grid.
            over: x may be overwritten, unless a gradient needs it or a hook of the margin sees it.
        """
        if (node := called_whole(self, x)) is not None:
            return node
        site = self.site
        axis = 1 if site.layout == "nchw" else -1
        if (
            not isinstance(x, Tensor)
            or x.ndim != (3 if site.layout == "tokens" else 4)
            or x.shape[axis] != site.channels
        ):
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            shape = LAYOUTS[site.layout].format(site.channels)
            raise ValueError(f"the margin after {site.name!r} expects features {shape}, got {got}")
        if self.observer is not None:
            return self.observer(self, x)
        scale, shift = self.coefficients(x)
        over = over and self._may_write_over(x)
        if axis == 1 and x.is_contiguous():  # three times as fast as one operation, which torch does not vectorize here
            y = (x.mul_(scale) if over else x * scale).add_(shift)
        else:
            y = torch.addcmul(shift, x, scale, out=x if over else None)
        if self.context is not None:
            self.context.mark(y)
        return y

    def coefficients(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return scale and shift in the dtype of x, which broadcast against x."""
        shares = self.shares(x)
        made = None if shares is None else self.shared.made(self, shares)  # type: ignore[union-attr]
        if made is None:
            with full_precision(x):
                made = self.mixed(shares)
        return made[0].to(x.dtype), made[1].to(x.dtype)

    def mixed(self, shares: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mix scale and shift, at least float32, which broadcast against features; of shares (B, K·S)."""
        table = self.table.to(torch.promote_types(self.table.dtype, torch.float32))
        both = table if shares is None else shares.to(table) @ table
        before, behind = {"nchw": ((), (1, 1)), "nhwc": ((1, 1), ()), "tokens": ((1,), ())}[self.site.layout]
        scale, shift = both.view(-1, 2, *before, self.site.channels, *behind).unbind(1)
        one: Any = 1
        if self.of_residual and shares is not None:
            one = shares.to(table).sum(1).view(-1, *(1,) * (scale.ndim - 1))
        return scale + one, shift

    def _may_write_over(self, x: Tensor) -> bool:
        """Return whether y can take the memory of x: new memory costs several times the computation of y."""
        if torch.is_grad_enabled() or x.requires_grad or in_graph():
            return False
        if self._forward_hooks or self._forward_pre_hooks or hooked_everywhere():  # they see x as well
            return False
        return x.is_inference() == torch.is_inference_mode_enabled() and not hides_memory(x)

    @property
    def gate(self) -> Gate | None:
        """Return the gate that chooses between the degradations, or None for a single margin."""
        return None if self.shared is None else self.shared.gate

    def is_trained(self, expert: int) -> bool:
        """Return whether a degradation's margin is fitted."""
        rows = slice(expert * self.shared.kept, (expert + 1) * self.shared.kept) if self.shared else slice(None)
        return not all_zero(self.table[rows])

    @property
    def reads_quality(self) -> bool:
        """Return whether the margin needs the q of the image."""
        return self.shared is not None

    @property
    def is_fresh(self) -> bool:
        """Return whether the margin is still as created: the identity."""
        return all_zero(self.table)

    def extra_repr(self) -> str:
        """Return the place, for ``print(model)``."""
        return f"{self.site.channels} channels, {self.site.layout}, {len(self.table)} margins"


def put_inside(fdm: FDM, experts: int, mixture: Mixture | None) -> None:
    """Put margins behind the convolutions of an FDM, which then serves all degradations."""
    convolutions = [(name, m) for name, m in fdm.named_modules() if isinstance(m, nn.Conv2d)]
    for name, layer in convolutions:
        site = PriorSite(f"{fdm.site.name}.{PRIOR_NAME}.{name}", layer.out_channels, "nchw")
        layer.add_module(PRIOR_NAME, Margin(site, experts, mixture, of_residual=layer is convolutions[-1][1]))
        add_hook(layer, PRIOR_NAME)


def margins_inside(module: nn.Module) -> list[Margin]:
    """Return the margins behind the convolutions of an FDM; none if the module is a margin itself."""
    return [inner for inner in module.modules() if isinstance(inner, Margin) and inner is not module]
