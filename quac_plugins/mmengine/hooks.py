"""Hooks of MMEngine's runner."""

from __future__ import annotations

from typing import Any

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch import nn

from quac_plugins.core.inject import injection_of


@HOOKS.register_module(force=True)
class FitPriorHook(Hook):
    """Fit the degradation prior of a model on a few photographs, once its weights are loaded and before it runs.

    Labels are not needed, and the host's own weights stay as they are.

    Args:
        images: folder of clean photographs, or what else :func:`quac_plugins.fit_prior` takes.
        limit: at most so many of them.
        **options: of :func:`quac_plugins.fit_prior`: ``corruptions``, ``severity``, ``steps``, ``seed``, …

    Raises:
        ValueError: the model holds no prior.
    """

    priority = "VERY_LOW"  # after checkpoints and their kin

    def __init__(self, images: Any, limit: int | None = None, **options: Any):
        self.images, self.limit, self.options = images, limit, options
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
        from quac_plugins.fit import fit_prior

        model = _holder(runner.model)
        self.report = fit_prior(model, self.images, limit=self.limit, **{"progress": False, **self.options})
        runner.logger.info(f"degradation prior fitted: {self.report}")


def _holder(model: nn.Module) -> nn.Module:
    """The module of a model that the prior was put into."""
    for module in model.modules():
        record = injection_of(module) if "_quac_injection" in module.__dict__ else None
        if record is not None and record.prior is not None:
            return module
    raise ValueError(
        f"FitPriorHook: {type(model).__name__} holds no degradation prior; give its backbone one: "
        "dict(type='QuACBackbone', backbone=…, prior=dict(site='auto'))"
    )
