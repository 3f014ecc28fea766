"""Distilling the untouched host into its quality-adaptive activations: on degraded images they learn clean features."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from quac_plugins.core.deprecated import renamed
from quac_plugins.core.hooks import PRIOR_NAME
from quac_plugins.core.inject.adapter import is_fresh
from quac_plugins.core.inject.config import QuACConfig
from quac_plugins.core.inject.record import injection_of, modules_inside, unwrap
from quac_plugins.core.prior.comparison import Pictures
from quac_plugins.core.prior.recipe import Recipe
from quac_plugins.fit.agreement import agreement, multiply_adds
from quac_plugins.fit.data import data_with
from quac_plugins.fit.gate import judged_pictures
from quac_plugins.fit.photographs import Photographs
from quac_plugins.fit.prior import standardize
from quac_plugins.fit.report import FitReport
from quac_plugins.fit.session import FitSession, check_fit, parameters_of, unharmed
from quac_plugins.fit.training import Fit, run_stage
from quac_plugins.processes import process_group

_PRIOR = f".{PRIOR_NAME}."  # what the state-dict prefixes of a prior end with
_PICTURES = 320  # degraded pictures that a fit aims at, over all corruptions


@renamed(severity="severities", images="data")
def fit_qacon(
    model: nn.Module,
    data: Any = None,
    *,
    config: QuACConfig | None = None,
    with_prior: bool = False,
    deep: str | Sequence[str] | None = "stages",
    recipe: Recipe | None = None,
    device: str | torch.device | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
    **settings: Any,
) -> FitReport:
    """Fit the quality-adaptive activations of a preserved host by distillation (the KD of the QuAC figure).

    The teacher is the untouched host on clean images. The student, the host with its activations, learns the teacher's
    features at ``deep`` and its logits on degraded images. The fit needs no labels; with labels (a Dataset of
    (image, label)), ``label_weight`` adds cross-entropy. The host's own parameters never change. Batch norms of the
    activations' drivers are calibrated on the pictures first and then fixed, as a handful of images is no batch.

    Args:
        model: a host with quality-adaptive activations inside (``timm.create_model("NAME_qacon")``, :func:`inject`), or
            a plain host, which gets ``config``.
        config: the config of the activations in a plain host. None: the defaults of :class:`quac_plugins.QuACConfig`.
        with_prior: fit the model's degradation prior too.
        data, deep, recipe, device, checkpoint, progress, **settings: as in :func:`fit_prior`; by default the severity
            is 3 and a tenth of the pictures is clean.

    Returns:
        The report of the fit, for ``print``, ``to_json`` and ``plot``.

    Raises:
        FileNotFoundError: a folder or file of photographs does not exist.
        TypeError: the model or the config has a wrong type.
        ValueError: no photograph can be read; an option is wrong; ``label_weight`` without labels; ``with_prior``
            without a prior.

    Example:
        >>> import numpy as np, timm, quac_plugins as quac
        >>> model = timm.create_model("test_resnet_qacon")
        >>> photographs = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
        >>> report = quac.fit_qacon(model, photographs, corruptions="contrast", input_size=64, views=1, steps=4)
        >>> report.what
        'qacon'
    """
    started = time.perf_counter()
    check_fit(model, config, QuACConfig)
    data, settings = data_with(data, settings)
    network = unwrap(model)
    record = injection_of(network)
    inside = record.config if record is not None else None
    prior = record.prior if record is not None else None
    if inside is not None and config is not None:
        raise ValueError("the model holds QuAC already; leave config out, or remove(model) first")
    if inside is None and prior is not None:
        raise ValueError("the model holds a prior, but no activations to fit; inject(model, QuACConfig()) first")
    if with_prior and prior is None:
        raise ValueError("with_prior=True, but the model holds no prior; inject(model, PriorConfig()) first")
    if with_prior and prior is not None and prior.config.experts and is_fresh(network):
        raise ValueError("with_prior=True, but the routed prior sends no image to any expert yet; call fit_prior first")
    planned = inside if inside is not None else config if config is not None else QuACConfig()
    if data.clean_share is None:
        data = replace(data, clean_share=0.1)
    with process_group() as processes, unharmed(network):
        photographs = Photographs(network, data, planned, _PICTURES)
        # every activation of the network moves at once: with ten times this rate it forgets what it was
        recipe = recipe or Recipe(steps=400, near=0.0, lr=2e-4)
        session = FitSession(network, photographs, recipe, settings, device, processes)
        if inside is None:
            session.put_in(planned)
        report = _fit(session, with_prior, deep=deep, checkpoint=checkpoint, progress=progress)
    report.seconds = round(time.perf_counter() - started, 1)
    return report


def _fit(session: FitSession, with_prior: bool, **opened: Any) -> FitReport:
    """Fit the activations inside the model, and judge them."""
    photographs = session.photographs
    data, kinds = photographs.data, photographs.data.kinds
    record = injection_of(session.model)
    assert record is not None
    inside = modules_inside(session.model)
    prefixes = [p for p in record.prefixes() if not p.endswith(_PRIOR)]
    others = [p for p in record.prefixes() if p.endswith(_PRIOR)]
    parameters = parameters_of(session.model, prefixes + others if with_prior else prefixes)
    sites = [site.name for site in record.sites]
    with session.open("qacon", parameters, sites, with_prior=with_prior, **opened) as report:
        judged = judged_pictures(photographs, kinds)
        drawn = photographs.draws(kinds, data.clean_share or 0.0, photographs.per_view(_PICTURES / len(kinds)))
        pictures = photographs.split(drawn)
        if with_prior and record.prior is not None:
            standardize(session, record.prior.sites, [inside[p[:-1]] for p in others], pictures)
        _calibrate(session, [inside[p[:-1]] for p in prefixes], pictures)
        run_stage(session, "qacon", Fit(session.compare(pictures), parameters, session.processes))
        session.round_as_saved()
        report.agreement = session.processes.of_main(lambda: agreement(session, judged))
        report.multiply_adds = multiply_adds(session)
    return report


def _calibrate(session: FitSession, modules: list[nn.Module], pictures: Pictures) -> None:
    """Set the statistics of the drivers' batch norms by the pictures, in modules that are still new."""
    norms = [m for module in modules for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    norms = [m for m in norms if m.running_mean is not None and not m.num_batches_tracked]
    if not norms or len(pictures.train) < 2:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None  # the plain mean over all batches
        norm.train()
    chosen = pictures.train[np.linspace(0, len(pictures.train) - 1, min(len(pictures.train), 96)).round().astype(int)]
    try:
        with torch.no_grad():
            for part in np.array_split(chosen, max(1, len(chosen) // 16)):
                session.model(session.images(pictures.degraded[part]))
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()
