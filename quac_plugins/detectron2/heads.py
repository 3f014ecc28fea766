"""Activations in the ROI heads: each row of features is a proposal and gets the q of the proposal's image."""

from __future__ import annotations

import contextlib
import copy
import fnmatch
import threading
from dataclasses import replace
from typing import Any

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from detectron2.modeling.poolers import ROIPooler
from torch import Tensor, nn

from quac_plugins.core.hooks import TAP_NAME
from quac_plugins.core.inject import QuACConfig, injection_of
from quac_plugins.core.inject.sites import PLACES, Site, find_sites
from quac_plugins.core.inject.surgery import place
from quac_plugins.core.inject.trace import Trace, trace
from quac_plugins.core.naming import matcher
from quac_plugins.core.options import named
from quac_plugins.core.quality.context import QualityContext, QualityError
from quac_plugins.core.quality.padding import is_traced
from quac_plugins.core.quality.registry import resolve_quality
from quac_plugins.core.quality.tap import QualityTap
from quac_plugins.detectron2.blocks import with_activations
from quac_plugins.detectron2.config import KEY, configs_of, head_patterns, patterns

_REGEX = "re:"  # how a pattern that is a regular expression begins


class Proposals:
    """The numbers of proposals of each image in the latest pooling, for each thread.

    Args:
        source: the context with the backbone's q; it goes on with the images whose features are pooled.
    """

    def __init__(self, source: QualityContext) -> None:
        self.source = source
        self._local = threading.local()

    def __deepcopy__(self, memo: dict[int, Any]) -> Proposals:
        memo[id(self)] = copied = type(self)(copy.deepcopy(self.source, memo))
        return copied

    def __reduce__(self) -> Any:
        return type(self), (self.source,)

    @property
    def counts(self) -> list[int] | None:
        """Return the numbers of proposals by image; None before any pooling."""
        return getattr(self._local, "counts", None)

    def note(self, pooler: nn.Module, args: tuple, kwargs: dict) -> None:
        """Note the proposals of a pooler's call: its arguments are features and one list of boxes for each image."""
        boxes = args[1] if len(args) > 1 else kwargs["box_lists"]
        self.source.go_on(args[0] if args else kwargs["x"])
        self._local.counts = [len(box_list) for box_list in boxes]


class ProposalTap(nn.Module):
    """Hands the images' q to a part of the ROI heads, a row for each proposal.

    Args:
        source: the context with the backbone's q.
        context: the context that gets a row of q for each proposal.
        proposals: the proposals of the poolers before.
        layer: the name of the part, for errors.
    """

    def __init__(self, source: QualityContext, context: QualityContext, proposals: Proposals, layer: str):
        super().__init__()
        self.source, self.context, self.proposals, self.layer = source, context, proposals, layer

    def forward(self, x: Any) -> Any:
        """Return x unchanged: a part that runs its children one after the other runs the tap too."""
        return x

    def observe(self, features: Tensor, instances: Any = None) -> None:
        """Start a pass over features (N, C, H, W) of N proposals; ``instances``, if given, are the proposals.

        Raises:
            QualityError: it cannot be told which image a proposal belongs to, as in a trace, which would keep the
                numbers of proposals of its own images.
        """
        if is_traced():
            raise QualityError(
                f"{self.layer!r} holds QuAC and cannot be traced or exported: how many proposals each image has would "
                "be fixed. Trace a detector whose activations are in the backbone alone (MODEL.QUAC.HEADS: '')"
            )
        self.context.watch(self)
        if self.context.resume(features, self.layer):
            return
        q = self.source.current(features, self.layer)
        of_each = (
            [len(instance_list) for instance_list in instances]
            if isinstance(instances, (list, tuple))
            else self.proposals.counts
        )
        if of_each is None or sum(of_each) != len(features) or len(of_each) != len(q):
            raise QualityError(
                f"{self.layer!r} is given features of {len(features)} proposals, but the latest pooling was of "
                f"{of_each} proposals in {len(q)} images, so their quality features cannot be told. Its features must "
                "come straight from an ROIPooler of these ROI heads, or with the list of their instances"
            )
        rows = torch.repeat_interleave(torch.tensor(of_each, device=q.device))
        self.context.begin(q[rows], features)


