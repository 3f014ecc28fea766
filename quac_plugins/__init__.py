"""Quality-adaptive activations (QuAC) and degradation priors for the networks people already use.

Importing it registers ``NAME_qacon``, ``NAME_ddp`` and ``NAME_qacon_ddp`` with timm for every architecture:

    >>> import timm, torch, quac_plugins
    >>> model = timm.create_model("test_resnet_qacon", num_classes=10).eval()
    >>> model(torch.rand(1, 3, 64, 64)).shape
    torch.Size([1, 10])
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from quac_plugins import functional
from quac_plugins import timm as _timm_door
from quac_plugins import timm_facts as _timm_facts  # noqa: F401  (what hosts say of themselves)
from quac_plugins import torchvision as _torchvision_door  # noqa: F401  (notes the sizes of images in batches)
from quac_plugins import transformers_facts as _transformers_facts  # noqa: F401
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
from quac_plugins.core.deprecated import moved
from quac_plugins.core.inject import Injection, PriorConfig, QuACConfig, fuse, inject, injection_of, remove
from quac_plugins.core.inject.adapter import adapter_state, save_adapter
from quac_plugins.core.prior.fdm import FDM, FDMS
from quac_plugins.core.quality import QualityFunction, quality_function, quality_names, resolve_quality
from quac_plugins.core.quality.brisque import brisque
from quac_plugins.core.quality.brisque_tone import brisque_tone
from quac_plugins.core.quality.context import QualityError
from quac_plugins.core.quality.degradation import degradation
from quac_plugins.core.quality.given import use_q
from quac_plugins.core.restore import RestoreThen, restore_then
from quac_plugins.hub.load import load_adapter
from quac_plugins.registry import registry_file

if TYPE_CHECKING:
    from quac_plugins.deploy import export
    from quac_plugins.fit import FitReport, Recipe, fit_prior, fit_qacon
    from quac_plugins.hub.fetch import pull
    from quac_plugins.hub.push import Pushed, push

__version__ = "0.1.0"

__all__ = [
    "ACTIVATIONS",
    "FDM",
    "FDMS",
    "QACON",
    "QGELU",
    "AconC",
    "ChannelActivation",
    "FitReport",
    "Injection",
    "MetaACON",
    "PriorConfig",
    "Pushed",
    "QPReLU",
    "QSwish",
    "QuACConfig",
    "QualityDriven",
    "QualityError",
    "QualityFunction",
    "Recipe",
    "RestoreThen",
    "adapter_state",
    "brisque",
    "brisque_tone",
    "degradation",
    "export",
    "fit_prior",
    "fit_qacon",
    "functional",
    "fuse",
    "inject",
    "injection_of",
    "load_adapter",
    "pull",
    "push",
    "quality_function",
    "quality_names",
    "registry_file",
    "remove",
    "resolve_quality",
    "restore_then",
    "save_adapter",
    "use_q",
]

# imported when they are asked for: name → module
_LATER = dict.fromkeys(("FitReport", "Recipe", "fit_prior", "fit_qacon"), "quac_plugins.fit")
_LATER |= {"export": "quac_plugins.deploy"}
_LATER |= {"Pushed": "quac_plugins.hub.push", "push": "quac_plugins.hub.push", "pull": "quac_plugins.hub.fetch"}


def _import_later(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LATER[name]), name)


__getattr__ = moved(__name__, _import_later, quality_of="quac_plugins:use_q")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})


_timm_door.register()
