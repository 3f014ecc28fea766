"""The shapes that activations have for given images: what to draw."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from quac_plugins.core.activations.base import ChannelActivation


@torch.no_grad()
def activation_curves(model: nn.Module, layers: list[str], run: Callable[[], Any], x: Tensor) -> dict[str, Tensor]:
    """Compute y(x) for every channel of some activations and every image of a forward pass.

    Args:
        model: a model with activations of this package inside.
        layers: names of these activations.
        run: runs the forward pass; of several calls of a layer the last counts.
        x: (N,), the points at which the curves are computed.

    Returns:
        Name of the layer → (B, C, N); B is 1 where the parameters are the same for all images.

    Raises:
        TypeError: a layer is no activation of this package.

    Example:
        >>> import timm, quac_plugins as quac
        >>> model = timm.create_model("test_resnet_qacon").eval()
        >>> layer = quac.injection_of(model).sites[0].name
        >>> images, x = torch.rand(2, 3, 64, 64), torch.linspace(-4, 4, 9)
        >>> curves = activation_curves(model, [layer], lambda: model(images), x)
        >>> curves[layer].shape[0], curves[layer].shape[2]
        (2, 9)
    """
    curves: dict[str, Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(site: Any, args: tuple, output: Any) -> None:
            values = [v.flatten(1) if v.ndim > 1 else v[None] for v in site.values(args[0], None)]
            at = x.to(args[0].device)
            y = site.equation(at, *(value[..., None] for value in values))
            if site.host is not None:
                y = site.host(at) + y - site.equation(at, *(at.new_tensor([value]) for value in site.neutral))
            curves[name] = y.expand(-1, site.channels, -1)

        return hook

    handles = []
    for name in layers:
        site = model.get_submodule(name)
        if not isinstance(site, ChannelActivation):
            raise TypeError(f"{name!r} is a {type(site).__name__}, no activation of this package")
        handles.append(site.register_forward_hook(note(name)))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return curves
