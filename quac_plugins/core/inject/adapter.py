"""Adapters: only the parameters that were put in, with their config, saved apart from the host (PEFT's manner).

``adapter_config.json`` describes, ``adapter_model.safetensors`` holds the tensors under their names in the host's state
dict. Loading checks everything against the host before the host is touched.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from quac_plugins.core.activations.driver import EXPANSIONS
from quac_plugins.core.inject.config import QuACConfig, without_path
from quac_plugins.core.inject.sites import Site
from quac_plugins.core.inject.surgery import Injection, inject, injection_of, remove, unwrap

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
FORMAT = 1
_OF_HOST = re.compile(r"(widths\.\d+\.)?host\.")  # behind a site's name: parameters of the activation that it keeps
_LIMIT = 4 << 20  # bytes of a config: a list of sites is far below


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of what was put in, under their names in the host's state dict.

    Raises:
        ValueError: the model holds no QuAC.
    """
    prefixes = _record(model).prefixes()
    return {
        name: tensor
        for name, tensor in unwrap(model).state_dict().items()
        if any(name.startswith(prefix) and not _OF_HOST.match(name, len(prefix)) for prefix in prefixes)
    }


def save_adapter(model: nn.Module, folder: str | Path) -> Path:
    """Save what was put into a host: ``adapter_config.json`` and ``adapter_model.safetensors``.

    Both files are written beside and then renamed, so a folder never holds half an adapter.

    Args:
        model: a model with QuAC inside.
        folder: made if it does not exist.

    Returns:
        The folder.

    Raises:
        ValueError: the model holds no QuAC.

    Example:
        >>> import tempfile, timm, quac_plugins as quac
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sorted(p.name for p in quac.save_adapter(timm.create_model("test_resnet_qacon"), folder).iterdir())
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    record = _record(model)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter_state(model).items()}
    config = {
        "peft_type": "QUAC",
        "format": FORMAT,
        "config": record.config.to_dict(),
        "sites": [asdict(site) for site in record.sites],
        "tap": record.tap,
        "host": _host(model),
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".adapter-") as beside:
        save_file(state, Path(beside) / WEIGHTS_NAME, metadata={"format": "pt"})
        (Path(beside) / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for name in (WEIGHTS_NAME, CONFIG_NAME):
            os.replace(Path(beside) / name, folder / name)
    return folder


def load_adapter_folder(
    model: nn.Module, folder: Path, check_host: bool = True, example: Tensor | None = None
) -> nn.Module:
    """See :func:`quac_plugins.load_adapter`; from a local folder."""
    config, sites, host = _read_config(folder / CONFIG_NAME)
    state = _read_tensors(folder / WEIGHTS_NAME)
    name = _host(model)["architecture"]
    if check_host and host.get("architecture") != name:
        raise ValueError(
            f"the adapter in {folder} was made for {host.get('architecture')!r}, this host is {name!r} "
            "(load_adapter(…, check_host=False) tries all the same)"
        )
    record = injection_of(model)
    fresh = record is None
    if record is None:
        if _is_own(config):
            raise ValueError(
                f"the adapter in {folder} was made with the quality function {config.quality!r} of the user's own. Put "
                "it in first: inject(model, QuACConfig(quality=the function, …)), then load_adapter(model, …)"
            )
        inject(model, config, example)
        record = _record(model)
    try:
        _check(model, record, config, sites, state, folder)
    except ValueError:
        if fresh:
            remove(model)
        raise
    unwrap(model).load_state_dict(state, strict=False)
    return model


def _check(
    model: nn.Module, record: Injection, config: QuACConfig, sites: list[Site], state: dict[str, Tensor], folder: Path
) -> None:
    expected = adapter_state(model)
    problems = _differences(config, record.config)
    here, there = ({(site.name, site.after): site for site in of} for of in (record.sites, sites))
    problems += [f"site {name!r} is in the adapter, not in this host" for name, _ in sorted(there.keys() - here.keys())]
    problems += [f"site {name!r} is in this host, not in the adapter" for name, _ in sorted(here.keys() - there.keys())]
    problems += [
        f"site {key[0]!r} has its channels on axis {there[key].channel_dim}, in this host on {here[key].channel_dim}"
        for key in here
        if key in there and there[key].channel_dim != here[key].channel_dim
    ]
    problems += [f"missing tensor {name!r}" for name in expected if name not in state]
    problems += [f"surplus tensor {name!r}" for name in state if name not in expected]
    problems += [
        f"tensor {name!r} has shape {tuple(state[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    problems += [
        f"tensor {name!r} holds {state[name].dtype}, expected {tensor.dtype}"
        for name, tensor in expected.items()
        if name in state and state[name].is_floating_point() != tensor.is_floating_point()
    ]
    problems += [
        f"tensor {name!r} holds NaN or infinity"
        for name, tensor in state.items()
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
    ]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(
            f"the adapter in {folder} does not fit this host, which was left as it was: {'; '.join(problems[:5])}{more}"
        )


def _differences(there: QuACConfig, here: QuACConfig) -> list[str]:
    """What the tensors' shapes do not show: parameters of one activation, read by another, give wrong numbers."""
    fields = ["activation", "init"]
    if here.is_driven:
        fields += ["norm", "reduction"]
    if here.activation_class.needs_quality and isinstance(here.quality, str) and not _is_own(there):
        fields += ["quality"]
    if there.mean is not None:  # explicit there; otherwise each host brings its own, and q is that of the pictures
        fields += ["mean", "std"]
    if here.activation_class.needs_quality:
        fields += ["channel_order"]
    known = there.to_dict(), here.to_dict()
    pairs = [(field, known[0][field], known[1][field]) for field in fields]
    return [f"{field} is {a!r} in the adapter, {b!r} in this host" for field, a, b in pairs if a != b]


