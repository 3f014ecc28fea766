"""How activations are computed: one operator, :func:`activate`, and :func:`means`; see :mod:`operator`."""

from quac_plugins.core.kernels.operator import activate, means

__all__ = ["activate", "means"]
