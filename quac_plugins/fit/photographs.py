"""The photographs of a fit: read once, split, and drawn from, as the host takes its images."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from quac_plugins.core.options import QualityOptions
from quac_plugins.core.prior.comparison import Pictures
from quac_plugins.evaluate.preprocessing import Crop, data_config, normalized
from quac_plugins.fit.data import Data
from quac_plugins.fit.draws import Draws, make_draws
from quac_plugins.fit.draws import held_out as split_of
from quac_plugins.fit.sources import few_images


class Photographs:
    """The photographs of a :class:`Data`, and pictures drawn from them at the host's input size.

    Args:
        model: the host, unwrapped.
        data: the description of the photographs.
        config: the config of the fitted modules, which may hold the host's normalization.
        wanted: the number of degraded pictures that a fit aims at.
        most_views: the largest number of views of an image, if ``data.views`` is None.
        scales: the smallest and the largest side of a random crop, relative to the image's side.
        held_out: the share of images that judge, if ``data.held_out`` is None.

    Attributes:
        few: the images.
        train, held: indices of the images that are fitted on, and of the images that judge.
        views: the number of views of each image.
        settings: timm's data config of the host, with the user's settings.
        size: (height, width) of the host's input.
        crop: PIL image → uint8 tensor (3, height, width).
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        config: QualityOptions,
        wanted: int,
        most_views: int = 12,
        scales: tuple[float, float] = (0.5, 1.0),
        held_out: float = 0.2,
    ):
        self.model, self.data, self.scales = model, data, scales
        # what is to be put in may know the images of its host
        mean, std = (data.mean, data.std) if data.mean is not None else (config.mean, config.std)
        chosen = {name: getattr(data, name) for name in ("input_size", "crop_pct", "interpolation")}
        self.settings = data_config(model, mean=mean, std=std, **chosen)
        self.size: tuple[int, int] = tuple(self.settings["input_size"][-2:])
        self.crop = Crop(self.settings, keep_ready=data.crop_pct is None)
        self.few = few_images(data.images, pairs=data.pairs, limit=data.limit, seed=data.seed)
        flat = [
            n for n, picture in zip(self.few.names, self.few.clean, strict=True) if (picture == picture[0, 0]).all()
        ]
        if flat:
            some = f"{', '.join(flat[:3])}{', …' * (len(flat) > 3)}"
            warnings.warn(
                f"{len(flat)} of {len(self.few)} photographs are of one colour ({some}), from which nothing is learned "
                "about blur, noise or contrast; leave them out",
                stacklevel=3,
            )
        self.train, self.held = split_of(len(self.few), data.held_out or held_out, data.seed)
        if not self.held:
            warnings.warn("of one image none can be held out: what is kept is the best on that image", stacklevel=3)
        # about as many pictures whatever the number of images and corruptions; at least one of each
        self.views = data.views or int(min(most_views, max(2, wanted / len(self.few))))

    def per_view(self, wanted: float) -> int:
        """Return the number of degraded pictures of each view that gives about ``wanted`` pictures."""
        return max(1, round(wanted / (self.views * len(self.few))))

    def draws(
        self,
        kinds: list[str],
        clean_share: float,
        draws: int,
        views: int | None = None,
        severities: Sequence[int] | None = None,
        images: Sequence[int] | None = None,
    ) -> Draws:
        """Draw pictures of some of the degradations (of the pairs, where these are given) and images.

        By default of all images, at the user's severities. Other corruptions may be named than those of the fit.
        """
        functions = self.data.functions
        return make_draws(
            self.few if images is None else self.few.only(images),
            self.size,
            corruptions=[kind for kind in kinds if kind not in functions and kind != "pairs"],
            severities=severities or self.data.levels,
            views=views or self.views,
            draws=(self.data.draws if severities is None else None) or draws,
            clean_share=clean_share,
            degrade={kind: functions[kind] for kind in kinds if kind in functions} or None,
            seed=self.data.seed,
            num_workers=self.data.num_workers,
            crop=self.crop,
            scales=self.scales,
        )

    def split(self, draws: Draws) -> Pictures:
        """Split the draws by image into pictures to fit on and held-out pictures."""
        held = np.isin(draws.image[draws.view], self.held)
        train, judge = np.flatnonzero(~held), np.flatnonzero(held)
        labels = None if self.few.labels is None else np.asarray(self.few.labels)[draws.image]
        return Pictures(draws.clean, draws.degraded, draws.view, train, judge, labels, draws.image)

    def normalize(self, pictures: Tensor) -> Tensor:
        """Convert pictures uint8 (B, H, W, 3) in RGB to the host's input (B, 3, H, W)."""
        images = normalized(pictures.permute(0, 3, 1, 2), self.model, self.settings)
        return images.contiguous(memory_format=torch.channels_last)


def digest_of(pictures: Pictures) -> str:
    """Return a hash of pictures and of their split."""
    digest = hashlib.sha256()
    for array in (pictures.clean, pictures.degraded, pictures.view, pictures.train, pictures.held, pictures.labels):
        if array is not None:
            digest.update(f"{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
