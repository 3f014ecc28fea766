"""Files for deployment: ONNX, torch.export and TorchScript, each loaded back and compared before it is put in place."""

from __future__ import annotations

import copy
import importlib
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from quac_plugins.core.files import write_file
from quac_plugins.core.host.facts import facts_of
from quac_plugins.core.naming import unknown

__all__ = ["FORMATS", "Exported", "export", "pictures"]

FORMATS = ("onnx", "torch-export", "torchscript")
_SUFFIX = {"onnx": ".onnx", "torch-export": ".pt2", "torchscript": ".pt"}
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class Exported:
    """An exported file and its comparison with the model.

    Attributes:
        path: the file.
        format: one of ``FORMATS``.
        difference: the largest absolute difference of an output, over the output's largest absolute value.
        shapes: the shapes of the compared batches of images.
    """

    path: Path
    format: str
    difference: float
    shapes: tuple[tuple[int, ...], ...]

    def __str__(self) -> str:
        shapes = ", ".join("×".join(map(str, shape)) for shape in self.shapes)
        return f"{self.path}: {self.format}, differs from the model by {self.difference:.1e} of its outputs on {shapes}"


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    format: str = "onnx",
    example: Tensor | None = None,
    dynamic_batch: bool = True,
    dynamic_size: bool = False,
    opset: int = 18,
    tolerance: float = 1e-4,
) -> Exported:
    """Write a network for deployment, with its taps, quality functions, activations and priors inside.

    Before the file is put in place it is loaded and run on the example, on batches of other lengths and, with
    ``dynamic_size``, on other sizes. If the file differs from the model, or cannot be made, ``path`` is as before.

    Args:
        model: a model from images (B, C, H, W) to tensors. The model stays unchanged; a copy in evaluation mode, on the
            CPU, is exported.
        path: the file, which is replaced if it exists.
        format: ``"onnx"`` (one file; for onnxruntime and others), ``"torch-export"`` (for `torch.export.load` and
            AOTInductor) or ``"torchscript"`` (for `torch.jit.load`). No format needs this package to run.
        example: images (B, C, H, W), normalized for the model; photographs test most. None: :func:`pictures` of the
            model's own size.
        dynamic_batch: whether the file takes any number of images.
        dynamic_size: whether the file takes images of any height and width, as the host must.
        opset: the opset of ONNX, from 18 on.
        tolerance: the largest difference of the outputs, relative to their largest value.

    Raises:
        ImportError: the format is ``"onnx"``, and onnx, onnxscript or onnxruntime is not installed.
        ValueError: an argument is wrong, or the outputs differ by more than the tolerance.
        RuntimeError: torch cannot export the model.
        OSError: the file cannot be written.

    Example:
        >>> import tempfile, timm, quac_plugins as quac
        >>> model = timm.create_model("test_resnet_qacon")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     done = quac.export(model, f"{folder}/model.pt", format="torchscript", example=torch.rand(2, 3, 64, 64))
        >>> done.difference < 1e-4, done.shapes
        (True, ((2, 3, 64, 64), (1, 3, 64, 64), (3, 3, 64, 64)))
    """
    if format not in FORMATS:
        raise unknown("unknown format", format, FORMATS)
    if opset < 18:
        raise ValueError(f"opset must be 18 or newer, got {opset}")
    if format == "onnx":
        require_onnx()
    model = copy.deepcopy(model).cpu().eval()
    images = _example(model, example, 2 if dynamic_batch else 1)
    dynamic = (dynamic_batch, dynamic_size)
    with torch.no_grad(), tempfile.TemporaryDirectory(prefix="quac-export-") as folder:
        batches = _others(images, *dynamic)
        expected = [_outputs(model(batch)) for batch in batches]
        file = Path(folder) / f"model{_SUFFIX[format]}"
        try:
            run = _WRITERS[format](model, images, file, dynamic, opset)
        except (ImportError, OSError, MemoryError):
            raise
        except Exception as error:  # torch.export, tracers and converters have errors of all kinds
            raise RuntimeError(f"torch cannot write {type(model).__name__} as {format}: {error}") from error
        difference = max(
            _difference(run(batch), wanted, batch, format) for batch, wanted in zip(batches, expected, strict=True)
        )
        shapes = tuple(tuple(batch.shape) for batch in batches)
        if not difference <= tolerance:
            raise ValueError(
                f"as {format} the outputs differ from the model's by {difference:.1e} of their largest value, on "
                f"images of the shapes {shapes}; {tolerance:.1e} is tolerated, and {os.fspath(path)} was not written"
            )
        write_file(path, file.read_bytes())
    return Exported(Path(path), format, difference, shapes)


def require_onnx() -> None:
    """Raise an ImportError with the way to install onnx, onnxscript and onnxruntime, if one is missing."""
    missing = []
    for package in _PACKAGES:
        try:
            importlib.import_module(package)
        except ImportError:
            missing.append(package)
    if missing:
        raise ImportError(f'ONNX needs {", ".join(missing)}: pip install "quac-plugins[onnx]"')


