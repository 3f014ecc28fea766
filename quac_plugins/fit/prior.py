"""Fitting a degradation prior inside a frozen host on a few unlabelled photographs."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quac_plugins.core.deprecated import renamed
from quac_plugins.core.hooks import PRIOR_NAME
from quac_plugins.core.inject.record import injection_of, modules_inside, unwrap
from quac_plugins.core.prior.comparison import Pictures
from quac_plugins.core.prior.config import PriorConfig
from quac_plugins.core.prior.fdm import FDM, resolve_fdm
from quac_plugins.core.prior.features import channel_statistics
from quac_plugins.core.prior.margins import Margin
from quac_plugins.core.prior.recipe import MARGINS, WITH_MARGINS, Recipe
from quac_plugins.core.prior.routed import RoutedFDM
from quac_plugins.core.prior.sites import PriorSite
from quac_plugins.degradations import SEVERITIES, corruption_names
from quac_plugins.fit.agreement import agreement, multiply_adds
from quac_plugins.fit.budget import within_budget
from quac_plugins.fit.data import data_with
from quac_plugins.fit.gate import fit_gate, judge_gate, judged_pictures, routed_of, set_gate
from quac_plugins.fit.margins import CLEAN, fit_margins
from quac_plugins.fit.photographs import Photographs
from quac_plugins.fit.report import FitReport
from quac_plugins.fit.session import FitSession, check_fit, parameters_of, unharmed
from quac_plugins.fit.training import Fit, run_stage
from quac_plugins.processes import process_group

_PICTURES = 240  # degraded pictures of each kind that a fit aims at
_OF_MARGINS = 160  # the same for margins, which learn all degradations at once
_SCALES = (0.8, 1.0)  # of random crops for margins: statistics are to be those of whole pictures
_VIEWS = 24  # of an image, at most


@renamed(severity="severities", images="data")
def fit_prior(
    model: nn.Module,
    data: Any = None,
    *,
    config: PriorConfig | None = None,
    budget: float = 0.0,
    deep: str | Sequence[str] | None = "stages",
    recipe: Recipe | None = None,
    device: str | torch.device | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
    **settings: Any,
) -> FitReport:
    """Fit the degradation prior of a frozen host: it learns, without labels, to repair features of degraded images.

    Source: Wang et al., "Deep Degradation Prior for Low-Quality Image Classification", CVPR 2020: minimize
    ‖FDM(low(x_degraded)) − low(x_clean)‖². Here the features are standardized, and after the shallow layer deeper ones
    may be compared too; see :mod:`quac_plugins.core.prior.comparison`. The host never changes: its state dict is the
    same bit for bit. The state kept is the best on images held out, the untouched host included.

    Args:
        model: a host with a prior inside (``timm.create_model("NAME_ddp")``, :func:`inject`), or a plain host, which
            gets ``config``.
        data: clean photographs: a folder, files, arrays, PIL images, tensors in [0, 1], or a Dataset of these; or a
            :class:`quac_plugins.fit.Data`.
        config: the config of the prior in a plain host. None: margins, which q chooses if there are several
            degradations.
        budget: multiply-adds that the prior may add, over the host's: with 0.13, at most 13 %. It pays for FDMs beside
            the margins, which need none; the report says which were chosen. An experiment: measured once, on
            tf_efficientnet_lite0, 0.13 was two points worse than margins alone.
        deep: places whose features are compared in the second part of the fit: ``"stages"`` (for margins, also a
            norm after the last of them), names, or None.
        recipe: steps, learning rate, …. None: the defaults of the FDM.
        device: the device of the fit. None: the model's device. Processes that torchrun starts share the work.
        checkpoint: a folder that keeps the state of the fit until :func:`save_adapter` has written the adapter; after
            an interruption the same call goes on from the state, in this process or another. After an error or an
            interruption the model itself is as before.
        progress: show a bar on a terminal.
        **settings: fields of :class:`quac_plugins.fit.Data` (``corruptions="fog"``, ``severities``, ``degrade``,
            ``pairs``, ``limit``, ``seed``, ``mean``, …) and of :class:`quac_plugins.Recipe` (``steps=200``, …) by name.

    Returns:
        The report of the fit, for ``print``, ``to_json`` and ``plot``.

    Raises:
        FileNotFoundError: a folder or file of photographs does not exist.
        TypeError: the model or the config has a wrong type.
        ValueError: no photograph can be read; an option, a name, a size or a pair is wrong.

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
    data, settings = data_with(data, settings)
    network = unwrap(model)
    inside = getattr(injection_of(network), "prior", None)
    if inside is not None and (config is not None or budget):
        what = "config" if config is not None else "budget"
        raise ValueError(f"the model holds a prior already; leave {what} out, or remove(model) first")
    if config is None and inside is None:
        several = data.pairs is None and len(data.kinds) > 1
        config = PriorConfig(fdm="margin", experts=data.kinds if several else [])
    planned = inside.config if inside is not None else config
    assert planned is not None
    experts, margins = planned.experts, planned.margins or issubclass(resolve_fdm(planned.fdm), Margin)
    if data.severities is None and margins:
        data = replace(data, severities=SEVERITIES)
    if data.corruptions is None and data.pairs is None and data.degrade is None and experts:
        if unknown := [name for name in experts if name not in corruption_names("every")]:
            raise ValueError(
                f"the expert for {unknown[0]!r} is for no corruption of ImageNet-C: give your own function that "
                f"degrades so, degrade={{{unknown[0]!r}: function}}, and the others as corruptions"
            )
        data = replace(data, corruptions=experts)
    if data.clean_share is not None and experts:
        raise ValueError(
            "clean_share is for one FDM for several degradations; a routed prior leaves clean pictures to its gate. "
            "Leave clean_share out, or put in one FDM: config=PriorConfig()"
        )
    with process_group() as processes, unharmed(network):
        if margins:
            photographs = Photographs(network, data, planned, _OF_MARGINS, _VIEWS, scales=_SCALES, held_out=0.1)
        else:
            photographs = Photographs(network, data, planned, _PICTURES, _VIEWS)
        chosen = ""
        if budget:
            planned, chosen = within_budget(network, planned, budget, photographs.size)
        if recipe is None and margins:  # without features there are the logits alone
            recipe = WITH_MARGINS if planned.margins else MARGINS
            recipe = recipe if deep is not None else replace(recipe, logits_weight=1.0)
        session = FitSession(network, photographs, recipe, settings, device, processes)
        if experts and set(data.kinds) - set(experts):
            raise ValueError(
                f"this prior is routed over the experts {', '.join(experts)}; it cannot be fitted on "
                f"{', '.join(sorted(set(data.kinds) - set(experts)))}. Give corruptions or degrade={{name: function}} "
                "among them, or inject PriorConfig(experts=[…]) with other names"
            )
        if inside is None:
            session.put_in(planned)
        report = _fit(session, experts, margins, deep=deep, checkpoint=checkpoint, progress=progress)
    report.seconds, report.chosen = round(time.perf_counter() - started, 1), chosen
    for fault in report.gate.warnings() if report.gate is not None else ():
        warnings.warn(fault, stacklevel=2)
    return report


