"""One shape-propagating forward pass: what every activation of a host is given, and which layer sees the image first.

The pass runs on fake tensors, so it costs no memory and little time, with a large prime for the batch: an axis whose
size it divides is the axis that holds the images. Each tensor that depends on the image carries a label (which axis
holds the channels, which the images and in which order, and the size of the last convolution), which every operation
hands on. Hosts that fake tensors cannot run are run for real on a small batch instead.
"""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from quac_plugins.core.activations.hosts import is_activation

_BATCH = 10007  # prime, larger than any axis of a network, so that it divides no other


@dataclass(frozen=True)
class _Label:
    batch: int  # axis that holds the images
    fold: str | None = None  # other things on that axis too: images outside ("interleave"), inside ("tile"), or "mixed"
    channel: int | None = None
    kernel: int | None = None  # of the last convolution (1 for linear), None after sums of branches and activations


@dataclass
class Call:
    """One call of an activation: what it was given."""

    shape: tuple[int, ...]
    channel_dim: int
    channels: int
    kernel: int
    batch_axis: int
    fold: str | None


@dataclass
class Trace:
    """What a pass showed.

    Attributes:
        calls: module name → its calls with a tensor that depends on the image.
        tap: name of the first layer that sees the image.
        in_chans: channels of the image.
        last: name of the module whose output is the backbone's, and a Call that describes it.
    """

    calls: dict[str, list[Call]] = field(default_factory=dict)
    tap: str | None = None
    in_chans: int = 3
    last: tuple[str, Call] | None = None


class _Labels(TorchDispatchMode):
    """Hands labels from the inputs of every operation to its outputs."""

    def __init__(self, batch: int):
        super().__init__()
        self.batch = batch

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[override]
        out = func(*args, **(kwargs or {}))
        flat = [t for a in args for t in (a if isinstance(a, (list, tuple)) else (a,)) if isinstance(t, Tensor)]
        labelled = [t for t in flat if label_of(t) is not None]
        if labelled:
            for tensor in out if isinstance(out, (list, tuple)) else (out,):
                if isinstance(tensor, Tensor):
                    self._hand_on(func, flat, labelled, args, tensor)
        return out

    def _hand_on(self, func: Any, flat: list[Tensor], labelled: list[Tensor], args: tuple, out: Tensor) -> None:
        axes = [i for i, size in enumerate(out.shape) if size and size % self.batch == 0]
        source = labelled[0]
        label = label_of(source)
        assert label is not None
        if not axes:
            return
        name = func.overloadpacket.__name__.strip("_")
        if name == "convolution":
            weight = flat[1]
            new = replace(label, channel=1, kernel=max(weight.shape[2:], default=1))
        elif name in ("mm", "addmm", "bmm", "baddbmm", "linear"):
            new = replace(label, channel=out.ndim - 1, kernel=1)
        elif "batch_norm" in name or "group_norm" in name:
            new = replace(label, channel=1) if out.ndim > 1 else label
        elif "layer_norm" in name:
            new = replace(label, channel=out.ndim - 1) if len(args[1]) == 1 else label
        elif name in ("permute", "transpose", "t"):
            new = self._permuted(name, label, source, args, out)
        elif name in ("view", "unsafe_view", "reshape", "expand", "squeeze", "unsqueeze", "as_strided", "clone"):
            new = self._reshaped(label, source, out)
        else:
            new = self._other(name, label, source, labelled, out)
        if new.batch not in axes:
            new = replace(new, batch=axes[0])
        if new.channel is not None and new.channel >= out.ndim:
            new = replace(new, channel=None)
        out._quac_label = new  # type: ignore[attr-defined]

    @staticmethod
    def _permuted(name: str, label: _Label, source: Tensor, args: tuple, out: Tensor) -> _Label:
        order = list(range(out.ndim))
        if name == "permute":
            order = [axis % out.ndim for axis in args[1]]
        elif out.ndim > 1:
            a, b = (0, 1) if name == "t" else (args[1] % out.ndim, args[2] % out.ndim)
            order[a], order[b] = order[b], order[a]
        channel = order.index(label.channel) if label.channel is not None else None
        return replace(label, batch=order.index(label.batch), channel=channel)

    def _reshaped(self, label: _Label, source: Tensor, out: Tensor) -> _Label:
        axes = [i for i, size in enumerate(out.shape) if size % self.batch == 0]
        before = source.shape[label.batch] // self.batch
        after = out.shape[axes[0]] // self.batch
        fold = label.fold
        if after == 1:
            fold = None
        elif after > before:  # something was merged with the images: onto which side?
            left = math.prod(source.shape[: label.batch]) > math.prod(out.shape[: axes[0]])
            right = math.prod(source.shape[label.batch + 1 :]) > math.prod(out.shape[axes[0] + 1 :])
            merged = "mixed" if left and right else "tile" if left else "interleave"
            fold = merged if fold in (None, merged) else "mixed"
        channel = self._same_axis(source, label.channel, out) if label.channel is not None else None
        return replace(label, batch=axes[0], fold=fold, channel=channel)

    @staticmethod
    def _same_axis(source: Tensor, axis: int, out: Tensor) -> int | None:
        size, before, after = source.shape[axis], math.prod(source.shape[:axis]), math.prod(source.shape[axis + 1 :])
        for i in range(out.ndim):
            if out.shape[i] == size and (math.prod(out.shape[:i]) == before or math.prod(out.shape[i + 1 :]) == after):
                return i
        return None

    @staticmethod
    def _other(name: str, label: _Label, source: Tensor, labelled: list[Tensor], out: Tensor) -> _Label:
        if len(labelled) > 1 and name in ("add", "add_", "sub", "cat", "stack"):
            label = replace(label, kernel=None)
        if label.channel is not None and out.ndim != source.ndim:  # a reduction or an index took axes away
            last = label.channel == source.ndim - 1
            label = replace(label, channel=out.ndim - 1 if last else min(label.channel, out.ndim - 1))
        return label


