"""The tap: computes q where the image enters the network, and hands it to the context.

It is a child module of the *first layer that sees the image*, called by that layer's hooks. So every path through the
network meets it (``forward_features``, ``features_only``, a detector's backbone), and what runs until the next image
has the q of this one. Where several images are under way at once, :mod:`passes` says whose turn it is, or that it
cannot be told. A part that is called by hand after the model's call has ended is given that call's q if its input is
what a part or the model returned, unchanged, or leads there by its gradients; else it is an error.

Two cases are left in which an activation may be given the q of other images: a call that ``torch.compile`` runs cannot
be seen to end, so a part that is called by hand after it goes on with it; and a part that is called again, without
gradients, on what other code has made of an older pass's features, before it is called on those of the newer pass.
Inside ``use_q`` both are right.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from quac_plugins.core.colours import in_order
from quac_plugins.core.graphs import called_whole, compiling
from quac_plugins.core.hooks import TAP_HOOKS, TAP_NAME, remove_hooks
from quac_plugins.core.precision import full_precision
from quac_plugins.core.quality.context import QualityContext, QualityError
from quac_plugins.core.quality.expansion import can_expand, expand_rows
from quac_plugins.core.quality.padding import quality_of_each, sizes_of
from quac_plugins.core.quality.registry import QualityFunction

FAR = (-2.0, 3.0)  # beyond what noise, padding and resizing leave of undone images


class QualityTap(nn.Module):
    """Computes the quality feature of the images that enter a layer.

    Args:
        quality: the quality function.
        context: where q goes.
        layer: name of the layer that is tapped, for errors.
        in_chans: channels of the host's images. 3: RGB. 1: grey, repeated. 2: their mean, repeated. More: the first
            three are RGB, as timm adapts pretrained stems.
        mean, std: the normalization the host's images come with, per channel; undone before the quality function.
            None: the images are in [0, 1].
        channel_order: ``"rgb"`` or ``"bgr"``, the order of the host's images.
        given: what enters the layer is no image but a latent or a noisy sample: q must be given. This is how its rows
            are expanded, ``"error"``, ``"interleave"`` or ``"tile"``; None: q is computed.
    """

    _is_impure = True  # torch.fx: a call without users that must stay

    def __init__(
        self,
        quality: QualityFunction,
        context: QualityContext,
        layer: str,
        in_chans: int = 3,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        channel_order: str = "rgb",
        given: str | None = None,
    ):
        super().__init__()
        self.quality = quality
        self.context = context
        self.layer = layer or "(the model itself)"
        self.in_chans = in_chans
        self.mean = tuple(mean) if mean is not None else None
        self.std = tuple(std) if std is not None else None
        self.channel_order = channel_order
        self.given = given
        self._range_checked = False

    def extra_repr(self) -> str:
        """Return the quality function, its width and the normalization, for ``print(model)``."""
        return f"{self.quality.name}, Q={self.quality.channels}, mean={self.mean}, std={self.std}"

    def attach(self, host: nn.Module, name: str = TAP_NAME) -> None:
        """Become a child of the layer ``host``, under a name of ``TAP_HOOKS``, and hook its calls."""
        before, after = TAP_HOOKS[name]
        host.add_module(name, self)
        host.register_forward_pre_hook(before, with_kwargs=True)
        host.register_forward_hook(after)

    @staticmethod
    def detach(host: nn.Module, name: str = TAP_NAME) -> QualityTap:
        """Undo :meth:`attach` and return the tap."""
        remove_hooks(host, *TAP_HOOKS[name])
        tap = host.get_submodule(name)
        assert isinstance(tap, QualityTap)
        delattr(host, name)
        return tap

    def forward(self, images: Tensor, observe: bool = False) -> Tensor:
        """Return ``images`` unchanged, since a layer that runs its children one after the other runs the tap too.

        The layer's hook lets it ``observe``, by a call of the module so that torch.fx keeps it.
        """
        if observe and called_whole(self, images, True) is None:
            self.observe(images)
        return images

    def observe(self, images: Tensor) -> None:
        """Compute q of the host's images (B, C, H, W), and start a forward pass with that q."""
        self._check(images)
        self.context.watch(self)
        if self.context.resume(images, self.layer):
            return
        q = self.context.given_q()
        if q is None and self.given is not None:
            raise QualityError(
                f"layer {self.layer!r} sees no degraded images but what is made of them, so the quality features must "
                "be given: call the network through its pipeline, or `with quac_plugins.use_q(model, q): …` with "
                f"q of shape (B, {self.context.channels}) of the degraded images"
            )
        if q is None:
            with full_precision(images):
                q = quality_of_each(self.quality, self.to_rgb(images), sizes_of(images))
        elif not can_expand(q.shape[0], images.shape[0], self.given or "error"):
            raise ValueError(
                f"layer {self.layer!r}: the given q has batch {q.shape[0]}, the images have batch {images.shape[0]}; "
                "where each image stands for several rows, give its q for each of them"
            )
        else:
            q = expand_rows(q, images.shape[0], self.given or "error")
        self.context.begin(q, images)

    def mark(self, output: Tensor) -> None:
        """Tell recomputations which forward pass the layer's output belongs to."""
        self.context.mark(output, tap=True)

    def to_rgb(self, images: Tensor) -> Tensor:
        """Convert the host's images to RGB (B, 3, H, W) in [0, 1], clamped, at least float32."""
        images = images if images.dtype in (torch.float32, torch.float64) else images.float()
        if not self.quality.needs_grad:
            images = images.detach()
        if self.mean is not None and self.std is not None:
            mean, std = (v * self.in_chans if len(v) == 1 else v for v in (self.mean, self.std))
            if len(set(mean)) == 1 and len(set(std)) == 1:
                images = images * std[0] + mean[0]
            else:
                channels = [images[:, i] * std[i] + mean[i] for i in range(min(self.in_chans, len(mean)))]
                images = torch.stack(channels, dim=1)
        self._check_range(images)
        if self.in_chans <= 2:
            images = images.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
        else:
            images = images[:, :3]
        return in_order(images, self.channel_order).clamp(0, 1)

    def _check(self, images: Tensor) -> None:
        tokens = isinstance(images, Tensor) and images.ndim == 3 and self.given is not None  # q is not that of images
        channel, axes = (2, 3) if tokens else (1, 4)
        if not isinstance(images, Tensor) or images.ndim != axes or images.shape[channel] != self.in_chans:
            got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            hint = " (a detector that takes a list: inject its backbone)" if isinstance(images, (list, tuple)) else ""
            like = f" or tokens (B, N, {self.in_chans})" if self.given is not None else ""
            raise ValueError(
                f"layer {self.layer!r} expects images of shape (B, {self.in_chans}, H, W){like}, got {got}{hint}"
            )
        if not images.is_floating_point():
            raise TypeError(
                f"layer {self.layer!r} expects floating point images, got {images.dtype}; "
                "convert with images.float() / 255 and normalize as the model expects"
            )

    def _check_range(self, images: Tensor) -> None:
        """Warn once if the images, without their normalization, are far from [0, 1]: then it was another one."""
        graph = compiling() or torch.jit.is_tracing() or type(images) is not Tensor
        if self._range_checked or graph or images.is_meta or images.numel() == 0:
            return
        self._range_checked = True
        try:
            low, high = (float(edge) for edge in torch.aminmax(images.detach()))
        except RuntimeError:  # under vmap and the like nobody may look
            return
        if self.mean is None and (low < -0.05 or high > 1.05):
            warnings.warn(
                f"images entering layer {self.layer!r} lie in [{low:.2f}, {high:.2f}], but no normalization was "
                "given, so the quality features are computed as if they were in [0, 1]. Give the mean and std that "
                "normalize them: QuACConfig(mean=…, std=…)",
                stacklevel=2,
            )
        elif self.mean is not None and (low < FAR[0] or high > FAR[1]):
            warnings.warn(
                f"images entering layer {self.layer!r} lie in [{low:.2f}, {high:.2f}] once mean={self.mean} and "
                f"std={self.std} are undone, far from [0, 1], so their quality features mean nothing. Divide pictures "
                "in 0..255 by 255 and normalize them, or give the mean and std that they come with: QuACConfig(mean=…, "
                "std=…)",
                stacklevel=2,
            )
