"""The data of a fit, as users describe it: sources of photographs, degradations, and preprocessing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from quac_plugins.core.deprecated import renamed
from quac_plugins.core.options import whole_number
from quac_plugins.degradations import check_severity, corruption_names
from quac_plugins.evaluate.preprocessing import square_or_not
from quac_plugins.fit.draws import Degrade, own_degradations
from quac_plugins.fit.settings import number_from

__all__ = ["Data", "data_with"]


@renamed(severity="severities")
@dataclass(frozen=True, kw_only=True, eq=False)
class Data:
    """The photographs of a fit, how they are degraded, and how the host takes them.

    :func:`quac_plugins.fit_prior` and :func:`quac_plugins.fit_qacon` take a ``Data`` as ``data``, or its fields by
    name.

    Attributes:
        images: clean photographs in RGB, of any sizes from 32 pixels on: a folder (searched with the folders in it), a
            file or a list of files, or of tuples (file, label); an array, uint8, uint16 or float in [0, 1], of shape
            (H, W), (H, W, 3) or (N, H, W, 3); a tensor, likewise, of shape (3, H, W) or (N, 3, H, W); a PIL image; a
            list, a torch Dataset or any iterable of these or of tuples (image, label).
        pairs: (degraded, clean), each in a form of ``images``, instead of ``images``. Two folders are matched by the
            paths below them without extension, all other forms by order.
        degrade: your own degradation, or several by name (``{"rain": function}``), which become experts of a routed
            prior. They replace the default corruptions, or join the named ones. A function maps an image, uint8
            (h, w, 3), to its degraded version of the same size: an array, uint8 or float in [0, 1], a float or uint8
            tensor (3, h, w), or a PIL image. A function with a parameter ``rng`` gets a seeded
            `numpy.random.Generator`; the global generators of Python, numpy and torch are seeded for the call and
            restored after it.
        corruptions: names or sets of :func:`quac_plugins.degradations.corruption_names`. None: the names of a routed
            prior's experts, else all 15; none beside ``degrade`` or ``pairs``.
        severities: severities of the corruptions, 1 to 5; several are mixed. None: all for margins, else 3. Margins
            whose quality function tells severities always begin from statistics at severities 2 and 4.
        limit: the largest number of images, which the seed chooses.
        views: the number of crops and flips of each image; the first view is the whole image. None: enough for a fit.
        draws: the number of degraded pictures of each view and corruption. None: enough for a fit.
        clean_share: the share of undegraded pictures in the fit of one module, from 0 to below 1. None: none for one
            FDM for one corruption, else a tenth.
        held_out: the share of images, above 0 and below 1, that judge when to stop and are not fitted on. None: a
            fifth; for margins a tenth.
        seed: the seed of all draws, from 0 on.
        num_workers: the number of processes that degrade; 0: this process. The pictures are the same.
        mean, std: mean and standard deviation of the host's normalization, in [0, 1], one number or one a channel; give
            both or neither. None here, and for the three fields below: the host's own values.
        input_size: the size of the host's images in pixels: a side, (H, W) or (3, H, W).
        crop_pct: the side of the crop over the side of the resized image, in (0, 1].
        interpolation: the interpolation of the resizing: ``"bilinear"``, ``"bicubic"``, ….

    Raises:
        ValueError: a field is out of range, a name is unknown, or two fields exclude each other. The fit raises errors
            that depend on the host or the photographs.

    Example:
        >>> import numpy as np
        >>> photographs = np.zeros((3, 64, 64, 3), dtype=np.uint8)
        >>> data = Data(images=photographs, corruptions="fog,contrast", degrade={"dark": lambda image: image // 4})
        >>> data.kinds, data.levels, Data(pairs=("hazy/", "clear/")).kinds
        (['fog', 'contrast', 'dark'], [3], ['pairs'])
        >>> Data(images=photographs, held_out=2)
        Traceback (most recent call last):
        ...
        ValueError: held_out must be above 0 and below 1, got 2
    """

    images: Any = None
    pairs: Any = None
    degrade: Degrade | None = None
    corruptions: str | Sequence[str] | None = None
    severities: int | Sequence[int] | None = None
    limit: int | None = None
    views: int | None = None
    draws: int | None = None
    clean_share: float | None = None
    held_out: float | None = None
    seed: int = 0
    num_workers: int = 0
    mean: Any = None
    std: Any = None
    input_size: Any = None
    crop_pct: float | None = None
    interpolation: str | None = None

    def __post_init__(self) -> None:
        for name in ("limit", "views", "draws"):
            if getattr(self, name) is not None:
                whole_number(name, getattr(self, name))
        for name in ("seed", "num_workers"):
            whole_number(name, getattr(self, name), 0)
        if self.held_out is not None and not (number_from(0, self.held_out) and 0 < self.held_out < 1):
            raise ValueError(f"held_out must be above 0 and below 1, got {self.held_out!r}")
        if self.clean_share is not None and not (number_from(0, self.clean_share) and self.clean_share < 1):
            raise ValueError(f"clean_share must be at least 0 and below 1, got {self.clean_share!r}")
        if self.pairs is not None and (self.corruptions is not None or self.degrade is not None):
            raise ValueError("give either pairs, which are degraded already, or corruptions and degrade, not both")
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std go together; give both or neither")
        if self.input_size is not None:
            square_or_not(self.input_size)
        if not self.kinds:
            raise ValueError("no corruptions to fit on: give names, such as corruptions=['fog'], or degrade, or pairs")
        self.levels  # noqa: B018 - what it raises

    @property
    def functions(self) -> dict[str, Callable[..., Any]]:
        """Return the user's own degradations by name."""
        return own_degradations(self.degrade)

    @property
    def names(self) -> list[str]:
        """Return the names of the corruptions."""
        by_default = "all" if self.pairs is None and self.degrade is None else ()
        return corruption_names(by_default if self.corruptions is None else self.corruptions)

    @property
    def kinds(self) -> list[str]:
        """Return all degradations: the corruptions, then the user's own; or ``["pairs"]``."""
        return [*self.names, *self.functions] if self.pairs is None else ["pairs"]

    @property
    def levels(self) -> list[int]:
        """Return the severities of the corruptions: 3 by default, and none without corruptions."""
        severities = 3 if self.severities is None else self.severities
        levels = list(severities) if isinstance(severities, Iterable) else [severities]
        return [check_severity(level) for level in levels] if self.names else []


def data_with(data: Any, settings: dict[str, Any]) -> tuple[Data, dict[str, Any]]:
    """Return the :class:`Data` of photographs, or of a :class:`Data`, with its fields in ``settings``; and the rest.

    Example:
        >>> data, others = data_with(Data(images="few/", seed=3), {"limit": 5, "steps": 200})
        >>> data.images, data.seed, data.limit, others
        ('few/', 3, 5, {'steps': 200})
    """
    names = {field.name for field in fields(Data)}
    single = {name: value for name, value in settings.items() if name in names}
    others = {name: value for name, value in settings.items() if name not in names}
    return replace(data, **single) if isinstance(data, Data) else Data(images=data, **single), others
