"""Fitting the injected modules of a frozen host on a few photographs."""

from quac_plugins.core.prior.recipe import Recipe
from quac_plugins.fit.data import Data
from quac_plugins.fit.prior import fit_prior
from quac_plugins.fit.qacon import fit_qacon
from quac_plugins.fit.report import FitReport

__all__ = ["Data", "FitReport", "Recipe", "fit_prior", "fit_qacon"]
