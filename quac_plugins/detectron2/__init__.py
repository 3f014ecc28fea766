"""The detectron2 door: QuAC and the degradation prior from a yacs or a lazy config.

Importing it adds the backbones ``build_quac_…`` to BACKBONE_REGISTRY and ``QuACGeneralizedRCNN`` to META_ARCH_REGISTRY,
and lets every ``ImageList`` note the sizes of its images without padding, since q is computed without the padding.
"""

try:
    import detectron2  # noqa: F401
except ImportError as error:
    raise ImportError(
        "quac_plugins.detectron2 needs detectron2 0.6, which its authors publish as source only: "
        "python -m pip install --no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git'"
    ) from error

from detectron2.structures import ImageList

from quac_plugins.core.quality.padding import let_lists_note_sizes
from quac_plugins.detectron2.backbones import (
    TimmBackbone,
    build_quac_resnet_backbone,
    build_quac_resnet_fpn_backbone,
    build_quac_retinanet_resnet_fpn_backbone,
    build_quac_timm_fpn_backbone,
    with_quac,
)
from quac_plugins.detectron2.blocks import (
    ActBasicBlock,
    ActBasicStem,
    ActBottleneckBlock,
    ActDeformBottleneckBlock,
    with_activations,
)
from quac_plugins.detectron2.config import add_quac_config
from quac_plugins.detectron2.degradations import CorruptImage
from quac_plugins.detectron2.heads import QuACGeneralizedRCNN, inject_heads

__all__ = [
    "ActBasicBlock",
    "ActBasicStem",
    "ActBottleneckBlock",
    "ActDeformBottleneckBlock",
    "CorruptImage",
    "QuACGeneralizedRCNN",
    "TimmBackbone",
    "add_quac_config",
    "build_quac_resnet_backbone",
    "build_quac_resnet_fpn_backbone",
    "build_quac_retinanet_resnet_fpn_backbone",
    "build_quac_timm_fpn_backbone",
    "inject_heads",
    "with_activations",
    "with_quac",
]

let_lists_note_sizes(ImageList)