def _fit(session: FitSession, experts: list[str], margins: bool, **opened: Any) -> FitReport:
    """Fit the prior that is inside, with its gate if it has one, and judge it."""
    photographs, of_main = session.photographs, session.processes.of_main
    data, kinds = photographs.data, photographs.data.kinds
    prior = injection_of(session.model).prior  # type: ignore[union-attr]
    assert prior is not None
    inside = modules_inside(session.model)
    everywhere = {site.name: inside[f"{site.name}.{PRIOR_NAME}"] for site in prior.sites}
    sites = _supported(prior.sites, everywhere, session)
    modules = {site.name: everywhere[site.name] for site in sites}
    of_margins = [name for name, module in modules.items() if isinstance(module, Margin)]
    pooled = of_margins[-1] if margins and opened["deep"] == "stages" else None
    if pooled is not None:
        opened["deep"] = ["stages", pooled]
    # the gate of margins is calibrated, not trained: it would give clean pictures away
    fitted = parameters_of(
        session.model, [f"{name}.{PRIOR_NAME}.{'table' if name in of_margins else ''}" for name in modules]
    )
    if margins and set(experts) - set(kinds) and not _all_fresh(modules.values()):
        fitted = {name: p for name, p in fitted.items() if name.endswith(".table")}  # FDMs are those of others too
    opened |= {"after": None if margins else prior.sites[0], "clean_share": data.clean_share}
    with session.open("prior", fitted, list(modules), **opened) as report:
        if pooled is not None and session.deeper[-1].name != pooled:  # it is inside the last stage
            session.deeper = [site for site in session.deeper if site.name != pooled]
        report.unfitted = [name for name in everywhere if name not in modules]
        known = _known_experts(session, modules, experts) if experts else kinds
        judged = judged_pictures(photographs, known)
        if experts and margins:
            set_gate(modules, of_main(lambda: fit_gate(session, modules, known, experts)))
        if margins:
            share = CLEAN if data.clean_share is None else data.clean_share
            draws = photographs.draws(kinds, share, photographs.per_view(_OF_MARGINS))
            pictures = photographs.split(draws)
            standardize(session, sites, list(modules.values()), pictures)
            fit_margins(session, modules, fitted, experts, draws, pictures)
        elif experts:
            _fit_experts(session, sites, modules, experts)
            set_gate(modules, of_main(lambda: fit_gate(session, modules, known, experts)))
        else:
            share = data.clean_share if data.clean_share is not None else 0.1 if len(kinds) > 1 else 0.0
            pictures = photographs.split(photographs.draws(kinds, share, photographs.per_view(_PICTURES)))
            run_stage(session, "prior", _fit_of(session, sites, fitted, pictures, list(modules.values())))
        session.round_as_saved()
        if experts:
            gate = routed_of(modules)[0]
            report.gate = of_main(lambda: judge_gate(session, gate, judged, known, experts))
        report.agreement = of_main(lambda: agreement(session, judged))
        with _one_expert(everywhere):
            report.multiply_adds = multiply_adds(session)
    return report


