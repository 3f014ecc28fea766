"""The diffusers door: QuAC inside networks and pipelines of diffusers, and a restoration pipeline.

``quac_plugins.diffusers.models`` has a class with QuAC inside for every network of diffusers, named ``QuAC…``.
"""

try:
    import diffusers
except ImportError as error:
    raise ImportError(
        "quac_plugins.diffusers needs diffusers: python -m pip install 'quac-plugins[diffusers]'"
    ) from error

from quac_plugins.diffusers.blocks import with_activations, without_activations
from quac_plugins.diffusers.existing import add_quac
from quac_plugins.diffusers.models import (
    QuACUNet2DConditionModel,
    QuACUNet2DModel,
    add_to_model,
    quac_class,
)
from quac_plugins.diffusers.pipeline import QuACRestorationPipeline

__all__ = [
    "QuACRestorationPipeline",
    "QuACUNet2DConditionModel",
    "QuACUNet2DModel",
    "add_quac",
    "add_to_model",
    "quac_class",
    "with_activations",
    "without_activations",
]

diffusers.QuACRestorationPipeline = QuACRestorationPipeline  # where DiffusionPipeline.from_pretrained looks for it
