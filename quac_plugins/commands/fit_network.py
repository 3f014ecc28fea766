"""Building the network of a fit: a host by name, with the modules to fit inside."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def build_network(
    name: str,
    wanted: set[str],
    *,
    adapter: str | None = None,
    prior: dict[str, Any] | None = None,
    said: list[str] | None = None,
    model_kwargs: dict[str, Any] | None = None,
    seed: int = 0,
    **options: Any,
) -> nn.Module:
    """Build a host, and inject the modules that its name, an adapter and the fit ask for.

    Args:
        name: a name of timm, with or without ``_qacon``, ``_ddp`` or ``_qacon_ddp``; or ``hf-hub:…``, ``local-dir:…``.
        wanted: the required parts: ``"quac"``, ``"prior"`` or both.
        adapter: an adapter, which is loaded first.
        prior: fields of the `PriorConfig` of a new prior.
        said: options of the command line about the prior, which are refused if the adapter holds the prior.
        model_kwargs: arguments of timm, `QuACConfig` and `PriorConfig`.
        seed: the seed of the injected modules.
        **options: arguments of `quac_plugins.evaluate.building.build_model`.

    Raises:
        ValueError: an option describes modules that the adapter already holds.
    """
    import torch

    from quac_plugins import PriorConfig, QuACConfig, inject, injection_of
    from quac_plugins.core.naming import split_name
    from quac_plugins.evaluate.building import build_model
    from quac_plugins.evaluate.preprocessing import data_config
    from quac_plugins.timm import OPTIONS, PRIOR_OPTIONS

    name, suffix = split_name(name)
    wanted = wanted | {what for what, word in (("quac", "_qacon"), ("prior", "_ddp")) if word in suffix}
    kwargs = dict(model_kwargs or {})
    of_quac = {key: kwargs[key] for key in OPTIONS if key in kwargs} if "quac" in wanted else {}
    of_prior = {key: kwargs[key] for key in (*PRIOR_OPTIONS, "quality") if key in kwargs} if "prior" in wanted else {}
    kwargs = {key: value for key, value in kwargs.items() if key not in of_quac and key not in of_prior}
    torch.manual_seed(seed)
    network = build_model(name, adapter=adapter, model_kwargs=kwargs, **options)
    record = injection_of(network)
    size = data_config(network, input_size=options.get("input_size"))["input_size"][-2:]
    example = torch.empty(1, 3, *size)
    torch.manual_seed(seed)
    for what, expected, keys in (
        ("quac", record is not None and record.config is not None, list(of_quac)),
        ("prior", record is not None and record.prior is not None, [*of_prior, *(said or [])]),
    ):
        if expected and [key for key in keys if key != "quality"]:
            source = f"the adapter {adapter}" if adapter is not None else name
            raise ValueError(f"{source} says itself what is put in: leave out {', '.join(dict.fromkeys(keys))}")
        if what in wanted and not expected:
            inject(
                network,
                QuACConfig(**of_quac) if what == "quac" else PriorConfig(**{**of_prior, **(prior or {})}),
                example,
            )
    return network


def labelled_files(images: Path, network: nn.Module, limit: int | None, seed: int, class_map: Path | None) -> list[Any]:
    """Return pairs (file, class index) of a folder of folders of classes, at most ``limit``, spread over classes."""
    from quac_plugins.evaluate.data import CLEAN, ImageDirectory

    directory = ImageDirectory(images, getattr(network, "num_classes", None), class_map)
    if directory.is_imagenet_c:
        raise ValueError(f"--labels: {images} is laid out as ImageNet-C; give a folder of folders of classes")
    return [(item.path, item.target) for item in directory.limited(limit, seed)[CLEAN]]