def proposal_pre_hook(part: Any, args: tuple, kwargs: dict) -> None:
    """Show the tap the arguments of its part of the heads."""
    inputs = [*args, *kwargs.values()]
    part.quac_tap.observe(inputs[0], inputs[1] if len(inputs) > 1 else None)


def proposal_hook(part: Any, args: tuple, output: Any) -> None:
    """Mark the part's output with its pass, for recomputations."""
    part.quac_tap.context.mark(output, tap=True)


class _Features(nn.Module):
    """A part of the heads as a function from features to features, without losses and instances."""

    def __init__(self, part: nn.Module):
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Any:
        part: Any = self.part
        return part.layers(x) if hasattr(part, "layers") else part(x)


def inject_heads(model: nn.Module, where: str | list[str] = "all", config: QuACConfig | None = None) -> nn.Module:
    """Put quality-adaptive activations into the ROI heads of a detector whose backbone holds QuAC, in place.

    Args:
        model: a model with ``backbone`` and ``roi_heads``, as :class:`GeneralizedRCNN`; standard, cascade and C4 heads.
        where: ``"all"``, ``"spatial"``, or patterns of names below ``roi_heads``, such as ``"box_head.*"`` or
            ``"re:box_head"``.
        config: the config of the activations. None: the backbone's config.

    Returns:
        The model.

    Raises:
        ValueError: the heads hold QuAC already; the backbone computes no q; the quality functions differ; or no
            activation matches.
    """
    wanted = head_patterns(where)
    if any(isinstance(module, ProposalTap) for module in model.roi_heads.modules()):  # type: ignore[union-attr]
        raise ValueError(f"the ROI heads of this {type(model).__name__} already hold QuAC")
    holder: Any = next((m for m in model.backbone.modules() if _driven(m)), model.backbone)  # type: ignore[union-attr]
    record = injection_of(holder)
    if record is None or record.config is None or record.quality is None or record.tap is None:
        raise ValueError("the backbone holds no QuAC that computes q; inject it first (with_quac, MODEL.QUAC)")
    config = config if config is not None else record.config
    if config.quality != record.config.quality:
        raise ValueError(f"quality {config.quality!r} of the heads is not {record.config.quality!r} of the backbone")
    source = holder.get_submodule(record.tap).get_submodule(TAP_NAME).context
    proposals = Proposals(source)
    heads: Any = with_activations(model.roi_heads)  # type: ignore[type-var]
    parts = {name: part for name, part in _parts(heads).items() if any(_may_match(p, name) for p in wanted)}
    sites_of = {name: _sites(name, part, _example(heads, name, part), wanted) for name, part in parts.items()}
    if not any(sites for _, sites, _ in sites_of.values()):
        for name, part in _parts(heads).items():
            with contextlib.suppress(ValueError):
                sites_of[name] = _sites(name, part, _example(heads, name, part), ["all"])
        names = [f"{name}.{site.name[5:]}" for name, (_, _, every) in sites_of.items() for site in every]
        raise ValueError(f"{where!r} matches no activation of the ROI heads; there are: {', '.join(names) or 'none'}")
    for pooler in (module for module in heads.modules() if isinstance(module, ROIPooler)):
        pooler.register_forward_pre_hook(proposals.note, with_kwargs=True)
    for name, part in parts.items():
        seen, sites, _ = sites_of[name]
        if sites:
            _put_in(part, f"roi_heads.{name}", replace(config, where="all"), seen, sites, source, proposals)
    return model


def _driven(module: nn.Module) -> bool:
    record = module.__dict__.get("_quac_injection")
    return record is not None and record.config is not None


