"""CONTRIQUE: a ResNet-50 trained by contrast to tell distortions apart (Madhusudana et al., IEEE TIP 31, 2022).

The quality feature is the encoder, ResNet-50 without its last two layers, averaged over positions: 2048 numbers. Its
weights are the authors' and are read from their checkpoint; nothing is downloaded.
"""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from quac_plugins.core.private import has_numbers
from quac_plugins.core.quality.registry import QualityFunction, quality_family, shared

CHANNELS = 2048
ENVIRONMENT = "QUAC_CONTRIQUE"
_HOW = (
    "CONTRIQUE needs its official checkpoint, CONTRIQUE_checkpoint25.tar, which the authors share at "
    f'https://github.com/pavancm/CONTRIQUE. Give its path as quality="contrique:/path/to/it" or in {ENVIRONMENT}. '
    'Other quality functions, such as "brisque", need no checkpoint.'
)


class Bottleneck(nn.Module):
    """Residual block of ResNet-50, with torchvision's parameter names (so its checkpoints fit)."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, H, W) to (B, 4 · width, ⌈H / stride⌉, ⌈W / stride⌉)."""
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(y)).relu()
        return (self.bn3(self.conv3(y)) + self.downsample(x)).relu()


def contrique_encoder() -> nn.Sequential:
    """Build ResNet-50 without pooling and classifier, randomly initialized: (B, 3, H, W) → (B, 2048, ⌈H/32⌉, ⌈W/32⌉).

    Its children are numbered as those of torchvision's, ``nn.Sequential(*resnet50().children())[:-2]``.

    Example:
        >>> contrique_encoder()(torch.rand(1, 3, 64, 64)).shape
        torch.Size([1, 2048, 2, 2])
    """

    def stage(inputs: int, width: int, depth: int, stride: int) -> nn.Sequential:
        rest = (Bottleneck(4 * width, width, 1) for _ in range(depth - 1))
        return nn.Sequential(Bottleneck(inputs, width, stride), *rest)

    return nn.Sequential(
        nn.Conv2d(3, 64, 7, 2, padding=3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, padding=1),
        stage(64, 64, 3, 1),
        stage(256, 128, 4, 2),
        stage(512, 256, 6, 2),
        stage(1024, 512, 3, 2),
    )


def load_contrique(path: str | os.PathLike[str]) -> nn.Sequential:
    """Read the encoder of a CONTRIQUE checkpoint, frozen and in evaluation mode, float32, on the CPU.

    Args:
        path: the official ``.tar`` (a state dict saved by torch, bare or under ``state_dict``, with or without the
            prefix ``module.``), or the same keys in a ``.safetensors`` file. The projector in it is left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a state dict of tensors, or its keys or shapes do not fit a ResNet-50.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no CONTRIQUE checkpoint at {path!r}. {_HOW}")
    state = {str(name).removeprefix("module."): value for name, value in _read(path).items()}
    state = {name: value for name, value in state.items() if name.startswith("encoder.")}
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):  # leaves the user's random state as it was
        encoder = contrique_encoder()
    expected = encoder.state_dict(prefix="encoder.")
    # a counter that evaluation does not read, absent from old checkpoints
    missing = [k for k in expected if k not in state and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in state if k not in expected]
    shapes = [
        f"{k} {tuple(getattr(state[k], 'shape', ()))} instead of {tuple(v.shape)}"
        for k, v in expected.items()
        if k in state and getattr(state[k], "shape", None) != v.shape
    ]
    problems = [
        f"{len(tensor_names)} {what} ({', '.join(tensor_names[:4])}{', …' if len(tensor_names) > 4 else ''})"
        for what, tensor_names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if tensor_names
    ]
    if problems:
        raise ValueError(
            f"{path!r} does not hold the encoder of CONTRIQUE, a ResNet-50 under encoder.0, …, encoder.7: "
            + "; ".join(problems)
        )
    encoder.load_state_dict(
        {name.removeprefix("encoder."): value for name, value in state.items()}, strict=False, assign=True
    )
    return encoder.float().eval().requires_grad_(False)


def _load_pickle(path: str) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _read(path: str) -> dict[str, Any]:
    try:
        state = load_file(path) if path.endswith(".safetensors") else _load_pickle(path)
    except Exception as error:  # whatever a file that is no checkpoint makes of the reader
        raise ValueError(f"{path!r} cannot be read as a checkpoint of weights: {error}") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict):
        raise ValueError(f"{path!r} holds a {type(state).__name__}, expected a state dict")
    return state


class Contrique:
    """The quality function: images (B, 3, H, W), RGB in [0, 1] → (B, 2048), float32.

    A plain object, so that the encoder is not part of the network that uses it: not in its state dict, not trained, not
    cast. It computes in float32 whatever autocast says, on the device of the images. Copies share the encoder; pickling
    keeps the path of the checkpoint instead of the weights. Images are not normalized, as in the authors' code; their
    demo also scales the feature to length 1, which is left to whoever reads it.

    Args:
        path: the checkpoint. Empty: the environment variable QUAC_CONTRIQUE names it at the first call.
    """

    def __init__(self, path: str = "") -> None:
        self.path = path
        self._encoders: dict[torch.device, nn.Module] = {}

    def load(self) -> None:
        """Read the checkpoint once; the errors are the ones of :func:`load_contrique`."""
        if not self._encoders:
            path = self.path or os.environ.get(ENVIRONMENT, "")
            if not path:
                raise FileNotFoundError(_HOW)
            self._encoders[torch.device("cpu")] = load_contrique(path)

    def __call__(self, images: Tensor) -> Tensor:
        """Compute (B, 2048) of images (B, 3, H, W) in [0, 1], any floating dtype and any size from 1×1.

        Raises:
            FileNotFoundError: no checkpoint was given, or it is not there.
            TypeError: the images are not of a floating dtype.
            ValueError: the images are not (B, 3, H, W).
        """
        if not images.is_floating_point():
            raise TypeError(f"contrique expects floating-point images in [0, 1], got {images.dtype}; divide by 255")
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"contrique expects images (B, 3, H, W), got {tuple(images.shape)}")
        if not has_numbers(images):
            return images.new_empty((images.shape[0], CHANNELS), dtype=torch.float32)  # only the shape is asked for
        if not self._encoders:
            self.load()
        if images.device not in self._encoders:
            encoder = copy.deepcopy(self._encoders[torch.device("cpu")])
            self._encoders[images.device] = encoder.to(images.device)
        with torch.autocast(images.device.type, enabled=False):
            return self._encoders[images.device](images.float()).mean((2, 3))

    def __deepcopy__(self, memo: dict[int, Any]) -> Contrique:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _of, (self.path,)

    def __repr__(self) -> str:
        return f"Contrique({self.path!r})"


def _of(path: str) -> Contrique:
    """Return the quality function of one checkpoint; the environment may name another one later."""
    function: Contrique = shared(Contrique, path, "" if path else os.environ.get(ENVIRONMENT, ""))
    return function


@quality_family("contrique")
def contrique(path: str = "") -> QualityFunction:
    """Build ``contrique`` (checkpoint from QUAC_CONTRIQUE) or ``contrique:/path/to/checkpoint``; width 2048.

    Without a checkpoint the function can be built but not called, so that a saved network, given q by hand, can run.

    Raises:
        FileNotFoundError: the given checkpoint does not exist. A wrong one is an error of :func:`load_contrique`.

    Example:
        >>> contrique().channels
        2048
    """
    function = _of(path)
    if path or os.environ.get(ENVIRONMENT):
        function.load()
    return QualityFunction(f"contrique:{path}" if path else "contrique", CHANNELS, function)
