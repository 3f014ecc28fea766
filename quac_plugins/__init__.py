"""Quality-adaptive activations (QuAC) for the networks people already use.

Importing it registers ``NAME_qacon`` with timm for every architecture:

    >>> import timm, torch, quac_plugins
    >>> model = timm.create_model("test_resnet_qacon", num_classes=10).eval()
    >>> model(torch.rand(1, 3, 64, 64)).shape
    torch.Size([1, 10])
"""

from quac_plugins import functional
from quac_plugins import timm as _timm_door
from quac_plugins.core.activations import (
    ACTIVATIONS,
    QACON,
    QGELU,
    AconC,
    ChannelActivation,
    MetaACON,
    QPReLU,
    QSwish,
    QualityDriven,
)
from quac_plugins.core.inject import Injection, QuACConfig, inject, injection_of, remove
from quac_plugins.core.inject.adapter import adapter_state, save_adapter
from quac_plugins.core.quality import QualityFunction, quality_function, quality_names, resolve_quality
from quac_plugins.core.quality.brisque import brisque
from quac_plugins.core.quality.context import QualityError, quality_of
from quac_plugins.hub import load_adapter
from quac_plugins.registry import registry_file

__version__ = "0.1.0"

__all__ = [
    "ACTIVATIONS",
    "QACON",
    "QGELU",
    "AconC",
    "ChannelActivation",
    "Injection",
    "MetaACON",
    "QPReLU",
    "QSwish",
    "QuACConfig",
    "QualityDriven",
    "QualityError",
    "QualityFunction",
    "adapter_state",
    "brisque",
    "functional",
    "inject",
    "injection_of",
    "load_adapter",
    "quality_function",
    "quality_names",
    "quality_of",
    "registry_file",
    "remove",
    "resolve_quality",
    "save_adapter",
]

_timm_door.register()