def _put_in(
    part: nn.Module, name: str, config: QuACConfig, seen: Trace, sites: list[Site], source: Any, proposals: Proposals
) -> None:
    quality = resolve_quality(config.quality, config.quality_channels, config.quality_grad)
    whole = _Features(part)
    place(whole, config, sites, seen, quality)
    assert seen.tap is not None
    context = QualityTap.detach(whole.get_submodule(seen.tap)).context
    context.tap = name
    part.add_module(TAP_NAME, ProposalTap(source, context, proposals, name))
    part.register_forward_pre_hook(proposal_pre_hook, with_kwargs=True)
    part.register_forward_hook(proposal_hook)


def _parts(heads: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of the heads that take pooled features; a cascade's modules one by one."""
    parts: dict[str, nn.Module] = {}
    for name in ("res5", "box_head", "mask_head", "keypoint_head"):
        module = getattr(heads, name, None)
        if isinstance(module, nn.ModuleList):
            parts.update({f"{name}.{i}": part for i, part in enumerate(module)})
        elif isinstance(module, nn.Module):
            parts[name] = module
    return parts


def _may_match(pattern: str, part: str) -> bool:
    """Return whether a pattern can match an activation inside a part, which then needs a trace."""
    first = pattern.partition(".")[0]
    return pattern in PLACES or pattern.startswith(_REGEX) or fnmatch.fnmatchcase(part.partition(".")[0], first)


def _example(heads: Any, name: str, part: nn.Module) -> Tensor:
    """Return features of one proposal in the shape of the part's input."""
    pooler = getattr(heads, f"{name.partition('_')[0]}_pooler", None) or getattr(heads, "pooler", None)
    height, width = pooler.output_size if pooler is not None else (7, 7)
    kinds = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
    first = next((m for m in part.modules() if isinstance(m, kinds)), None)
    if first is None:
        return torch.empty(1, 1, height, width)
    channels = first.in_features // (height * width) if isinstance(first, nn.Linear) else first.in_channels
    return torch.empty(1, channels, height, width)


def _sites(name: str, part: nn.Module, example: Tensor, wanted: list[str]) -> tuple[Trace, list[Site], list[Site]]:
    """Return the trace of a part, its wanted sites, and all its sites."""
    whole = _Features(part)
    try:
        seen = trace(whole, example)
    except RuntimeError as error:
        if all(pattern.startswith(_REGEX) for pattern in wanted):  # which may mean other parts
            return Trace(), [], []
        raise ValueError(
            f"{name} takes more than pooled features, so no activation of it can be found: {error}"
        ) from error
    try:
        every, _ = find_sites(whole, seen, ["all"])
    except ValueError:  # a part without activations
        return seen, [], []
    kept: dict[str, Site] = {}
    for pattern in wanted:
        if pattern in PLACES:
            sites = find_sites(whole, seen, [pattern])[0] if pattern != "spatial" else _spatial(every, seen)
        else:
            sites = [site for site in every if matcher("where", pattern)(f"{name}.{site.name[5:]}")]
        kept.update({site.name: site for site in sites})
    return seen, [site for site in every if site.name in kept], every


def _spatial(sites: list[Site], seen: Trace) -> list[Site]:
    return [site for site in sites if any(call.kernel > 1 for call in seen.calls[site.name])]


@META_ARCH_REGISTRY.register()
class QuACGeneralizedRCNN(GeneralizedRCNN):
    """:class:`GeneralizedRCNN` with quality-adaptive activations in its ROI heads, chosen by ``MODEL.QUAC.HEADS``."""

    @configurable
    def __init__(self, *, quac_heads: str = "", **kwargs: Any):
        super().__init__(**kwargs)
        if quac_heads:
            with named(f"{KEY}.HEADS"):
                inject_heads(self, patterns(quac_heads))

    @classmethod
    def from_config(cls, cfg: Any) -> dict[str, Any]:
        """Return the constructor's arguments from a config."""
        configs_of(cfg)  # before anything is built
        return {**super().from_config(cfg), "quac_heads": cfg.MODEL.QUAC.HEADS}
