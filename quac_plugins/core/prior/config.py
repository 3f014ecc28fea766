"""The config of a degradation prior: the whole description of what is put into a host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from quac_plugins.core.options import QualityOptions, one_of, pattern_list, whole_number
from quac_plugins.core.prior.fdm import act_names, needs_quality, resolve_fdm
from quac_plugins.core.prior.margins import Margin

_MOST_EXPERTS = 256


@dataclass
class PriorConfig(QualityOptions):
    """The config of a degradation prior: feature de-drifting modules (FDM) after layers of a frozen host.

    Attributes:
        site: ``"auto"`` (one shallow layer, by the rule of :func:`quac_plugins.core.prior.sites.find_prior_sites`),
            ``"stages"`` (that layer and the ends of the later stages), ``"norms"`` (every norm), a module name, a glob,
            ``"re:…"``, or a list. None: ``"norms"`` for margins and ``"stages"`` for other FDMs.
        fdm: ``"light"`` (depthwise, for mobile networks), ``"dense"`` (3×3, the most exact), ``"ncrf"`` (centre and
            dilated surround, after the paper) or ``"margin"`` (a scale and a shift for every channel of the host's
            norms, which costs no multiply-adds).
        fdm_width: the number of channels inside an FDM. None: the FDM's own rule.
        fdm_act: the activation inside an FDM: ``"relu"``, ``"gelu"``, … or a quality-adaptive one, such as ``"qacon"``.
        experts: names of degradations, with one FDM each: a routed prior, whose gate reads q. Empty: a single FDM.
        margins: put margins at the host's norms as well. An experiment: as measured so far, margins alone are better.
            At each site there is then one FDM for all ``experts``, with margins of each behind its own convolutions,
            and it does nothing to a picture that q knows for clean.
        top_k: the number of experts that an image is sent to (routed only).
        quality: the quality function that the gate, or a driven activation inside, reads. ``"degradation"`` tells the
            15 corruptions of ImageNet-C apart by itself, so a gate over experts of these names needs no fit; with
            another one the gate learns from the photographs of the fit alone, of which it needs many.
        mean, std, channel_order, quality_grad, quality_channels: as in :class:`quac_plugins.QuACConfig`.
        freeze: set ``requires_grad`` of the host's own parameters to False until the prior is removed.

    Raises:
        ValueError: a value is unknown; the message lists the known ones.

    Example:
        >>> PriorConfig(site="stages", experts=["fog", "contrast"]).needs_quality
        True
    """

    site: str | list[str] | None = None
    fdm: str = "light"
    fdm_width: int | None = None
    fdm_act: str = "relu"
    experts: list[str] = field(default_factory=list)
    margins: bool = False
    top_k: int = 1
    quality: str | Callable[[Tensor], Tensor] = "degradation"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    channel_order: str = "rgb"
    quality_grad: bool = False
    quality_channels: int | None = None
    freeze: bool = True

    def __post_init__(self) -> None:
        fdm = resolve_fdm(self.fdm)
        if self.site is None:
            self.site = fdm.places
        if not isinstance(self.site, str) and isinstance(self.site, Sequence):
            self.site = list(self.site)
        pattern_list("site", self.site)
        one_of("fdm_act", self.fdm_act, act_names())
        if self.fdm_width is not None:
            whole_number("fdm_width", self.fdm_width, 1, 65536)
        several = isinstance(self.experts, Sequence) and not isinstance(self.experts, str)
        if not several or not all(n and isinstance(n, str) for n in self.experts):
            raise ValueError(f"experts must be a list of names of degradations, got {self.experts!r}")
        self.experts = list(self.experts)
        if len(set(self.experts)) < len(self.experts) or len(self.experts) > _MOST_EXPERTS:
            raise ValueError(f"experts must be at most {_MOST_EXPERTS} different names, got {self.experts!r}")
        whole_number("top_k", self.top_k)
        if not isinstance(self.margins, bool):
            raise ValueError(f"margins must be True or False, got {self.margins!r}")
        if self.margins and issubclass(fdm, Margin):
            raise ValueError("margins=True puts margins beside another FDM, and fdm='margin' is margins alone")
        if self.experts and not self.margins and needs_quality(self.fdm_act):
            raise ValueError(
                f"a routed prior takes experts without q, since its gate reads it: fdm_act={self.fdm_act!r} needs q. "
                "Use fdm_act='relu', or no experts"
            )
        if not isinstance(self.freeze, bool):
            raise ValueError(f"freeze must be True or False, got {self.freeze!r}")
        self.check_quality()

    @property
    def patterns(self) -> list[str]:
        """Return ``site`` as a list."""
        return pattern_list("site", self.site)

    @property
    def needs_quality(self) -> bool:
        """Return whether a part of the prior reads q and so needs a tap."""
        return bool(self.experts) or needs_quality(self.fdm_act)
