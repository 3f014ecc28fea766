"""The recipe of a fit: steps, learning rate, weights."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass
class Recipe:
    """The recipe of a fit.

    Attributes:
        steps: the number of steps of AdamW, with warm-up over the first tenth of each part and cosine decay.
        near: the share of the steps that compare the features at the first site alone.
        batch_size: the number of pictures in a step, over all processes.
        lr: the highest learning rate.
        weight_decay: the weight decay of matrices and kernels; vectors have none.
        site_weight: the weight of the first site.
        deep_weight: the weight of all later places together; 0: there is no deep part.
        logits_weight: the weight of the logits.
        label_weight: the weight of cross-entropy, which needs labels.
        check_every: the number of steps between two looks at the held-out images.
        patience: the number of looks without improvement after which the deep part stops; 0: never.
        clip: the largest norm of the gradient.
        amp: ``"no"``, ``"bf16"`` or ``"fp16"`` (on a GPU).
        near_crop: the side of the crops of features in the near part; smaller features are used whole.
        near_batch: the number of pictures in a step of the near part.
        least_positions: a prior's later site is fitted if the images to fit on have at least this many feature
            positions there, (H / stride)·(W / stride) each; few images would be learned by heart.
        least_drift: the loss of each picture is divided by its drift plus this multiple of the mean drift: with 0 all
            pictures count alike; larger numbers give severe ones more weight.
        seed: the seed of the order of the pictures.
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

WITH_MARGINS = replace(MARGINS, lr=1.5e-3)
"""For FDMs beside margins: their convolutions begin from nothing, and have to go farther."""
