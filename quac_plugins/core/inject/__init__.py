"""Finding sites, putting modules in, saving and loading what was put in."""

from quac_plugins.core.inject.config import QuACConfig
from quac_plugins.core.inject.fuse import fuse
from quac_plugins.core.inject.surgery import Injection, inject, injection_of, remove
from quac_plugins.core.prior.config import PriorConfig

__all__ = ["Injection", "PriorConfig", "QuACConfig", "fuse", "inject", "injection_of", "remove"]