def label_of(tensor: Any) -> _Label | None:
    """The label of a tensor, None if it does not depend on the image."""
    return getattr(tensor, "_quac_label", None)


def _describe(x: Tensor, batch: int) -> Call | None:
    label = label_of(x)
    if label is None or x.ndim < 2:
        return None
    channel = label.channel
    if channel is None:
        channel = 1 if x.ndim == 4 else x.ndim - 1
    channel_dim = -1 if channel == x.ndim - 1 and x.ndim > 2 else channel
    fold = label.fold if x.shape[label.batch] != batch else None
    return Call(tuple(x.shape), channel_dim, x.shape[channel], label.kernel or 0, label.batch, fold)


def trace(model: nn.Module, example: Tensor | None = None) -> Trace:
    """Run a host once on fake tensors and tell what its activations see.

    Args:
        model: the host; neither its parameters nor its buffers nor its modes change.
        example: images (B, C, H, W) as the host gets them; by default the host's own input size, or (1, 3, 224, 224).

    Raises:
        RuntimeError: the host does not run on such images; the message says how to give better ones.
    """
    images = example[:1] if example is not None else torch.empty(1, *_input_size(model))
    first = next(model.parameters(), None)
    if first is not None and first.is_floating_point():
        images = images.to(dtype=first.dtype, device=first.device)
    try:
        with _quiet(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = mode.from_tensor(images).new_empty(_BATCH, *images.shape[1:])
            return _run(model, fake, _BATCH)
    except Exception as fake_error:
        if images.is_meta:
            raise RuntimeError(_cannot_run(model, images, fake_error)) from fake_error
        try:
            # a host that decides by the values of its tensors cannot run on fake ones
            with torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):
                return _run(copy.deepcopy(model), torch.rand(2, *images.shape[1:]).to(images), 2)
        except Exception as error:
            raise RuntimeError(_cannot_run(model, images, error)) from error


