"""Identifying the host of an adapter: the architecture by name, the weights by a fingerprint."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from quac_plugins.core.host.facts import facts_of
from quac_plugins.core.inject.surgery import names_in_host, unwrap
from quac_plugins.core.naming import split_name

_PRECISIONS = (torch.float16, torch.bfloat16)


def describe_host(model: nn.Module) -> dict[str, Any]:
    """Return architecture, class, tag and fingerprint of a host, whatever was injected."""
    model = unwrap(model)
    facts = facts_of(model)
    cls = getattr(model, "host_class", type(model))  # a door's class of hosts with QuAC inside names that of the host
    return {
        "architecture": split_name(facts.architecture)[0] if facts.architecture else cls.__name__,
        "class": f"{cls.__module__}.{cls.__qualname__}",
        "tag": facts.tag,
        "fingerprint": fingerprint(model),
    }


def fingerprint(model: nn.Module) -> str | None:
    """Return a hash of the host's own weights, without injected ones; None on the meta device.

    The host's classifier does not count: other classes need a new classifier over the same features. The hash has a
    part for each half precision, so that :func:`same_weights` finds a float32 host and its half precision copy equal.

    Example:
        >>> import timm, quac_plugins as quac
        >>> host = timm.create_model("test_resnet")
        >>> before = fingerprint(host)
        >>> before == fingerprint(quac.inject(host, quac.PriorConfig()))
        True
        >>> same_weights(before, fingerprint(host.bfloat16()))
        True
    """
    model = unwrap(model)
    in_host = names_in_host(model)
    named = ((in_host(name), tensor) for name, tensor in model.state_dict().items())
    head = tuple(f"{name}." for name in facts_of(model).classifiers)
    tensors = {
        n: t for n, t in named if n and not n.startswith(head) and isinstance(t, Tensor) and t.is_floating_point()
    }
    if any(tensor.is_meta for tensor in tensors.values()):
        return None
    digests = [hashlib.sha256() for _ in _PRECISIONS]
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu()
        for digest, precision in zip(digests, _PRECISIONS, strict=True):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.to(precision).contiguous().flatten().view(torch.uint8).numpy().data)
    return "-".join(digest.hexdigest()[:16] for digest in digests)


def same_weights(first: Any, second: Any) -> bool:
    """Return whether two fingerprints may be of the same weights: one precision's parts agree, or one is None."""
    if first is None or second is None:
        return True
    return not set(str(first).split("-")).isdisjoint(str(second).split("-"))
