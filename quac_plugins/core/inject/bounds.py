"""Bounds on an untrusted adapter's config: it may ask a host for its own tensors' sizes and no more.

The check runs before anything is built, so that a config can neither fill the memory nor run for ever.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from quac_plugins.core.hooks import PRIOR_NAME
from quac_plugins.core.inject.adapter_files import Saved
from quac_plugins.core.prior.margins import Margin


def bound_problems(saved: Saved, state: dict[str, Tensor], known: Iterable[str]) -> list[str]:
    """List the parts of a config that fit neither its tensors nor this host.

    Args:
        saved: the content of the config.
        state: the adapter's tensors.
        known: names of the host's modules.
    """
    known_names = set(known)
    named = [*(site.name for site in saved.sites), *(site.name for site in saved.prior_sites)]
    problems = [f"site {name!r} is in the adapter, not in this host" for name in named if name not in known_names]
    if saved.config is not None and saved.config.is_driven:
        drivers = [name for name in state if name.endswith(".fc1.weight") and f".{PRIOR_NAME}." not in name]
        widths = [state[name].shape[0] for name in drivers if state[name].ndim]
        if widths and saved.config.reduction > min(widths):
            problems.append(
                f"reduction={saved.config.reduction} asks for {saved.config.reduction} hidden numbers or more, and a "
                f"tensor has {min(widths)}"
            )
    # all margins of a place are one tensor
    together = saved.prior is None or saved.prior.margins or saved.prior.fdm == Margin.name
    apart = 0 if saved.prior is None or together else len(saved.prior.experts)
    if saved.prior is not None and len(saved.prior_sites) * max(1, apart) > len(state):
        problems.append(
            f"missing tensors: {len(saved.prior.experts)} experts at {len(saved.prior_sites)} sites have more than the "
            f"{len(state)} that there are"
        )
    return problems