def _is_own(config: QuACConfig) -> bool:
    return isinstance(config.quality, str) and config.quality.startswith("callable:")


def _read_site(values: dict[str, Any]) -> Site:
    site = Site(**{**values, "channels": tuple(values["channels"])})
    if not (
        isinstance(site.name, str)
        and all(isinstance(width, int) for width in site.channels)
        and site.channel_dim in (1, -1)
        and site.expand_q in EXPANSIONS
        and isinstance(site.after, bool)
    ):
        raise ValueError(f"a site is {values!r}")
    return site


def _read_config(path: Path) -> tuple[QuACConfig, list[Site], dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"no adapter in {path.parent}: {path.name} is missing")
    if path.stat().st_size > _LIMIT:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; an adapter's config has at most {_LIMIT}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise TypeError(f"holds a {type(values).__name__}, not an object")
        if values.get("peft_type") != "QUAC":
            raise ValueError(f"peft_type is {values.get('peft_type')!r}, not 'QUAC'")
        if values.get("format") != FORMAT:
            raise ValueError(f"format is {values.get('format')!r}; this version reads {FORMAT}")
        sites = [_read_site(site) for site in values["sites"]]
        config = QuACConfig.from_dict(values["config"])
        if isinstance(config.quality, str):
            config.quality = without_path(config.quality)
        return config, sites, dict(values["host"])
    except (KeyError, TypeError, ValueError, RecursionError) as error:  # JSONDecodeError is a ValueError
        what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} is not an adapter's config: {what}") from error


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"no adapter in {path.parent}: {path.name} is missing")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from error


def _record(model: nn.Module) -> Injection:
    record = injection_of(model)
    if record is None:
        raise ValueError(f"{type(model).__name__} holds no QuAC; call quac_plugins.inject first")
    return record


def _host(model: nn.Module) -> dict[str, Any]:
    model = unwrap(model)
    cfg = getattr(model, "pretrained_cfg", None) or {}
    name = cfg.get("architecture") if isinstance(cfg, dict) else None
    if isinstance(name, str):
        name = name.removesuffix("_qacon")
    return {"architecture": name or type(model).__name__, "tag": cfg.get("tag") if isinstance(cfg, dict) else None}
