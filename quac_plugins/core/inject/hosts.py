"""Which modules of a host are activations: class names tell, so that no framework needs to be imported.

Gates are not activations: a sigmoid or hard sigmoid that weighs another tensor is left alone.
"""

from __future__ import annotations

from torch import nn

HOST_ACTIVATIONS = frozenset(
    {
        "GELU",
        "GELUActivation",
        "SiLU",
        "SiLUActivation",
        "Swish",
        "SwishJit",
        "SwishMe",
        "CELU",
        "ELU",
        "FastGELUActivation",
        "GELUTanh",
        "HSwish",
        "HardMish",
        "HardMishJit",
        "HardMishMe",
        "HardSwish",
        "HardSwishJit",
        "HardSwishMe",
        "Hardswish",
        "LeakyReLU",
        "Mish",
        "MishJit",
        "MishMe",
        "NewGELUActivation",
        "PReLU",
        "PytorchGELUTanh",
        "QuickGELU",
        "QuickGELUActivation",
        "RReLU",
        "ReLU",
        "ReLU6",
        "SELU",
        "ScaledGELU",
        "Softplus",
        "SquaredReLU",
        "ReLUSquared",
        "ReLUSquaredActivation",
        "StarReLU",
    }
)


def is_activation(module: nn.Module) -> bool:
    """Return whether a module of a host is an activation that can be replaced.

    Example:
        >>> is_activation(nn.ReLU6()), is_activation(nn.Sigmoid())
        (True, False)
    """
    # a projection with its activation may bear the name of the latter, as diffusers' GELU does
    leaf = all(name.startswith("quac_") for name in module._modules)
    return leaf and type(module).__name__ in HOST_ACTIVATIONS
