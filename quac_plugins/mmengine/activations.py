"""Activations for ``act_cfg``, which MMEngine builds without a number of channels.

``dict(type="QACON", quality="brisque")`` builds a plan. Behind a layer whose width is plain (mmcv's ConvModule, a
Sequential) the plan becomes the activation at once; elsewhere when the whole model has been built, from a trace of its
calls. Both happen before an optimizer asks for parameters.
"""

from __future__ import annotations

from typing import Any

from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from quac_plugins.core.activations import ACTIVATIONS, ChannelActivation
from quac_plugins.core.inject import QuACConfig
from quac_plugins.core.quality.context import QualityContext
from quac_plugins.core.quality.registry import resolve_quality

PLAN = "_quac_plan"  # attribute of an activation that came from a plan


class PlannedActivation(nn.Module):
    """An activation that waits for its number of channels.

    Args:
        activation: the name of the activation.
        host: the config of the host's activation, whose outputs are preserved.
        inplace: ignored; mmcv gives it to every activation.
        **options: ``quality``, ``init``, ``norm`` (here ``"layer"``), ``reduction``, … of
            :class:`quac_plugins.QuACConfig`; ``channel_order="rgb"`` for pictures that are read as RGB.

    Raises:
        TypeError: an option has a wrong type.
        ValueError: an option is unknown, or its value is wrong.
    """

    def __init__(self, activation: str, host: Any = None, inplace: bool = False, **options: Any):
        super().__init__()
        self.config = planned_config(activation, options)
        self.channel_order = options.get("channel_order")  # None: the data preprocessor lets guess it
        self.host = host or {"type": "ReLU"}

    def build_host(self) -> nn.Module:
        """Build the host's activation."""
        return MODELS.build(self.host)

    def sized(self, channels: int) -> ChannelActivation:
        """Build the activation for ``channels``, with a context of its own until a model's tap takes it over."""
        config = self.config
        arguments: dict[str, Any] = {}
        if config.is_driven:
            arguments = {"norm": config.norm, "reduction": config.reduction}
        context = None
        if config.activation_class.needs_quality:
            quality = resolve_quality(config.quality, config.quality_channels, config.quality_grad)
            context = QualityContext(quality.channels)
            arguments |= {"quality_channels": quality.channels, "expand_q": config.expand_q}
        activation = config.activation_class(channels, init=config.init, host=self.build_host(), **arguments)
        activation.context = context
        setattr(activation, PLAN, (self,))  # in a tuple, so that it is no child
        return activation

    def forward(self, x: Tensor) -> Tensor:
        """Raise a RuntimeError: the activation has no channels yet."""
        raise RuntimeError(
            f"act_cfg=dict(type={type(self).__name__!r}): its number of channels is not known here. Build the model "
            "from a config (MODELS.build, Runner), or call quac_plugins.mmengine.finish(model) before its optimizer is "
            "built"
        )

    def extra_repr(self) -> str:
        """Return the activation and its options, for ``print(model)``."""
        return f"{self.config.activation}, quality={self.config.quality!r}, channels not known yet"


def planned_config(activation: str, options: dict[str, Any]) -> QuACConfig:
    """Return the options of an ``act_cfg`` as a config; a ValueError names unknown ones."""
    known = ("quality", "init", "norm", "reduction", "quality_grad", "quality_channels", "expand_q", "channel_order")
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"unknown {', '.join(unknown)}; known: {', '.join(known)}, host")
    return QuACConfig(**{"norm": "layer", **options, "activation": activation, "where": "all"})


def plan_of(module: nn.Module) -> PlannedActivation | None:
    """Return the plan that a module is, or from which it was made; None for other modules."""
    return module if isinstance(module, PlannedActivation) else getattr(module, PLAN, (None,))[0]


def _type_of(name: str, cls_name: str) -> type[PlannedActivation]:
    def __init__(self: PlannedActivation, **options: Any) -> None:
        PlannedActivation.__init__(self, name, **options)

    doc = f"``act_cfg=dict(type={cls_name!r})``; see :class:`PlannedActivation`."
    cls = type(cls_name, (PlannedActivation,), {"__init__": __init__, "__doc__": doc, "__module__": __name__})
    MODELS.register_module(name=cls_name, module=cls, force=True)
    globals()[cls_name] = cls  # for pickle, and for configs that import it
    return cls


PLANNED = {cls.__name__: _type_of(name, cls.__name__) for name, cls in ACTIVATIONS.items()}
"""Name in the registry → class, for every activation there is."""


def _give_channels(parent: nn.Module, name: str, child: Any) -> nn.Module | None:
    """Turn a plan into its activation if its layer's width is plain; torch calls this hook for each new child."""
    if not isinstance(child, PlannedActivation):
        return None
    order = getattr(parent, "order", ())  # of mmcv's ConvModule
    if "act" in order and "conv" in order and order.index("act") < order.index("conv"):
        return child.sized(parent.get_submodule("conv").in_channels)  # type: ignore[arg-type]
    widths = {width for layer in parent.children() if (width := _width(layer)) is not None}
    return child.sized(widths.pop()) if len(widths) == 1 else None


def _width(layer: nn.Module) -> int | None:
    for attribute in ("out_channels", "out_features", "num_features", "num_channels"):
        width = getattr(layer, attribute, None)
        if isinstance(width, int):
            return width
    return None


register_module_module_registration_hook(_give_channels)  # type: ignore[arg-type]
