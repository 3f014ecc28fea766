"""One shape-propagating forward pass: what the modules of a host are given and return, and which sees the image first.

The pass runs on fake tensors, so it costs no memory and little time, with a large prime for the batch: an axis whose
size it divides is the axis that holds the images. Each tensor that depends on the image carries a label (which axis
holds the channels, which the images and in which order, and the size of the last convolution), which every operation
hands on. Hosts that fake tensors cannot run are run for real on a small batch instead.

The labelled tensors are also numbered, each with the tensors it was computed from. So it is known through which of them
everything must pass that the host makes of an image: the ends of blocks and stages, but not the branches inside.
"""

from __future__ import annotations

import copy
import itertools
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from quac_plugins.core.activations.base import ChannelActivation
from quac_plugins.core.hooks import TAP_HOOKS, WITH_TAP
from quac_plugins.core.host.facts import facts_of
from quac_plugins.core.inject.detectors import TakenApart, find_part, in_words
from quac_plugins.core.inject.example import Arguments, Example, arguments_of
from quac_plugins.core.inject.hosts import is_activation
from quac_plugins.core.inject.labels import BATCH, Label, Labels, label_of
from quac_plugins.core.module_names import parts
from quac_plugins.core.private import FAKE_TENSORS, fake_mode
from quac_plugins.core.quality.given import contexts_of, quality_given

OURS = "quac_"  # in the names of modules that were put in, which are no part of the host


@dataclass
class Call:
    """One call of an activation: the form of its input."""

    shape: tuple[int, ...]
    channel_dim: int
    channels: int
    kernel: int
    batch_axis: int
    fold: str | None


@dataclass(frozen=True)
class Feature:
    """A tensor (B, C, H, W), (B, H, W, C), (B, N, C) or alike that a module returned in one of its calls.

    Attributes:
        name: the name of the module.
        call: the form of the tensor.
        layers: the number of the host's convolution and linear layers that had run when the module returned.
        before: the same number when the module was called.
        depth: the number of these layers on the longest way from the image to the tensor.
        node: the number of the tensor; modules that return the same tensor share it.
        is_new: the module computed the tensor, rather than handing on its input.
        cut: whatever the host makes of the image, it makes it of this tensor: nothing goes around it. True for the
            ends of stages and blocks, false for the branches inside a block. (A host that returns several tensors: as
            seen from the one that most of its computations lead to.)
    """

    name: str
    call: Call
    layers: int
    before: int = 0
    depth: int = 0
    node: int = 0
    is_new: bool = True
    cut: bool = True


@dataclass
class Trace:
    """The result of a pass.

    Attributes:
        calls: module name → its calls with a tensor that depends on the image.
        tap: name of the first layer that sees the image.
        in_chans: channels of the image.
        last: name of the module whose output is the backbone's, and a Call that describes it.
        features: the modules' outputs that depend on the image and have 3 or 4 axes, in the order of the returns.
        others: module name → its other output, in words.
        layers: the number of convolution and linear layers that ran; ``feature.layers / layers`` is a depth.
        image_size: (H, W) of the images.
        alone: whether the host was called with images and nothing else.
    """

    calls: dict[str, list[Call]] = field(default_factory=dict)
    tap: str | None = None
    in_chans: int = 3
    last: tuple[str, Call] | None = None
    features: list[Feature] = field(default_factory=list)
    others: dict[str, str] = field(default_factory=dict)
    layers: int = 0
    image_size: tuple[int, int] = (0, 0)
    alone: bool = True


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


class DoesNotRun(RuntimeError):
    """A host does not run on images of the given shape."""


def trace(model: nn.Module, example: Example | None = None, tokens: bool = False) -> Trace:
    """Run a host once on fake tensors, and describe the inputs and outputs of its modules.

    Args:
        model: the host; neither its parameters nor its buffers nor its modes change.
        example: images (B, C, H, W), or all arguments of the host, images first. None: images of the host's own input
            size, or (1, 3, 224, 224).
        tokens: whether tokens (B, N, C) may take the place of images.

    Raises:
        RuntimeError: the host does not run on such images, or takes no batch of images (a detector); the message says
            which images to give, or which part to inject.
    """
    devices = {tensor.device.type for tensor in (*model.parameters(), *model.buffers())}
    if "meta" in devices and len(devices) > 1:  # a model whose parameters are still to be loaded has its buffers
        model = copy.deepcopy(model).to("meta")
    arguments = arguments_of(example, lambda: _input_size(model), tokens)
    single = arguments.of_batch(1, model, lambda tensor, shape: tensor[:1])
    images = single.images
    try:
        with _quiet(), fake_mode() as mode:
            many = single.of_batch(BATCH, model, lambda tensor, shape: mode.from_tensor(tensor).new_empty(shape))
            return _run(model, many, BATCH)
    except TakenApart:
        part = _part(model, single)
        raise RuntimeError(
            f"{type(model).__name__} takes its batch of images apart, as detectors do that are given a list, so it has "
            f"no tensor of images whose quality could be computed. {in_words(model, part)}"
        ) from None
    except Exception as fake_error:
        if images.is_meta:
            raise DoesNotRun(_cannot_run(model, single, fake_error)) from None
        try:
            # a host that decides by the values of its tensors cannot run on fake ones
            with torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):
                return _run(copy.deepcopy(model), single.of_batch(2, model, _random), 2)
        except Exception as error:
            raise DoesNotRun(_cannot_run(model, single, error)) from None  # the message holds what it adds


