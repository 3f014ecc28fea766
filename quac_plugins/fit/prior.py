"""Fitting a degradation prior inside a frozen host on a few unlabelled photographs."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quac_plugins.core.hooks import PRIOR_NAME
from quac_plugins.core.inject.record import injection_of, modules_inside, unwrap
from quac_plugins.core.prior.config import PriorConfig
from quac_plugins.core.prior.fdm import FDM, resolve_fdm
from quac_plugins.core.prior.features import channel_statistics
from quac_plugins.core.prior.margins import Margin
from quac_plugins.core.prior.recipe import MARGINS, Recipe
from quac_plugins.core.prior.routed import RoutedFDM
from quac_plugins.core.prior.sites import PriorSite
from quac_plugins.core.prior.training import Fit
from quac_plugins.degradations import SEVERITIES, corruption_names
from quac_plugins.fit.agreement import agreement
from quac_plugins.fit.draws import Degrade, own_degradations
from quac_plugins.fit.gate import fit_gate, judge_gate, judged_pictures, routed_of, set_gate
from quac_plugins.fit.margins import fit_margins
from quac_plugins.fit.report import FitReport
from quac_plugins.fit.session import Data, Session, parameters_of, progress_bar
from quac_plugins.fit.settings import recipe_with
from quac_plugins.fit.start import check_fit, put_in, unharmed

_PICTURES = 240  # degraded pictures of each kind that a fit aims at
_OF_MARGINS = 160  # the same for margins, which learn all degradations at once
_VIEWS = 24  # of an image, at most


def fit_prior(
    model: nn.Module,
    images: Any = None,
    *,
    pairs: Any = None,
    degrade: Degrade | None = None,
    corruptions: str | Sequence[str] | None = None,
    severity: int | Sequence[int] | None = None,
    config: PriorConfig | None = None,
    deep: str | Sequence[str] | None = "stages",
    limit: int | None = None,
    views: int | None = None,
    draws: int | None = None,
    clean_share: float | None = None,
    held_out: float = 0.2,
    recipe: Recipe | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    mean: Any = None,
    std: Any = None,
    input_size: Any = None,
    crop_pct: float | None = None,
    interpolation: str | None = None,
    checkpoint: str | Path | None = None,
    num_workers: int = 0,
    progress: bool = True,
    **settings: Any,
) -> FitReport:
    """Fit the degradation prior of a frozen host so that it repairs features of degraded images; labels are not needed.

    Source: Wang et al., "Deep Degradation Prior for Low-Quality Image Classification", CVPR 2020: minimize
    ‖FDM(low(x_degraded)) − low(x_clean)‖². Here the features are standardized, and after the shallow layer deeper ones
    may be compared too; see :mod:`quac_plugins.core.prior.comparison`. The host never changes: its state dict is the
    same bit for bit. The state kept is the best on images held out, the untouched host included.

    Args:
        model: a host with a prior inside (``timm.create_model("NAME_ddp")``, :func:`inject`); into a plain host
            ``config`` is injected.
        images: clean photographs: a folder, files, arrays, PIL images, tensors in [0, 1], or a Dataset of these.
        pairs: (degraded, clean), each as ``images``, in place of them.
        degrade: your own degradation, uint8 (H, W, 3) → the same, or several by name (``{"rain": function}``), which a
            routed prior has experts for. They take the corruptions' place, or go beside those that are named.
        corruptions: names or sets of :func:`quac_plugins.degradations.corruption_names`. None: the names of a routed
            prior's experts, else all 15; none beside ``degrade``.
        severity: 1 to 5, or several, which are mixed. None: all of them for margins, 3 for other modules. Margins that
            are chosen by a quality function that tells severities begin from statistics at severities 2 and 4 in any
            case.
        config: what to inject into a plain host. None: margins, chosen by quality if there are several degradations.
        deep: places whose features are compared in the second part of the fit: ``"stages"``, names, or None.
        limit: at most so many images.
        views: crops and flips of each image; draws: degraded pictures of each view and corruption.
        clean_share: share of undegraded pictures among those of one module for several corruptions. None: 0 for one
            FDM for one corruption, else a tenth.
        held_out: share of the images that are not fitted on but judge when to stop.
        recipe: steps, learning rate, …; single ones may be given by name (``steps=200``).
        seed: of everything that is drawn.
        device: where to fit; None: where the model is. Processes that torchrun starts share the work.
        mean, std, input_size, crop_pct, interpolation: of the host's images; None: the host's own.
        checkpoint: folder for the state of a fit until :func:`save_adapter` has written what was fitted; the same call
            goes on from there, in this process or another. After an error or an interruption the model itself is as
            it was.
        num_workers: processes that draw degraded pictures.
        progress: show a bar on a terminal.

    Returns:
        What was fitted and how well; print it, ``to_json`` it, ``plot`` it.

    Raises:
        FileNotFoundError, OSError: there are no images, or none can be read.
        ValueError: an option, a name, a size or a pair does not fit.

    Example:
        >>> import numpy as np, timm, quac_plugins as quac
        >>> model = timm.create_model("test_resnet_ddp")
        >>> photographs = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
        >>> report = quac.fit_prior(model, photographs, corruptions="contrast", input_size=64, views=1, steps=4)
        >>> report.what, list(report.stages)
        ('prior', ['prior'])
    """
    started = time.perf_counter()
    check_fit(model, config, PriorConfig)
    network = unwrap(model)
    record = injection_of(network)
    there = record.prior if record is not None else None
    if there is not None and config is not None:
        raise ValueError("the model holds a prior already; leave config out, or remove(model) first")
    own = list(own_degradations(degrade))
    if config is None and there is None and pairs is None:
        kinds = [*corruption_names("all" if corruptions is None and not own else corruptions or ()), *own]
        config = PriorConfig(fdm="margin", experts=kinds if len(kinds) > 1 else [])
    planned = there.config if there is not None else config if config is not None else PriorConfig(fdm="margin")
    experts, margins = planned.experts, issubclass(resolve_fdm(planned.fdm), Margin)
    if severity is None:
        severity = SEVERITIES if margins else 3
    if corruptions is None and pairs is None and degrade is None and experts:
        corruptions = experts
        if unknown := [name for name in experts if name not in corruption_names("every")]:
            raise ValueError(
                f"the expert for {unknown[0]!r} is for no corruption of ImageNet-C: give your own function that "
                f"degrades so, degrade={{{unknown[0]!r}: function}}, and the others as corruptions"
            )
    if clean_share is not None and experts:
        raise ValueError(
            "clean_share is for one FDM for several degradations; a routed prior leaves clean pictures to its gate. "
            "Leave clean_share out, or put in one FDM: config=PriorConfig()"
        )
    data = Data(
        images, pairs, degrade, corruptions, severity, limit, views, draws, clean_share, held_out, seed, num_workers,
        mean, std, input_size, crop_pct, interpolation,
    )  # fmt: skip
    session = Session(network, data, device, _OF_MARGINS if margins else _PICTURES, planned, _VIEWS)
    made = recipe_with(recipe or (MARGINS if margins else None), settings, seed, session.device)
    session.check_labels(made)
    kinds = session.kinds
    if experts and set(kinds) - set(experts):
        raise ValueError(
            f"this prior is routed over the experts {', '.join(experts)}; it cannot be fitted on "
            f"{', '.join(sorted(set(kinds) - set(experts)))}. Give corruptions or degrade={{name: function}} among "
            "them, or inject PriorConfig(experts=[…]) with other names"
        )
    with unharmed(network):
        if there is None:
            put_in(network, planned, session.size, session.config["mean"], session.config["std"], seed)
        prior = injection_of(network).prior  # type: ignore[union-attr]
        assert prior is not None
        inside = modules_inside(network)
        everywhere = {site.name: inside[f"{site.name}.{PRIOR_NAME}"] for site in prior.sites}
        sites = _supported(prior.sites, everywhere, session, made)
        modules = {site.name: everywhere[site.name] for site in sites}
        # the gate of margins is calibrated, not trained: it would give clean pictures away
        of = "table" if margins else ""
        fitted = parameters_of(network, [f"{name}.{PRIOR_NAME}.{of}" for name in modules])
        report = session.report("prior", list(modules), kinds, made, sum(p.numel() for p in fitted.values()))
        report.unfitted = [name for name in everywhere if name not in modules]
        with session.open(fitted), progress_bar(progress) as show:
            deeper = session.deep_sites(deep, None if margins else prior.sites[0])
            keep = session.checkpoints(checkpoint, made, what="prior", deep=deep, clean_share=clean_share)
            known = _known_experts(session, modules, kinds, experts) if experts else kinds
            judged = judged_pictures(session, known)
            if experts and margins:
                set_gate(modules, session.of_main(lambda: fit_gate(session, modules, known, experts, seed)))
            if margins:
                per_view = _per_view(session, _OF_MARGINS)
                fit_margins(
                    session, modules, deeper, fitted, kinds, experts, per_view, clean_share, made, keep, report, show
                )
                session.round_as_saved()
            elif experts:
                _fit_experts(session, sites, deeper, modules, kinds, experts, made, keep, report, show)
                set_gate(modules, session.of_main(lambda: fit_gate(session, modules, known, experts, seed)))
                session.round_as_saved()
            else:
                share = clean_share if clean_share is not None else 0.1 if len(kinds) > 1 else 0.0
                pictures = session.pictures(session.draws(kinds, share, _per_view(session)))
                fit = _fit_of(session, sites, deeper, fitted, pictures, made, list(modules.values()))
                session.fit("prior", fit, keep, report, show)
                session.round_as_saved()
            if experts:
                gate = routed_of(modules)[0]
                report.gate = session.of_main(lambda: judge_gate(session, gate, judged, known, experts))
            report.agreement = session.of_main(lambda: agreement(session, judged))
            with _one_expert(everywhere):
                report.multiply_adds = session.multiply_adds()
        session.finish(keep)
    report.seconds = round(time.perf_counter() - started, 1)
    for fault in report.gate.warnings() if report.gate is not None else ():
        warnings.warn(fault, stacklevel=2)
    return report


def _known_experts(session: Session, modules: dict[str, nn.Module], kinds: list[str], experts: list[str]) -> list[str]:
    """The degradations that the gate is to tell: those that are fitted now, and those that have been before.

    Raises:
        ValueError: one that was fitted before is the user's own, and its function is not given this time.
    """
    prior = routed_of(modules)[0]
    fitted = {name for place, name in enumerate(experts) if prior.is_trained(place)}
    known = [name for name in experts if name in fitted.union(kinds)]
    for name in known:
        if name not in session.own and name not in corruption_names("every"):
            raise ValueError(
                f"this prior has an expert for {name!r}, fitted before on a degradation of your own, which the gate is "
                f"to tell from the others: give the function again, degrade={{{name!r}: function, …}}"
            )
    return known


def _supported(
    sites: list[PriorSite], modules: dict[str, nn.Module], session: Session, recipe: Recipe
) -> list[PriorSite]:
    """The first site, and the later ones that the images give enough examples of, or that are fitted already."""
    images = len(session.train)
    return [
        site
        for place, site in enumerate(sites)
        if not place
        or isinstance(modules[site.name], Margin)
        or site.positions(session.size) * images >= recipe.least_positions
        or not all(inner.is_fresh for inner in _inside([modules[site.name]]))
    ]


def _per_view(session: Session, wanted: int = _PICTURES) -> int:
    """Degraded pictures of each view: about so many of each kind in all."""
    return max(1, round(wanted / (session.views * len(session.few))))


def _fit_of(
    session: Session, sites: Any, deeper: Any, parameters: Any, pictures: Any, recipe: Recipe, modules: list[nn.Module]
) -> Fit:
    """A fit whose modules are standardized by the clean features."""
    standardize(session, sites, modules, pictures)
    first, record = modules[0], injection_of(session.model)
    # activations that were put in too may change what comes to it; the grid of other tokens is known to their layer
    alone = isinstance(first, FDM) and not first.reads_quality and record is not None and record.config is None
    here, stride = sites[0].grid, max(sites[0].stride, 1)
    alone = alone and here in (None, tuple(round(side / stride) for side in session.size))
    return Fit(
        session.model, session.teacher, parameters, sites, deeper, session.normalize, pictures, recipe, session.share,
        front=first if alone else None,
        scaled=[p for m in _inside(modules) for p in m.body[-1].parameters()],
    )  # fmt: skip


def _inside(modules: list[nn.Module]) -> list[FDM]:
    return [inner for module in modules for inner in module.modules() if isinstance(inner, FDM)]


def standardize(session: Session, sites: Any, modules: list[nn.Module], pictures: Any) -> None:
    """Give every fresh FDM the statistics of the clean features at its site."""
    fresh = [
        (site.name, [m for m in module.modules() if isinstance(m, FDM) and not isinstance(m, Margin) and m.is_fresh])
        for site, module in zip(sites, modules, strict=True)
    ]
    if not any(inner for _, inner in fresh):
        return
    views = sorted(set(pictures.view[pictures.train].tolist()))
    axes = {site.name: 1 if site.layout == "nchw" else -1 for site in sites}
    prefixes = {site.name: site.prefix for site in sites}
    statistics = channel_statistics(
        session.teacher, axes, prefixes, session.normalize, pictures.clean[views], session.device
    )
    for name, inner in fresh:
        for module in inner:
            module.mean.copy_(statistics[name][0])
            module.std.copy_(statistics[name][1])


def _fit_experts(
    session: Session, sites: Any, deeper: Any, modules: dict[str, nn.Module], kinds: list[str], experts: list[str],
    recipe: Recipe, keep: Any, report: FitReport, show: Any,
) -> None:  # fmt: skip
    """One expert after the other, each on its own degradation."""
    for kind in kinds:
        index = experts.index(kind)
        inner = [module.experts[index] for module in modules.values() if isinstance(module, RoutedFDM)]
        parameters = parameters_of(session.model, [f"{name}.{PRIOR_NAME}.experts.{index}." for name in modules])
        pictures = session.pictures(session.draws([kind], 0.0, _per_view(session)))
        with _one_expert(modules, index):
            fit = _fit_of(session, sites, deeper, parameters, pictures, recipe, inner)
            session.fit(kind, fit, keep, report, show)


@contextlib.contextmanager
def _one_expert(modules: dict[str, nn.Module], index: int = 0) -> Iterator[None]:
    """Send every image to one expert, where there are several."""
    routed = [module for module in modules.values() if isinstance(module, RoutedFDM)]
    for module in routed:
        module.only = index
    try:
        yield
    finally:
        for module in routed:
            module.only = None
