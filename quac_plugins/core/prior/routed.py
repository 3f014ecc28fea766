"""The routed prior: several FDMs and the identity under a gate that reads the image's quality.

One adapter then serves all degradations: q tells which one to undo. With a gate g(q) over [identity, expert 1, …,
expert E] (probabilities that a quality function such as ``degradation`` gives, or softmax(W₂ ReLU(W₁ q̂)) of another)
the features become x + Σ g_e · std · r_e(z). The sum is over the ``top_k`` most likely alone (their weights made to sum
to one), each expert seeing the images that were sent to it, so that an image costs what ``top_k`` FDM cost. Graphs
(``torch.compile``, ``torch.export``, ``torch.jit.trace``) cannot look at the weights: they compute all experts, to the
same result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quac_plugins.core.graphs import called_whole, in_graph
from quac_plugins.core.precision import full_precision
from quac_plugins.core.prior.fdm import all_zero, resolve_fdm
from quac_plugins.core.prior.sites import Grid, PriorSite
from quac_plugins.core.private import has_numbers
from quac_plugins.core.quality.context import QualityContext, QualityError

_HIDDEN = 64
_FARTHEST = 4.0  # deviations
_ELSEWHERE = 0.1  # a degradation that no expert is for is less expected than those that experts are for
_LEAST = 1e-7  # probability: the logarithm of a smaller one says nothing more
IDENTITY = "identity"


class Gate(nn.Module):
    """A gate, which chooses the expert for an image from its quality features alone.

    If the quality function tells degradations apart, the gate reads its probabilities: an expert gets the probability
    of its own degradation; the identity gets the probabilities of clean pictures and of degradations without an expert,
    which are discounted, since the user expects the experts' degradations. The learned logits of a fit are added.

    Args:
        quality_channels: Q.
        choices: 1 + E, the identity first.
        told: the choices that belong to q's first numbers, which are probabilities, the one of clean pictures (0)
            first. Empty: q holds no probabilities, and the gate must learn everything.

    Attributes:
        mean, std: (Q,), mean and deviation of :meth:`features` over the images of the fit; 0 and 1 before.
        masses: (1 + E, K), the share of each of the K probabilities in each choice; empty without probabilities.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, quality_channels: int, choices: int, told: Sequence[int] = ()):
        super().__init__()
        self.register_buffer("mean", torch.zeros(quality_channels))
        self.register_buffer("std", torch.ones(quality_channels))
        self.fc1 = nn.Linear(quality_channels, _HIDDEN)
        self.fc2 = nn.Linear(_HIDDEN, choices)
        nn.init.zeros_(self.fc2.weight)
        nn.init.zeros_(self.fc2.bias)
        self.masses = _masses(choices, told)  # no buffer: it follows from the config, and is in no state dict

    def forward(self, q: Tensor) -> Tensor:
        """Compute logits (B, 1 + E) of q (B, Q), at least float32 in a host of any dtype."""
        with full_precision(q):
            learned = _linear(self.fc2, self.hidden(self.features(q)))
            return learned + self.told(q) if self.masses else learned

    def told(self, q: Tensor) -> Tensor:
        """Compute logits (B, 1 + E) from the probabilities in q (B, Q) alone."""
        q = q.to(torch.promote_types(q.dtype, torch.float32))
        masses = torch.tensor(self.masses, dtype=q.dtype, device=q.device)
        return (q[:, : masses.shape[1]] @ masses.T).clamp(min=_LEAST).log()

    def features(self, q: Tensor) -> Tensor:
        """Return q (B, Q) with logarithms in the place of probabilities."""
        kinds = len(self.masses[0]) if self.masses else 0
        q = q.to(torch.promote_types(self.mean.dtype, torch.float32))
        return torch.cat([q[:, :kinds].clamp(min=_LEAST).log(), q[:, kinds:]], dim=1) if kinds else q

    def hidden(self, features: Tensor) -> Tensor:
        """Compute the hidden layer (B, 64) of the learned logits from features (B, Q)."""
        wide = features.dtype
        # far from all that was fitted on, no choice may grow without bounds
        h = ((features - self.mean.to(wide)) / self.std.to(wide)).clamp(-_FARTHEST, _FARTHEST)
        return _linear(self.fc1, h).relu()

    @property
    def needs_fit(self) -> bool:
        """Return whether the quality function leaves a choice untold."""
        return not self.masses or any(max(row) < 1 for row in self.masses[1:])

    @property
    def is_fresh(self) -> bool:
        """Return whether the gate is still as created: it prefers no choice."""
        return all_zero(self.mean, self.std - 1, *self.fc2.state_dict().values())