def _cannot_run(model: nn.Module, images: Tensor, error: Exception) -> str:
    reason = (str(error).splitlines() or [""])[0]
    return (
        f"{type(model).__name__} does not run on images of shape {tuple(images.shape)} alone, so its activations "
        f"cannot be found ({type(error).__name__}: {reason}). Give images it takes: inject(model, config, "
        "example=torch.rand(1, C, H, W)). A host that takes more than images: inject the part of it that takes them, "
        "or a module around it that supplies the rest"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """A host that fake tensors cannot run is run for real: what they say about it is of no use to anybody."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled


def _input_size(model: nn.Module) -> tuple[int, int, int]:
    """(C, H, W) from timm's pretrained_cfg where there is one, channels from the first convolution."""
    cfg = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    size = cfg.get("input_size") if isinstance(cfg, dict) else None
    chans, height, width = size or (3, 224, 224)
    embed = getattr(model, "patch_embed", None)
    img_size = getattr(embed, "img_size", None)
    if isinstance(img_size, (tuple, list)) and len(img_size) == 2:
        height, width = img_size
    in_chans = getattr(model, "in_chans", None)
    if isinstance(in_chans, int):
        return in_chans, height, width
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            # a stem whose first convolution sees a rearranged image (space to depth) has a multiple of the channels
            return (module.in_channels if module.in_channels in (1, 2, 4, 5, 6) else chans), height, width
    return chans, height, width


def _run(model: nn.Module, images: Tensor, batch: int) -> Trace:
    images._quac_label = _Label(batch=0, channel=1)  # type: ignore[attr-defined]
    result = Trace(in_chans=images.shape[1])
    names = {id(module): name for name, module in reversed(list(model.named_modules(remove_duplicate=False)))}
    chain: list[str] = []
    outputs: list[tuple[str, Tensor]] = []

    def sees_image(module: nn.Module, args: tuple, kwargs: dict) -> None:
        name = names[id(module)]
        seen = args[0] if args else next(iter(kwargs.values()), None)
        if seen is images and (not chain or _inside(name, chain[-1])):
            chain.append(name)

    def called(module: nn.Module, args: tuple) -> None:
        call = _describe(args[0], batch) if args and isinstance(args[0], Tensor) else None
        if call is not None:
            result.calls.setdefault(names[id(module)], []).append(call)

    def returned(module: nn.Module, args: tuple, output: Any) -> None:
        if isinstance(output, Tensor) and label_of(output) is not None:
            if is_activation(module):
                output._quac_label = replace(label_of(output), kernel=None)  # type: ignore[attr-defined, type-var]
            if output.ndim >= 3:
                outputs.append((names[id(module)], output))

    handles = []
    for module in model.modules():
        if not isinstance(module, torch.jit.ScriptModule):
            handles.append(module.register_forward_pre_hook(sees_image, with_kwargs=True))
            handles.append(module.register_forward_hook(returned))
            if is_activation(module):
                handles.append(module.register_forward_pre_hook(called))
    try:
        with _evaluating(model), torch.no_grad(), _Labels(batch), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                features = model.forward_features(images)  # type: ignore[operator]
                result.last = _backbone_output(features, outputs, batch)
                model.forward_head(features)  # type: ignore[operator]
            except Exception:  # it has none, or none for use: encoders without a head, wrappers that return features
                model(images)
    finally:
        for handle in handles:
            handle.remove()
    result.tap = chain[-1] if chain else None
    if result.last is None and outputs:
        result.last = _backbone_output(outputs[-1][1], outputs, batch)
    return result


def _inside(name: str, parent: str) -> bool:
    return parent == "" or name.startswith(parent + ".")


def _backbone_output(features: Any, outputs: list[tuple[str, Tensor]], batch: int) -> tuple[str, Call] | None:
    """The outermost module that returned the backbone's features (the last one, if none returned just these)."""
    if isinstance(features, (tuple, list)):
        features = next((f for f in reversed(features) if isinstance(f, Tensor)), None)
    matching = [pair for pair in outputs if pair[1] is features and pair[0]]
    for name, output in reversed(matching or [pair for pair in outputs if pair[0]]):
        call = _describe(output, batch)
        if call is not None:
            return name, call
    return None


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode, and everything that the pass leaves on the modules (caches, buffers) is taken back."""
    before = {m: (dict(m.__dict__), dict(m._buffers)) for m in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, (attributes, buffers) in before.items():
            module._buffers.clear()
            module._buffers.update(buffers)
            for name in set(module.__dict__) - set(attributes):
                del module.__dict__[name]
            module.__dict__.update(attributes)
