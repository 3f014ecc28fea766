"""The numbers of a fit."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass
class Recipe:
    """How to fit.

    Attributes:
        steps: of AdamW, with warm-up over the first tenth of each part and cosine decay.
        near: share of the steps that compares the features at the first site alone.
        batch_size: pictures a step, over all processes.
        lr: highest learning rate.
        weight_decay: of matrices and kernels; vectors have none.
        site_weight: weight of the first site.
        deep_weight: weight of all later places together; 0: the near part is all.
        logits_weight: weight of the logits.
        label_weight: weight of cross-entropy where labels are given.
        check_every: steps between two looks at the held-out images.
        patience: looks without a better one after which the deep part stops; 0: never.
        clip: largest norm of the gradient.
        amp: ``"no"``, ``"bf16"`` or ``"fp16"`` (on a GPU).
        near_crop: side of the crops of features that the near part works on; the whole of smaller ones.
        near_batch: pictures a step of the near part.
        least_positions: a prior's later site is fitted where the images (those not held out) have at least so many
            feature positions there, (H / stride)·(W / stride) each; few images teach deep features by heart.
        least_drift: in the loss each picture counts relative to how far it drifts, and to so many times the mean
            drift: with 0 all pictures count alike, the more it is the more do severe ones.
        seed: of the order of the pictures.
    """

    steps: int = 600
    near: float = 0.67
    batch_size: int = 6
    lr: float = 2e-3
    weight_decay: float = 1e-2
    site_weight: float = 1.0
    deep_weight: float = 1.0
    logits_weight: float = 0.2
    label_weight: float = 0.0
    check_every: int = 40
    patience: int = 0
    clip: float = 1.0
    amp: str = "no"
    near_crop: int = 64
    near_batch: int = 8
    least_positions: int = 3000
    least_drift: float = 0.1
    seed: int = 0


MARGINS = Recipe(
    steps=600, near=0.0, batch_size=16, lr=1e-3, weight_decay=0.0, logits_weight=0.0, check_every=100, least_drift=3.0
)
"""For margins: what is fitted lies everywhere in the host, so the whole host is compared from the first step on; by its
features alone, of which a picture has thousands, where its one row of logits would be learned by heart."""

WITH_MARGINS = replace(MARGINS, steps=900, lr=1.5e-3)
"""For FDMs with margins: the same, and convolutions that begin from nothing."""
