"""Lending a network to a run, and describing it, so that two networks of one name can be told apart."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from quac_plugins.core.inject import injection_of
from quac_plugins.core.inject.adapter import adapter_state
from quac_plugins.core.inject.fingerprint import describe_host
from quac_plugins.core.inject.surgery import unwrap

__all__ = ["describe_network", "device_of", "lent"]


def describe_network(model: nn.Module) -> dict[str, Any]:
    """Describe a network by its numbers, in plain types.

    Args:
        model: any network, also inside DataParallel and the like.

    Returns:
        ``host``: architecture, class, tag and fingerprint of the host alone; ``weights``: the SHA-256 of all tensors
        with their names; ``inside``: None, or the injection: ``sha256``, the hash of the ``adapter_model.safetensors``
        that `quac_plugins.save_adapter` would write now (None if a part is missing), and for ``activations`` and
        ``prior`` their ``config`` and the names of their ``sites``.

    Example:
        >>> import timm, quac_plugins
        >>> network = describe_network(timm.create_model("test_resnet_qacon"))
        >>> network["host"]["architecture"], network["inside"]["activations"]["config"]["activation"]
        ('test_resnet', 'qacon')
    """
    inside = None
    record = injection_of(model)
    if record is not None:
        inside = {"sha256": _as_saved(model), "activations": _part(record), "prior": _part(record.prior)}
    return {"host": describe_host(model), "weights": _digest(unwrap(model).state_dict().items()), "inside": inside}


def _as_saved(model: nn.Module) -> str | None:
    with contextlib.suppress(RuntimeError, ValueError):  # a network that is cut down can be judged, but not saved
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter_state(model).items()}
        return hashlib.sha256(safetensors.torch.save(state, metadata={"format": "pt"})).hexdigest()
    return None


def _part(part: Any) -> dict[str, Any] | None:
    if part is None or part.config is None:
        return None
    return {"config": part.config.to_dict(), "sites": [site.name for site in part.sites]}


def _digest(named: Iterable[tuple[str, Any]]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(named, key=lambda pair: pair[0]):
        digest.update(name.encode())
        _add(digest, value)
    return digest.hexdigest()


def _add(digest: Any, value: Any) -> None:
    if isinstance(value, (tuple, list)):  # the packed weights of a quantized layer
        for item in value:
            _add(digest, item)
    elif isinstance(value, Tensor) and not value.is_meta:
        tensor = value.dequantize() if value.is_quantized else value
        digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    else:
        digest.update(repr(value).encode())


def device_of(model: nn.Module, device: str | torch.device | None = None) -> torch.device:
    """Return the device; for None, the model's device."""
    parameter = next(model.parameters(), None)
    home = torch.device("cpu") if parameter is None else parameter.device
    return home if device is None else torch.device(device)


@contextlib.contextmanager
def lent(model: nn.Module, device: str | torch.device | None) -> Iterator[torch.device]:
    """Put the model on the device and into evaluation; put everything back afterwards, torch's generators too."""
    home, where = device_of(model), device_of(model, device)
    modes = {module: module.training for module in model.modules()}
    with torch.random.fork_rng(devices=[d for d in (where,) if d.type == "cuda"]):
        try:
            model.to(where).eval()
            yield where
        finally:
            model.to(home)
            for module, mode in modes.items():
                module.training = mode