def _masses(choices: int, told: Sequence[int]) -> list[list[float]]:
    """Return the ``masses`` of a :class:`Gate`."""
    if not told:
        return []
    rows = [[0.0] * len(told) for _ in range(choices)]
    for kind, choice in enumerate(told):
        rows[choice][kind] = _ELSEWHERE if kind and not choice else 1.0
    for choice in set(range(1, choices)) - set(told):  # it looks like one of the others; like which must be learned
        rows[choice] = [share if share < 1 else 0.0 for share in rows[0]]
    return rows


def _linear(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a linear layer in the dtype of x; a layer that replaces it (quantized, adapted) is simply called."""
    if type(layer) is not nn.Linear:
        return layer(x)
    return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))


class RoutedFDM(nn.Module):
    """Experts at one site, and the gate over them.

    Args:
        site: the site of the experts.
        fdm: the name of the experts' FDM.
        experts: the number of experts, E.
        quality_channels: Q.
        top_k: the number of experts that an image is sent to.
        width, act: width and activation of the experts; the activation must not read q, as the gate does.
        told: see :class:`Gate`.

    Attributes:
        soft: mix all experts instead of the best, so that all have gradients.
        only: the index of an expert that gets every image, for fits of one expert after the other; None: the gate
            chooses.
    """

    def __init__(
        self,
        site: PriorSite,
        fdm: str,
        experts: int,
        quality_channels: int,
        top_k: int = 1,
        width: int | None = None,
        act: str = "relu",
        told: Sequence[int] = (),
    ):
        super().__init__()
        self.site = site
        self.top_k = min(top_k, experts + 1)
        self.soft = False
        self.only: int | None = None
        self.context: QualityContext | None = None
        self.layer = site.name
        self.gate = Gate(quality_channels, experts + 1, told)
        self.experts: Any = nn.ModuleList(resolve_fdm(fdm)(site, width, act) for _ in range(experts))  # of FDM

    def is_trained(self, expert: int) -> bool:
        """Return whether an expert is fitted."""
        return not self.experts[expert].is_fresh

    def weights(self, x: Tensor) -> Tensor:
        """Compute the gate's weights (B, 1 + E) for features x of B images; each row sums to one."""
        rows = x.shape[0]
        if self.only is not None:
            return torch.eye(len(self.experts) + 1, device=x.device)[self.only + 1].expand(rows, -1)
        if self.context is None:
            raise QualityError(f"the prior after {self.layer!r} has no quality features: it is not inside a model")
        q = self.context.current(x, self.layer)
        if q.shape[0] != rows:
            raise QualityError(
                f"the prior after {self.layer!r} got features of {rows} images, but quality features of {q.shape[0]}"
            )
        weights = self.gate(q.to(x.device)).softmax(dim=1)
        if self.soft or self.top_k > len(self.experts):
            return weights
        best, chosen = weights.topk(self.top_k, dim=1)
        return torch.zeros_like(weights).scatter(1, chosen, best / best.sum(dim=1, keepdim=True))

    def forward(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        """Repair features x of the site's layout, each image by the experts that its quality asks for.

        Args:
            x: features.
            grid: (h, w) of tokens. None: the site's grid.
        """
        if (node := called_whole(self, x)) is not None:
            return node
        weights = self.weights(x)
        everything = self.soft or in_graph() or not has_numbers(x)
        y = self._by_all(x, weights, grid) if everything else self._by_chosen(x, weights, grid)
        if self.context is not None:
            self.context.mark(y)
        return y

    def _by_chosen(self, x: Tensor, weights: Tensor, grid: Grid | None) -> Tensor:
        """Run each expert on its images alone."""
        y = x.clone()
        wanted = weights[:, 1:].ne(0)
        for index in wanted.any(dim=0).nonzero().flatten().tolist():
            rows = wanted[:, index].nonzero().flatten()
            y[rows] = self.experts[index](x[rows], y[rows], weights[rows, index + 1], grid)
        return y

    def _by_all(self, x: Tensor, weights: Tensor, grid: Grid | None) -> Tensor:
        """Run every expert on all images: for gradients to all, and for graphs, which cannot read the weights."""
        y = x
        for index, expert in enumerate(self.experts):
            y = expert(x, y, weights[:, index + 1], grid)
        return y

    def extra_repr(self) -> str:
        """Return the number of experts and ``top_k``, for ``print(model)``."""
        return f"{len(self.experts)} experts, top_k={self.top_k}"