def _part(model: nn.Module, arguments: Arguments) -> tuple[str, tuple[int, ...]] | None:
    """Return the part of a host that takes the images, if the host runs that far."""
    with _evaluating(model), warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        return find_part(model, arguments.images.new_zeros(2, *arguments.images.shape[1:]))


def _random(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.rand(shape).to(tensor) if tensor.is_floating_point() else tensor.expand(shape).clone()


def _cannot_run(model: nn.Module, arguments: Arguments, error: Exception) -> str:
    beside = "alone" if arguments.alone else "and the other arguments of the example"
    reason = (str(error).splitlines() or [""])[0].rstrip(".")
    part = _part(model, arguments) if arguments.alone else None
    if part is not None:
        return f"{type(model).__name__} is not given its images as one tensor (B, C, H, W). {in_words(model, part)}"
    return (
        f"{type(model).__name__} does not run on images of shape {tuple(arguments.images.shape)} {beside}, so its "
        f"activations cannot be found ({type(error).__name__}: {reason}). Give images it takes: inject(model, config, "
        "example=torch.rand(1, C, H, W)). A host that takes more than images: give all its arguments, the images first "
        "(example=(images, timestep, …)), or inject the part of it that takes images alone"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the log of fake tensors: a host that they cannot run is run on real ones."""
    logger = logging.getLogger(FAKE_TENSORS)
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled


def _input_size(model: nn.Module) -> tuple[int, int, int]:
    """Return (C, H, W) from the host's facts, else 224 × 224, and channels from the first convolution."""
    facts = facts_of(model)
    chans, height, width = facts.input_size or (3, 224, 224)
    if facts.in_chans is not None:
        return facts.in_chans, height, width
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            # a stem whose first convolution sees a rearranged image (space to depth) has a multiple of the channels
            return (module.in_channels if module.in_channels in (1, 2, 4, 5, 6) else chans), height, width
    return chans, height, width


def _run(model: nn.Module, arguments: Arguments, batch: int) -> Trace:
    images = arguments.images
    channel, height, width = (1, *images.shape[2:]) if images.ndim == 4 else (2, 0, 0)  # nothing tells tokens' size
    images._quac_label = Label(batch=0, channel=channel)  # type: ignore[attr-defined]
    result = Trace(in_chans=images.shape[channel], image_size=(height, width), alone=arguments.alone)
    known = parts(model)
    names = {id(module): name for name, module in known.items()}
    labels = Labels(batch)
    chain: list[nn.Module] = []
    outputs: list[tuple[str, Tensor]] = []
    running = labels.running

    def sees_image(module: nn.Module, args: tuple, kwargs: dict) -> None:
        name = names[id(module)]
        seen = args[0] if args else next(iter(kwargs.values()), None)
        if seen is images and OURS not in name and (not chain or any(module is below for below in chain[-1].modules())):
            chain.append(module)
        running.append(_Running(module, name, labels))

    def called(module: nn.Module, args: tuple) -> None:
        call = _describe(args[0], batch) if args and isinstance(args[0], Tensor) else None
        if call is not None:
            result.calls.setdefault(names[id(module)], []).append(call)

    def returned(module: nn.Module, args: tuple, output: Any) -> None:
        name = names[id(module)]
        if isinstance(output, Tensor) and label_of(output) is not None:
            if is_activation(module):
                output._quac_label = replace(label_of(output), kernel=None)  # type: ignore[attr-defined, type-var]
            if output.ndim >= 3:
                outputs.append((name, output))
        while running:  # the others, if any, ended with errors that the host caught
            call = running.pop()
            call.end(labels)
            if call.module is module:
                _note(result, call, output, labels, batch)
                break

    def with_tap(module: nn.Module, method: Any, *args: Any, **kwargs: Any) -> Any:
        sees_image(module, args, kwargs)
        output, *inner = method(*args, **kwargs)
        returned(module, args, output)
        return (output, *inner)

    handles = []
    for module in known.values():
        if not isinstance(module, torch.jit.ScriptModule):
            handles.append(module.register_forward_pre_hook(sees_image, with_kwargs=True))
            handles.append(module.register_forward_hook(returned))
            if is_activation(module):
                handles.append(module.register_forward_pre_hook(called))
    try:
        # quality functions read pictures: these are none, and far too many
        nothing = [(context, images.new_zeros(batch, context.channels)) for context in contexts_of(model)]
        with _evaluating(model), torch.no_grad(), labels, quality_given(nothing), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for module in known.values():
                if callable(method := getattr(module, WITH_TAP, None)):
                    module.__dict__[WITH_TAP] = partial(with_tap, module, method)
            try:
                if not arguments.alone:
                    raise TypeError("it takes more than images")
                features = model.forward_features(images)  # type: ignore[operator]
                result.last = _backbone_output(features, outputs, batch, known)
                end = model.forward_head(features)  # type: ignore[operator]
            except Exception:  # it has none, or none for use: encoders without a head, wrappers that return features
                result.features, result.others, labels.layers = [], {}, 0
                while running:
                    running.pop().end(labels)
                end = arguments.call(model)
    finally:
        for handle in handles:
            handle.remove()
    result.tap = names[id(chain[-1])] if chain else None
    if result.last is None and outputs:
        result.last = _backbone_output(outputs[-1][1], outputs, batch, known)
    result.layers = labels.layers
    cuts = _cuts(labels.parents, [label.node for leaf in tree_leaves(end) if (label := label_of(leaf)) is not None])
    result.features = [replace(feature, cut=feature.node in cuts) for feature in result.features]
    return result


class _Running:
    """A module that has been called and has not returned yet."""

    def __init__(self, module: nn.Module, name: str, labels: Labels):
        self.module, self.name = module, name
        self.layers, self.nodes = labels.layers, len(labels.parents)
        # the driver of an activation that was put in is no depth of the host, and q no way around its layers; and what
        # a recurrent layer consists of is not the same on every device
        self.uncounted = OURS in name or isinstance(module, (ChannelActivation, nn.RNNBase))
        self.unnumbered = name.rpartition(".")[2] in TAP_HOOKS
        labels.uncounted += self.uncounted
        labels.unnumbered += self.unnumbered

    def end(self, labels: Labels) -> None:
        labels.uncounted -= self.uncounted
        labels.unnumbered -= self.unnumbered


def _note(result: Trace, call: _Running, output: Any, labels: Labels, batch: int) -> None:
    """Note the output of a module."""
    if not call.name:
        return
    label = label_of(output)
    if label is None:
        kind = "nothing that depends on the image" if isinstance(output, Tensor) else f"a {type(output).__name__}"
        result.others[call.name] = f"returns {kind}"
        return
    described = _describe(output, batch)
    if described is None or output.ndim not in (3, 4):
        sizes = ", ".join("B" if i == label.batch else str(size) for i, size in enumerate(output.shape))
        result.others[call.name] = f"its output ({sizes}) is not a feature map (4-D or tokens)"
        return
    is_new = label.node >= call.nodes
    depth = labels.depths[label.node] if label.node >= 0 else 0
    result.features.append(Feature(call.name, described, labels.layers, call.layers, depth, label.node, is_new))


def _cuts(parents: list[tuple[int, ...]], ends: list[int]) -> set[int]:
    """Return the tensors that lie on every way from the image to one of ``ends``, the one that most tensors lead to.

    Tensors are numbered in the order they were computed, so a way avoids one of them only by a step across its number.
    """
    best: list[int] = []
    for end in {node for node in ends if node >= 0}:
        reached = {end}
        for node in range(end, 0, -1):
            if node in reached:
                reached.update(parents[node])
        best = max(best, sorted(reached), key=len)
    steps = [0] * (len(parents) + 1)
    for node in best:
        for parent in parents[node]:
            steps[parent + 1] += 1
            steps[node] -= 1
    across = list(itertools.accumulate(steps))
    return {node for node in best if not across[node]}


def _backbone_output(
    features: Any, outputs: list[tuple[str, Tensor]], batch: int, known: dict[str, nn.Module]
) -> tuple[str, Call] | None:
    """Return the outermost module that returned the backbone's features (the last module, if none returned just these).

    For a list of stages the result is the last stage: not every path through the host calls the list.
    """
    if isinstance(features, (tuple, list)):
        features = next((f for f in reversed(features) if isinstance(f, Tensor)), None)
    matching = [pair for pair in outputs if pair[1] is features and pair[0]]
    for name, output in reversed(matching or [pair for pair in outputs if pair[0]]):
        call = _describe(output, batch)
        while call is not None and isinstance(known[name], nn.Sequential):
            parts = [(part, tensor) for part, tensor in outputs if part.rpartition(".")[0] == name]
            same = [part for part, tensor in parts if tensor is output]
            if not same or len({tensor.shape for _, tensor in parts}) == 1:
                break
            name = same[-1]
        if call is not None:
            return name, call
    return None


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Run a pass in eval mode, and take back everything that it leaves on the modules (caches, buffers)."""
    ours = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]  # which keep their own
    before = {m: (dict(m.__dict__), dict(m._buffers)) for m in ours}
    builtin = vars(nn.Module())
    caches = [  # that are filled in place
        (value, copy.copy(value))
        for module in ours
        for name, value in module.__dict__.items()
        if type(value) in (dict, list) and name not in builtin
    ]
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
        for value, content in caches:
            value.clear()
            value.update(content) if isinstance(value, dict) else value.extend(content)
