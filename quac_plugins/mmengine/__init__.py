"""The MMEngine door: QuAC and the degradation prior from the configs of mmpretrain, mmseg, mmdet and their kin.

``custom_imports = dict(imports=["quac_plugins.mmengine"])`` adds the names below to MMEngine's registries, and lets
every model that is built from a config be looked over once: activations that ``act_cfg`` names get their channels, and
the quality features the model's own normalization. Works with mmengine and with onedl-mmengine.
"""

try:
    import mmengine  # noqa: F401
except ImportError as error:
    raise ImportError(
        "quac_plugins.mmengine needs mmengine (or onedl-mmengine, its maintained fork): python -m pip install mmengine"
    ) from error

from quac_plugins.mmengine.activations import PLANNED, PlannedActivation
from quac_plugins.mmengine.backbones import build_prior_backbone, build_quac_backbone, build_quac_resnet
from quac_plugins.mmengine.building import look_over_models
from quac_plugins.mmengine.degradations import CorruptedDataset, CorruptImage, CorruptionAccuracy
from quac_plugins.mmengine.finishing import finish
from quac_plugins.mmengine.hooks import FitPriorHook
from quac_plugins.mmengine.initialization import keep_what_was_put_in
from quac_plugins.mmengine.language_models import leave_out_broken_language_models
from quac_plugins.mmengine.quality import Quality

__all__ = [
    "PLANNED",
    "CorruptImage",
    "CorruptedDataset",
    "CorruptionAccuracy",
    "FitPriorHook",
    "PlannedActivation",
    "Quality",
    "build_prior_backbone",
    "build_quac_backbone",
    "build_quac_resnet",
    "finish",
]

leave_out_broken_language_models()
look_over_models()
keep_what_was_put_in()
