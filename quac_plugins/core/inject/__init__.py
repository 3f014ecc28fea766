"""Finding sites, putting modules in, saving and loading what was put in."""

from quac_plugins.core.inject.config import QuACConfig
from quac_plugins.core.inject.surgery import Injection, inject, injection_of, remove

__all__ = ["Injection", "QuACConfig", "inject", "injection_of", "remove"]
