"""Hooks of MMEngine's runner."""

from __future__ import annotations

import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch import nn

from quac_plugins.core.deprecated import renamed
from quac_plugins.core.inject import injection_of
from quac_plugins.core.inject.adapter import adapter_state, is_fresh, load_adapter_state
from quac_plugins.core.options import named, one_of
from quac_plugins.fit import Data, Recipe, fit_prior
from quac_plugins.fit.settings import recipe_with

_OF_DATA, _OF_RECIPE = ({field.name for field in fields(kind)} for kind in (Data, Recipe))


@HOOKS.register_module(force=True)
@renamed(severity="severities", images="data")
class FitPriorHook(Hook):
    """Fit the degradation prior of a model on a few photographs, after its weights are loaded and before it runs.

    The fit needs no labels, and the host's own weights stay unchanged.

    Args:
        data: a folder of clean photographs, or any other ``data`` of :func:`quac_plugins.fit_prior`.
        limit: the largest number of photographs.
        refit: fit again a prior that the loaded weights have fitted already.
        **options: options of :func:`quac_plugins.fit_prior`: ``corruptions``, ``severities``, ``steps``, ``seed``, …

    Raises:
        ValueError: at once, an option is unknown or wrong; later, the model holds no prior.
        FileNotFoundError: the folder does not exist.
    """

    priority = "VERY_LOW"  # after checkpoints and their kin

    def __init__(self, data: Any, limit: int | None = None, refit: bool = False, **options: Any):
        known = {*inspect.signature(fit_prior).parameters, *_OF_DATA, *_OF_RECIPE}
        for name in options:
            with named(f"FitPriorHook.{name}"):
                one_of("option", name, sorted(known - {"model", "data", "images", "settings"}))
        for name, value in {"limit": limit, **options}.items():
            with named(f"FitPriorHook.{name}"):
                if name in _OF_DATA - {"mean", "std"}:  # which go together
                    Data(**{name: value})
                elif name in _OF_RECIPE:
                    recipe_with(None, {name: value}, 0, torch.device("cuda"))  # where all precisions are known
        self.refit = refit
        self.data, self.limit, self.options = data, limit, options
        self.report: Any = None

    def before_train(self, runner: Any) -> None:
        """Fit before training."""
        self._fit(runner)

    def before_val(self, runner: Any) -> None:
        """Fit before validation."""
        self._fit(runner)

    def before_test(self, runner: Any) -> None:
        """Fit before testing."""
        self._fit(runner)

    def _fit(self, runner: Any) -> None:
        if self.report is not None:
            return
        model = _holder(runner.model)
        if not self.refit and not is_fresh(model):
            runner.logger.info("FitPriorHook: the prior that was loaded is fitted already; refit=True fits it again")
            return
        if isinstance(self.data, (str, Path)) and not Path(self.data).expanduser().exists():
            raise FileNotFoundError(f"FitPriorHook.data: there is no folder or file {str(self.data)!r}")
        self.report = fit_prior(model, self.data, limit=self.limit, **{"progress": False, **self.options})
        runner.logger.info(f"degradation prior fitted: {self.report}")
        for average in (ema for hook in runner.hooks if (ema := getattr(hook, "ema_model", None)) is not None):
            load_adapter_state(_holder(average), adapter_state(model))  # which is what is evaluated


def _holder(model: nn.Module) -> nn.Module:
    """Return the module of a model that holds the prior."""
    for module in model.modules():
        record = injection_of(module) if "_quac_injection" in module.__dict__ else None
        if record is not None and record.prior is not None:
            return module
    raise ValueError(
        f"FitPriorHook: {type(model).__name__} holds no degradation prior; give its backbone one: "
        "dict(type='QuACBackbone', backbone=…, prior=dict(site='auto'))"
    )
