"""From a share of a host's multiply-adds to a prior: margins, and the FDMs beside them that the share pays for."""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch
from torch import Tensor, nn

from quac_plugins.core.inject.trace import trace
from quac_plugins.core.prior.config import PriorConfig
from quac_plugins.core.prior.fdm import resolve_fdm
from quac_plugins.core.prior.margins import Margin
from quac_plugins.core.prior.sites import PriorSite, find_prior_sites
from quac_plugins.evaluate.lending import lent
from quac_plugins.fit.settings import number_from

LADDER = (
    ("dense", "stages", (128, 96, 64)),
    ("dense", "auto", (128, 96, 64)),
    ("light", "stages", (128, 96, 64, 48, 32, 24, 16)),
    ("light", "auto", (24, 16, 8)),
)
"""FDM, site and widths, the dearest first: dense ones where a host is so large that it can pay for them."""


def within_budget(
    model: nn.Module, config: PriorConfig, budget: float, size: tuple[int, int]
) -> tuple[PriorConfig, str]:
    """Choose margins, and beside them the best FDMs whose multiply-adds fit the budget.

    Args:
        model: the host, without a prior.
        config: of margins at the norms.
        budget: multiply-adds that may be added, over the host's: 0.13 for 13 %. 0: margins alone, which need none.
        size: (H, W) of its images.

    Returns:
        The config, and what was chosen in words.

    Raises:
        ValueError: the budget is no number from 0 on, the config is not of margins alone, or the host's multiply-adds
            cannot be counted.

    Example:
        >>> import timm
        >>> host = timm.create_model("test_resnet")
        >>> within_budget(host, PriorConfig(fdm="margin"), 0.1, (160, 160))[1]
        "budget 0.1: margins, and light FDMs of width 16 at act1: 9.5% of the host's multiply-adds"
    """
    if not number_from(0, budget):
        raise ValueError(f"budget must be a number from 0 on (0.13: 13 % more multiply-adds), got {budget!r}")
    if not issubclass(resolve_fdm(config.fdm), Margin) or config.site != Margin.places:
        raise ValueError(
            "budget chooses the FDMs beside margins at the norms: leave config out, or give PriorConfig(fdm='margin', "
            f"experts=[…]), got fdm={config.fdm!r}, site={config.site!r}"
        )
    with lent(model, None) as device, torch.no_grad():
        whole = flops_of(model, torch.zeros(1, 3, *size, device=device))
    if not whole:
        raise ValueError(
            f"the multiply-adds of {type(model).__name__} cannot be counted, so none can be kept within a budget: name "
            "the FDMs, config=PriorConfig(fdm='light', margins=True, experts=[…])"
        )
    seen, share = trace(model, torch.empty(1, 3, *size)), 0.0
    for fdm, rule, widths in LADDER:
        sites = find_prior_sites(model, seen, [rule])
        for width in widths:
            share = sum(_cost(site, fdm, width, size) for site in sites) / whole
            if share <= budget:
                chosen = f"{fdm} FDMs of width {width} at {', '.join(site.name for site in sites)}"
                said = f"budget {budget:.3g}: margins, and {chosen}: {share:.1%} of the host's multiply-adds"
                return replace(config, fdm=fdm, site=rule, fdm_width=width, margins=True), said
    said = f"budget {budget:.3g}: margins alone, since the smallest FDM is {share:.1%} of the host's multiply-adds"
    warnings.warn(said, stacklevel=3)
    return config, said


def flops_of(module: nn.Module, *inputs: Tensor) -> int:
    """Count the floating point operations of a call by torch's counter; 0 for operations that it does not know."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*inputs)
    return counter.get_total_flops()


def _cost(site: PriorSite, fdm: str, width: int, size: tuple[int, int]) -> int:
    rows, columns = site.grid or (-(-side // max(site.stride, 1)) for side in size)
    shape = {
        "nchw": (1, site.channels, rows, columns),
        "nhwc": (1, rows, columns, site.channels),
        "tokens": (1, site.prefix + rows * columns, site.channels),
    }[site.layout]
    with torch.device("meta"):
        return flops_of(resolve_fdm(fdm)(site, width), torch.empty(shape))