def pictures(batch: int, size: tuple[int, int], channels: int = 3) -> Tensor:
    """Make different pictures with the spectrum of photographs, always the same: (batch, channels, H, W) in [0, 1].

    Example:
        >>> pictures(2, (32, 48)).shape
        torch.Size([2, 3, 32, 48])
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.zeros(batch, channels, *size)
    side, strength = 2, 1.0
    while side <= min(size):  # every octave as strong as the other
        octave = torch.randn(batch, channels, side, side, generator=generator)
        images += strength * F.interpolate(octave, size, mode="bicubic", align_corners=False)
        side, strength = 2 * side, 0.7 * strength
    return torch.sigmoid(images)


def _example(model: nn.Module, example: Tensor | None, batch: int) -> Tensor:
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    dtype = torch.float32 if first is None else first.dtype
    if example is not None:
        if not isinstance(example, Tensor) or example.ndim != 4 or not len(example):
            got = tuple(example.shape) if isinstance(example, Tensor) else type(example).__name__
            raise ValueError(f"example must be a tensor of images (B, C, H, W), got {got}")
        images = example.detach().cpu()
        images = images.repeat(batch, 1, 1, 1)[:batch] if len(images) < batch else images
        return (images if images.is_floating_point() else images.float()).to(dtype)
    facts = facts_of(model)
    if facts.input_size is None:
        raise ValueError("the model does not say what images it takes; give example=, images (B, C, H, W)")
    channels, height, width = facts.input_size
    images = pictures(batch, (height, width), channels)
    mean, std = (torch.tensor(values) for values in facts.normalization or (0.0, 1.0))
    if mean.numel() in (1, channels):
        images = (images - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    return images.to(dtype)


def _others(images: Tensor, dynamic_batch: bool, dynamic_size: bool) -> list[Tensor]:
    """Return the example, and the other batches that the file must take."""
    batches = [images]
    if dynamic_batch:
        batches += [images[:1], torch.cat([images, images[:1].flip(-1)])]
    if dynamic_size:
        height, width = images.shape[2:]
        for size in ((height + 32, width), (height, width + 64), (height + 31, width + 17)):
            batches.append(F.interpolate(images.float(), size, mode="bilinear", align_corners=False).to(images))
    return batches


def _outputs(outputs: Any) -> list[Tensor]:
    """Return the tensors of a model's outputs, in torch's order of lists, tuples and dicts."""
    tensors = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
    if not tensors:
        raise ValueError(f"the model returns no tensor but {type(outputs).__name__}, which cannot be exported")
    return tensors


def _difference(outputs: Sequence[Tensor], expected: Sequence[Tensor], batch: Tensor, format: str) -> float:
    if [tuple(output.shape) for output in outputs] != [tuple(output.shape) for output in expected]:
        raise ValueError(
            f"as {format} the outputs for images {tuple(batch.shape)} have the shapes "
            f"{[tuple(output.shape) for output in outputs]}, the model's {[tuple(output.shape) for output in expected]}"
        )
    worst = 0.0
    for output, other in zip(outputs, expected, strict=True):
        if other.numel():
            wide, scale = other.double(), float(other.double().abs().max())
            difference = float((output.double() - wide).abs().max())
            worst = max(worst, difference / max(scale, 1e-12)) if difference == difference else float("inf")
    return worst


Run = Callable[[Tensor], list[Tensor]]


def _axes(dynamic: tuple[bool, bool]) -> tuple[dict[int, Any]]:
    any_size = torch.export.Dim.DYNAMIC  # type: ignore[attr-defined]
    return (dict.fromkeys((0,) * dynamic[0] + (2, 3) * dynamic[1], any_size),)


def _to_onnx(model: nn.Module, images: Tensor, file: Path, dynamic: tuple[bool, bool], opset: int) -> Run:
    import onnxruntime

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the converter's own code
        torch.onnx.export(
            model,
            (images,),
            os.fspath(file),
            dynamo=True,
            dynamic_shapes=_axes(dynamic),
            input_names=["images"],
            opset_version=opset,
            external_data=False,
            verbose=False,
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(os.fspath(file), options, providers=["CPUExecutionProvider"])
    return lambda batch: [torch.from_numpy(array) for array in session.run(None, {"images": batch.numpy()})]


def _to_program(model: nn.Module, images: Tensor, file: Path, dynamic: tuple[bool, bool], opset: int) -> Run:
    program = torch.export.export(model, (images,), dynamic_shapes=_axes(dynamic), strict=False)
    torch.export.save(program, file)
    loaded = torch.export.load(file).module()
    return lambda batch: _outputs(loaded(batch))


def _to_script(model: nn.Module, images: Tensor, file: Path, dynamic: tuple[bool, bool], opset: int) -> Run:
    with warnings.catch_warnings():
        for category in (torch.jit.TracerWarning, FutureWarning, DeprecationWarning):
            warnings.simplefilter("ignore", category)  # checks of shapes are not recorded; what is written is compared
        traced = torch.jit.trace(model, images, strict=False, check_trace=False)
        torch.jit.save(traced, os.fspath(file))
        loaded = torch.jit.load(os.fspath(file), map_location="cpu")
    return lambda batch: _outputs(loaded(batch))


_WRITERS = {"onnx": _to_onnx, "torch-export": _to_program, "torchscript": _to_script}
