"""Build the network that a command line names, with weights from timm, from a file, or from an adapter."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import load_state_dict
from torch import nn

from quac_plugins.core.inject.adapter_files import read_adapter
from quac_plugins.core.inject.images import Images
from quac_plugins.core.naming import split_name
from quac_plugins.evaluate.preprocessing import per_channel, square_or_not

__all__ = ["build_model"]


def build_model(
    name: str,
    *,
    base_checkpoint: str | os.PathLike[str] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    adapter: str | Path | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    num_classes: int | None = None,
    input_size: int | Sequence[int] | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    pretrained: bool | None = None,
) -> nn.Module:
    """Build a classifier by name, in float32 and in evaluation mode.

    Args:
        name: a name of `timm.create_model`: ``resnet18``, ``resnet50_qacon.a1_in1k``, ``hf-hub:…``, ``local-dir:…``.
        base_checkpoint: a file with the weights of the host (safetensors, or a torch file, read with
            ``weights_only``). It stands in for the download of ``pretrained=True``: for a name with ``_qacon``
            it fills the host before modules are put in.
        checkpoint: such a file with the weights of the whole network, loaded strictly at the end.
        adapter: a source of `quac_plugins.load_adapter`: a directory, or ``org/name`` of the Hub. The adapter names
            the modules to inject, so ``NAME_qacon`` and ``NAME_ddp`` then mean ``NAME``, unless ``model_kwargs`` hold
            their options. It also gives ``mean``, ``std`` and ``input_size`` where these are None.
        model_kwargs: further arguments of `timm.create_model`.
        num_classes: the number of classes of the classifier. A file must have the same number.
        input_size: a side or (H, W), at which the network is evaluated; networks for one size get it as ``img_size``.
        mean: the mean of the normalization, written into the network's config, for modules that read the image.
        std: the standard deviation of the normalization, written likewise.
        pretrained: whether timm loads its weights. None: only if no file is given.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a file holds no tensors, or its tensors do not fit the network, or arguments exclude each other.
        RuntimeError: timm does not know the name, or has no weights for it.
    """
    import quac_plugins  # registers the names
    from quac_plugins.hub.load import find_adapter
    from quac_plugins.timm import OPTIONS, PRIOR_OPTIONS

    for path in (base_checkpoint, checkpoint):
        if path is not None and not Path(path).is_file():
            raise FileNotFoundError(f"there is no checkpoint {path}")
    if base_checkpoint is not None and pretrained is False:
        raise ValueError("a base checkpoint takes the place of pretrained weights: leave --no-pretrained out")
    if pretrained is None:
        pretrained = checkpoint is None
    kwargs: dict[str, Any] = dict(model_kwargs or {})
    if adapter is not None and not set(kwargs) & {*OPTIONS, *PRIOR_OPTIONS}:
        name = split_name(name)[0]
    if adapter is not None:
        adapter = find_adapter(adapter)
        images = read_adapter(adapter)[0].images or Images()
        if mean is None and std is None and images.normalization is not None:
            mean, std = images.normalization
        input_size = input_size or images.settings.get("input_size")
    if num_classes is not None:
        kwargs["num_classes"] = num_classes
    if input_size is not None and _built_for_one_size(name):
        kwargs.setdefault("img_size", square_or_not(input_size))
    overlay = {key: per_channel(value, key) for key, value in (("mean", mean), ("std", std)) if value is not None}
    if base_checkpoint is not None:
        pretrained = True
        overlay |= _source(base_checkpoint, kwargs.get("num_classes"))
    if overlay:
        kwargs["pretrained_cfg_overlay"] = overlay
    with _explained(base_checkpoint or "timm's weights", name):
        model = timm.create_model(name, pretrained=pretrained, **kwargs)
    if adapter is not None:
        model = quac_plugins.load_adapter(model, adapter)
    if checkpoint is not None:
        with _explained(checkpoint, name):
            model.load_state_dict(_tensors(checkpoint), strict=True)
    return model.float().eval()


def _source(path: str | os.PathLike[str], num_classes: int | None) -> dict[str, Any]:
    """Describe the file to timm, which would else drop a classifier of another size than its own without a word."""
    overlay: dict[str, Any] = {"file": os.fspath(path), "source": None}
    if num_classes is not None:
        overlay["num_classes"] = num_classes
    if not os.fspath(path).endswith((".npz", ".npy")):
        overlay["custom_load"] = False
        _tensors(path)
    return overlay


def _tensors(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    try:
        state = load_state_dict(os.fspath(path))
    except OSError:
        raise
    except Exception as error:  # broken files make the readers raise anything
        raise ValueError(f"{path} is no file of weights that can be loaded safely: {_first_line(error)}") from error
    wrong = [key for key, value in state.items() if not isinstance(value, torch.Tensor)]
    if wrong or not state:
        raise ValueError(f"{path} holds no state dict: {f'{wrong[0]!r} is no tensor' if wrong else 'it is empty'}")
    return state


@contextlib.contextmanager
def _explained(path: str | os.PathLike[str], name: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, KeyError) as error:
        text = str(error)
        if isinstance(error, RuntimeError) and "state_dict" not in text:
            raise
        raise ValueError(f"the weights in {path} do not fit {name}: {_gist(text)}") from error


def _gist(text: str, most: int = 400) -> str:
    """Put torch's list of keys on one line, cut to a readable length."""
    lines = [line.strip() for line in text.splitlines()[1:] if line.strip()] or [text]
    return " ".join(line if len(line) <= most else line[:most] + " …" for line in lines[:4])


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _built_for_one_size(name: str) -> bool:
    config = None
    with contextlib.suppress(RuntimeError, ValueError):
        config = timm.get_pretrained_cfg(name)
    return bool(config and config.fixed_input_size)