def _known_experts(session: FitSession, modules: dict[str, nn.Module], experts: list[str]) -> list[str]:
    """Return the degradations that the gate has to tell: of this fit and of earlier ones.

    Raises:
        ValueError: an earlier degradation is the user's own, and its function is not given this time.
    """
    prior, data = routed_of(modules)[0], session.photographs.data
    fitted = {name for place, name in enumerate(experts) if prior.is_trained(place)}
    known = [name for name in experts if name in fitted.union(data.kinds)]
    for name in known:
        if name not in data.functions and name not in corruption_names("every"):
            raise ValueError(
                f"this prior has an expert for {name!r}, fitted before on a degradation of your own, which the gate is "
                f"to tell from the others: give the function again, degrade={{{name!r}: function, …}}"
            )
    return known


def _supported(sites: list[PriorSite], modules: dict[str, nn.Module], session: FitSession) -> list[PriorSite]:
    """Return the first site, and later sites that are fitted already or of which the images give enough examples."""
    images = len(session.photographs.train)
    first = next((site for site in sites if not isinstance(modules[site.name], Margin)), None)
    return [
        site
        for site in sites
        if site is first
        or isinstance(modules[site.name], Margin)
        or site.positions(session.photographs.size) * images >= session.recipe.least_positions
        or not _all_fresh([modules[site.name]])
    ]


def _fit_of(session: FitSession, sites: Any, parameters: Any, pictures: Pictures, modules: list[nn.Module]) -> Fit:
    """Make a fit whose modules are standardized by the clean features."""
    standardize(session, sites, modules, pictures)
    first, record = modules[0], injection_of(session.model)
    # activations that were put in too may change what comes to it; the grid of other tokens is known to their layer
    alone = isinstance(first, FDM) and not first.reads_quality and record is not None and record.config is None
    grid, stride = sites[0].grid, max(sites[0].stride, 1)
    alone = alone and grid in (None, tuple(round(side / stride) for side in session.photographs.size))
    scaled = {p: None for m in _inside(modules) for p in m.body[-1].parameters()}
    comparison = session.compare(pictures, sites, front=first if alone else None)
    return Fit(comparison, parameters, session.processes, scaled)


def _inside(modules: Iterable[nn.Module]) -> list[FDM]:
    """Return the FDMs, without margins."""
    inside = [inner for module in modules for inner in module.modules() if isinstance(inner, FDM)]
    return [inner for inner in inside if not isinstance(inner, Margin)]


def _all_fresh(modules: Iterable[nn.Module]) -> bool:
    return all(inner.is_fresh for inner in _inside(modules))


def standardize(session: FitSession, sites: Any, modules: list[nn.Module], pictures: Pictures) -> None:
    """Give every fresh FDM the statistics of the clean features at its site."""
    fresh = [
        (site.name, [m for m in _inside([module]) if m.is_fresh]) for site, module in zip(sites, modules, strict=True)
    ]
    if not any(inner for _, inner in fresh):
        return
    views = sorted(set(pictures.view[pictures.train].tolist()))
    axes = {site.name: 1 if site.layout == "nchw" else -1 for site in sites}
    prefixes = {site.name: site.prefix for site in sites}
    statistics = channel_statistics(
        session.teacher, axes, prefixes, session.photographs.normalize, pictures.clean[views], session.device
    )
    for name, inner in fresh:
        for module in inner:
            module.mean.copy_(statistics[name][0])
            module.std.copy_(statistics[name][1])


def _fit_experts(session: FitSession, sites: Any, modules: dict[str, nn.Module], experts: list[str]) -> None:
    """Fit one expert after the other, each on its own degradation."""
    photographs = session.photographs
    for kind in photographs.data.kinds:
        index = experts.index(kind)
        inner = [module.experts[index] for module in modules.values() if isinstance(module, RoutedFDM)]
        parameters = parameters_of(session.model, [f"{name}.{PRIOR_NAME}.experts.{index}." for name in modules])
        pictures = photographs.split(photographs.draws([kind], 0.0, photographs.per_view(_PICTURES)))
        with _one_expert(modules, index):
            run_stage(session, kind, _fit_of(session, sites, parameters, pictures, inner))


@contextlib.contextmanager
def _one_expert(modules: dict[str, nn.Module], index: int = 0) -> Iterator[None]:
    """Send every image to one expert inside the context, if there are several."""
    routed = [module for module in modules.values() if isinstance(module, RoutedFDM)]
    for module in routed:
        module.only = index
    try:
        yield
    finally:
        for module in routed:
            module.only = None
