"""Distilling the untouched host into its quality-adaptive activations: on degraded images they learn clean features."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from quac_plugins.core.hooks import PRIOR_NAME
from quac_plugins.core.inject.adapter import is_fresh
from quac_plugins.core.inject.config import QuACConfig
from quac_plugins.core.inject.record import injection_of, modules_inside, unwrap
from quac_plugins.core.prior.comparison import Pictures
from quac_plugins.core.prior.recipe import Recipe
from quac_plugins.core.prior.training import Fit
from quac_plugins.fit.agreement import agreement
from quac_plugins.fit.draws import Degrade
from quac_plugins.fit.gate import judged_pictures
from quac_plugins.fit.prior import standardize
from quac_plugins.fit.report import FitReport
from quac_plugins.fit.session import Data, Session, parameters_of, progress_bar
from quac_plugins.fit.settings import recipe_with
from quac_plugins.fit.start import check_fit, put_in, unharmed

_PRIOR = f".{PRIOR_NAME}."  # what the state-dict prefixes of a prior end with
_PICTURES = 320  # degraded pictures that a fit aims at, over all corruptions


def fit_qacon(
    model: nn.Module,
    images: Any = None,
    *,
    pairs: Any = None,
    degrade: Degrade | None = None,
    corruptions: str | Sequence[str] | None = None,
    severity: int | Sequence[int] = 3,
    config: QuACConfig | None = None,
    with_prior: bool = False,
    deep: str | Sequence[str] | None = "stages",
    limit: int | None = None,
    views: int | None = None,
    draws: int | None = None,
    clean_share: float = 0.1,
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
    """Fit the quality-adaptive activations of a preserved host by distillation (the KD of the QuAC figure).

    Teacher: the untouched host on clean images. Student: the host with its activations on the degraded ones; its
    features at ``deep`` and its logits are to be the teacher's. Labels are not needed; where the images bring them (a
    Dataset of (image, label)), ``label_weight`` adds cross-entropy. The host's own parameters never change. Batch norms
    of the activations' drivers are calibrated on the pictures first and then held, as a handful of images is no batch.

    Args:
        model: a host with quality-adaptive activations inside (``timm.create_model("NAME_qacon")``, :func:`inject`);
            into a plain host ``config`` is injected.
        config: what to inject into a plain host.
        with_prior: fit the degradation prior that the model holds as well.
        corruptions: names or sets of :func:`quac_plugins.degradations.corruption_names`. None: all 15.
        clean_share: share of undegraded pictures.
        images, pairs, degrade, severity, deep, limit, views, draws, held_out, recipe, seed, device, mean, std,
            input_size, crop_pct, interpolation, checkpoint, num_workers, progress: as in :func:`fit_prior`.

    Raises:
        FileNotFoundError, OSError: there are no images, or none can be read.
        ValueError: an option does not fit; ``label_weight`` without labels; ``with_prior`` without a prior.

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
    network = unwrap(model)
    record = injection_of(network)
    there = record.config if record is not None else None
    prior = record.prior if record is not None else None
    if there is not None and config is not None:
        raise ValueError("the model holds QuAC already; leave config out, or remove(model) first")
    if there is None and prior is not None:
        raise ValueError("the model holds a prior, but no activations to fit; inject(model, QuACConfig()) first")
    if with_prior and prior is None:
        raise ValueError("with_prior=True, but the model holds no prior; inject(model, PriorConfig()) first")
    if with_prior and prior is not None and prior.config.experts and is_fresh(network):
        raise ValueError("with_prior=True, but the routed prior sends no image to any expert yet; call fit_prior first")
    data = Data(
        images, pairs, degrade, corruptions, severity, limit, views, draws, clean_share, held_out, seed, num_workers,
        mean, std, input_size, crop_pct, interpolation,
    )  # fmt: skip
    planned = there if there is not None else config if config is not None else QuACConfig()
    session = Session(network, data, device, _PICTURES, planned)
    # every activation of the network moves at once: with ten times this rate it forgets what it was
    made = recipe_with(recipe or Recipe(steps=400, near=0.0, lr=2e-4), settings, seed, session.device)
    session.check_labels(made)
    kinds = session.kinds
    with unharmed(network):
        if there is None:
            put_in(network, planned, session.size, session.config["mean"], session.config["std"], seed)
        record = injection_of(network)
        assert record is not None
        inside = modules_inside(network)
        own = [p for p in record.prefixes() if not p.endswith(_PRIOR)]
        others = [p for p in record.prefixes() if p.endswith(_PRIOR)]
        parameters = parameters_of(network, own + others if with_prior else own)
        names = [site.name for site in record.sites]
        report = session.report("qacon", names, kinds, made, sum(p.numel() for p in parameters.values()))
        with session.open(parameters), progress_bar(progress) as show:
            deeper = session.deep_sites(deep)
            judged = judged_pictures(session, kinds)
            keep = session.checkpoints(checkpoint, made, what="qacon", deep=deep, with_prior=with_prior)
            per_view = max(1, round(_PICTURES / (session.views * len(session.few) * len(kinds))))
            pictures = session.pictures(session.draws(kinds, clean_share, per_view))
            if with_prior and record.prior is not None:
                standardize(session, record.prior.sites, [inside[p[:-1]] for p in others], pictures)
            _calibrate(session, [inside[p[:-1]] for p in own], pictures)
            fit = Fit(
                network, session.teacher, parameters, [], deeper, session.normalize, pictures, made, session.share
            )
            session.fit("qacon", fit, keep, report, show)
            session.round_as_saved()
            report.agreement = session.of_main(lambda: agreement(session, judged))
            report.multiply_adds = session.multiply_adds()
        session.finish(keep)
    report.seconds = round(time.perf_counter() - started, 1)
    return report


def _calibrate(session: Session, modules: list[nn.Module], pictures: Pictures) -> None:
    """Statistics of the drivers' batch norms over the pictures, where they still are those of a new module."""
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
                images = torch.from_numpy(np.ascontiguousarray(pictures.degraded[part])).to(session.device)
                session.model(session.normalize(images))
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()
