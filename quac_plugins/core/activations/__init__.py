"""Activations, one idea a file; every file of this folder is read, so a new class is found by being there."""

import importlib
import pkgutil

from quac_plugins.core.activations.base import ACTIVATIONS, ChannelActivation, resolve_activation
from quac_plugins.core.activations.driver import DrivenActivation, QualityDriven

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

from quac_plugins.core.activations.acon import QACON, AconC, MetaACON  # noqa: E402
from quac_plugins.core.activations.qgelu import QGELU  # noqa: E402
from quac_plugins.core.activations.qprelu import QPReLU  # noqa: E402
from quac_plugins.core.activations.qswish import QSwish  # noqa: E402

__all__ = [
    "ACTIVATIONS",
    "QACON",
    "QGELU",
    "AconC",
    "ChannelActivation",
    "DrivenActivation",
    "MetaACON",
    "QPReLU",
    "QSwish",
    "QualityDriven",
    "resolve_activation",
]
