"""Folding batch norms of the activations' drivers into the layers before them: fewer operations at inference."""

from __future__ import annotations

from dataclasses import replace

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from quac_plugins.core.activations.driver import DrivenActivation, Pointwise
from quac_plugins.core.inject.surgery import injection_of, unwrap


def fuse(model: nn.Module) -> nn.Module:
    """Fold the drivers' batch norms into the layers before them, in place; the outputs stay, but for rounding.

    For inference: from then on the drivers have no norm, as with ``norm="none"``, and adapters are saved and loaded as
    those. Norms of other kinds depend on the input and stay. The host's own layers are not touched.

    Args:
        model: with quality-adaptive activations inside, in eval mode, or one of the activations itself.

    Returns:
        The same model.

    Raises:
        ValueError: it is training, holds no driven activations, or a driver's layers are not plain ones (parametrized
            or quantized); nothing was changed then.

    Example:
        >>> import timm, torch, quac_plugins as quac
        >>> model, images = timm.create_model("test_resnet_qacon").eval(), torch.rand(2, 3, 64, 64)
        >>> expected = model(images)
        >>> torch.allclose(quac.fuse(model)(images), expected, atol=1e-5)
        True
    """
    found = {name: m for name, m in model.named_modules() if isinstance(m, DrivenActivation)}
    if not found:
        raise ValueError(f"{type(model).__name__} holds no activations with a driver; there is nothing to fuse")
    normed = {name: module for name, module in found.items() if module.norm == "batch"}
    for name, module in normed.items():
        what = f"{name or type(module).__name__!r}"
        if module.training:
            raise ValueError(
                f"the activation {what} is training, where batch norms follow the batch; model.eval() first"
            )
        for conv, bn in ((module.fc1, module.bn1), (module.fc2, module.bn2)):
            if type(conv) not in (Pointwise, nn.Conv2d) or not isinstance(bn, nn.modules.batchnorm._BatchNorm):
                names = f"{type(conv).__name__}, {type(bn).__name__}"
                raise ValueError(
                    f"the driver of {what} is not made of plain layers ({names}); take off what was put on"
                )
            if bn.running_mean is None:
                raise ValueError(f"a batch norm of {what} keeps no statistics; it cannot be folded")
    for module in normed.values():
        for layer, norm in (("fc1", "bn1"), ("fc2", "bn2")):
            setattr(module, layer, fuse_conv_bn_eval(getattr(module, layer), getattr(module, norm)))
            setattr(module, norm, nn.Identity())
        module.norm = "none"
    record = injection_of(unwrap(model))
    if record is not None and record.config is not None and record.config.norm == "batch":
        record.config = replace(record.config, norm="none")
        if record.changed is not None:
            record.changed(unwrap(model))
    return model
