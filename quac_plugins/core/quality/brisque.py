"""BRISQUE: 36 natural-scene statistics of an image (Mittal, Moorthy, Bovik, IEEE TIP 21(12), 2012), batched.

The reference is OpenCV's ``cv2.quality.QualityBRISQUE_computeFeatures``. Three of its habits decide the numbers as much
as the paper does, and are kept:

1. It reads 8-bit pictures and rounds the luminance to 8 bits. So do we, whatever the dtype of the images.
2. It counts how many coefficients lie left and right of zero. Where a picture is flat, coefficients are rounding
   errors and their *sign* decides; so the local means are summed in the same order, with fused multiply-adds.
3. Where rounding makes a local variance negative, the coefficient is 0.

Everything is elementwise operations, slices and sums: no convolution or matrix product, hence nothing that autocast or
TF32 rounds coarser, and a result that does not depend on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from quac_plugins.core.graphs import count_up_to, exporting, in_graph, log_gamma, without_grad
from quac_plugins.core.kernels.native import WrongNumbersError, built_or_none, may_read
from quac_plugins.core.quality import brisque_cpu
from quac_plugins.core.quality.registry import quality_function

# Luminance of 8-bit RGB in fixed point, 15 bits after the point (Rec. 601). Sums stay below 2^24: exact in float32.
_LUMA = (9798, 19235, 3735)
_LUMA_ONE = 32768
# Gaussian window of 7 taps, sigma 7/6, rounded to float32; centre first.
_WINDOW = (0.3426315188407898, 0.23729607462882996, 0.07882796227931976, 0.01256020087748766)
# C of the contrast normalization, eq. (1): one grey level of images in [0, 1].
_C = 1.0 / 255.0
# The shape parameter is searched on 0.2, 0.201, …, 10.
_SHAPE_FIRST, _SHAPE_STEP, _SHAPE_COUNT = 0.2, 0.001, 9801
# Right-hand neighbour, lower, lower right, upper right: H, V, D1, D2 of eq. (7)-(10).
_SHIFTS = ((0, 1), (1, 0), (1, 1), (-1, 1))

# Four images of 224×224: 0.8 MB in float32.
_BLOCK_PIXELS = 4 * 224 * 224
# Below, one pass in C++ saves less than it may take to build it.
_MIN_PIXELS = 1 << 14


@quality_function("brisque", channels=36)
def brisque(images: Tensor) -> Tensor:
    """Compute the 36 BRISQUE features of each image, without the support vector machine that makes a score of them.

    For each of two scales (full and half size), 18 numbers: shape α and variance of the normalized luminance, then for
    the products of neighbours in the directions horizontal, vertical and the two diagonals: shape, mean, left variance,
    right variance of an asymmetric generalized Gaussian.

    Args:
        images: (B, 3, H, W) RGB or (B, 1, H, W) grey, any floating dtype, any H, W ≥ 1, values in [0, 1]. Values
            outside are clamped, ±inf with them; a pixel with a NaN in any channel is black. Values are rounded to 8
            bits.

    Returns:
        (B, 36) on the device of the images, float64 for float64 images and float32 otherwise, always finite. Shapes
            lie in [0.2, 10], variances are ≥ 0. Where a side of a distribution has no samples, its variance is 0 and
            the shape 10 (OpenCV: NaN and 10). A constant image gives shapes of 10 and zeros elsewhere (OpenCV: what the
            rounding errors of its half size look like, which change with the image's sides).

    Raises:
        TypeError: ``images`` is not a tensor, or not of a floating dtype.
        ValueError: ``images`` is not (B, 3, H, W) or (B, 1, H, W), or has no pixels.

    Note:
        Pixels are processed in float32 and statistics in float64, also for images of other dtypes and under autocast.
        If the images require a gradient, it flows through variances and means (rounding to 8 bits passes it straight
        through); the shapes, found by table look-up, contribute none.

    Example:
        >>> ramp = torch.linspace(0, 1, 64).expand(2, 3, 64, 64)
        >>> brisque(ramp).shape
        torch.Size([2, 36])
        >>> brisque(torch.full((1, 3, 32, 32), 0.5))[0, :4].tolist()
        [10.0, 0.0, 10.0, 0.0]
    """
    _check(images)
    ratios = _shape_ratios(images)
    scales = [_two_scales(block, ratios.dtype) for block in blocks(images, _BLOCK_PIXELS)]
    # fitted together: these are many small operations
    features = _settled(_features(torch.cat(scales), ratios))
    return features.to(torch.float64 if images.dtype == torch.float64 else torch.float32)


def _check(images: Tensor) -> None:
    if not isinstance(images, Tensor):
        raise TypeError(f"brisque expects a tensor (B, 3, H, W), got {type(images).__name__}")
    if not images.is_floating_point():
        raise TypeError(
            f"brisque expects floating-point images in [0, 1], got {images.dtype}; convert them: images.float() / 255"
        )
    if images.ndim != 4:
        raise ValueError(f"brisque expects images (B, 3, H, W), got {images.ndim} dimensions: {tuple(images.shape)}")
    if torch.jit.is_tracing():
        return  # sizes are being recorded there, and comparing them would fix them with a warning
    if images.shape[1] not in (1, 3):
        raise ValueError(
            f"brisque expects 3 channels (RGB) or 1 (grey), got {images.shape[1]}: images {tuple(images.shape)}"
        )
    if images.shape[2] == 0 or images.shape[3] == 0:
        raise ValueError(f"brisque expects images with at least one pixel, got {tuple(images.shape)}")


def _settled(features: Tensor) -> Tensor:
    """Replace the features (B, 36) of constant images, whose variance is below 1e-8: they are rounding errors.

    One pixel of a neighbouring grey level among 25 millions makes a variance of 1e-7, rounding one of 4e-10.
    """
    column = torch.arange(36, device=features.device) % 18
    shapes = (column == 0) | (column % 4 == 2)
    return torch.where(features[:, 1:2] < 1e-8, shapes.to(features.dtype) * 10, features)


def blocks(images: Tensor, pixels: int) -> tuple[Tensor, ...]:
    """Split a batch on a CPU into blocks of at most ``pixels``, or of one image, which its cache holds.

    Eager kernels pass over memory some two hundred times; from the cache they are three times as fast for 32
    images of 224×224. Graphs are not split: they are fused, and their batch may be symbolic.
    """
    if images.device.type != "cpu" or in_graph():
        return (images,)
    return images.split(max(1, pixels // (images.shape[2] * images.shape[3])))


def _two_scales(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute the 5 sums and the number of pixels for 5 distributions at full and at half size: (B, 2, 5, 6)."""
    if _is_compiled(images) and (code := _compiled()) is not None:
        down, across = (_taps(size, max(1, size // 2), images) for size in images.shape[2:])
        scales = brisque_cpu.scales_of(code, images.resolve_neg().float(), across, down)
        sums = [brisque_cpu.sums_of(code, scale) for scale in scales]
    else:
        grey = _grey(images)
        scales = (grey, _halve(grey))
        sums = [_all_sums(scale, dtype) for scale in scales]
    return torch.stack([_with_count(*pair) for pair in zip(sums, scales, strict=True)], dim=1)


@cache
def _compiled() -> Callable[..., None] | None:
    """Return the C++ kernel, tried on a few pixels, or None; see :func:`built_or_none`."""

    def build() -> Callable[..., None]:
        code = brisque_cpu.build(_WINDOW, _LUMA, _LUMA_ONE, _C)
        with torch.device("cpu"):
            images = (torch.arange(3 * 35 * 37) * 7 % 256 / 255).view(1, 3, 35, 37)
            taps = [_taps(size, size // 2, images) for size in (37, 35)]
            scales, grey = brisque_cpu.scales_of(code, images, *taps), _grey(images)
            equal = torch.equal(scales[0], grey) and torch.equal(scales[1], _halve(grey))
            sums = brisque_cpu.sums_of(code, grey), _all_sums(grey, torch.float64)
        if not equal or not torch.allclose(*sums, rtol=1e-3):
            raise WrongNumbersError(f"sums {sums[0].flatten().tolist()} for {sums[1].flatten().tolist()}")
        return code

    return built_or_none("cpu", "BRISQUE's statistics", build)


def _with_count(sums: Tensor, scale: Tensor) -> Tensor:
    return torch.cat([sums, torch.ones_like(sums[..., :1]) * (scale.shape[-2] * scale.shape[-1])], dim=-1)


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64


def _grey(images: Tensor) -> Tensor:
    """Compute luminance (B, H, W), float32, in multiples of 1/255, of (B, 1 or 3, H, W)."""
    with without_grad():
        # floor(v + 1/2): integer arithmetic rounds halves up. Grey levels are integers already and stay what they are.
        grey = _luma(images.float().mul(255.0).round_().clamp_(0.0, 255.0)).add_(0.5).floor_()
    if torch.is_grad_enabled() and images.requires_grad:
        smooth = _luma(images.float().mul(255.0).clamp(0.0, 255.0))
        grey = grey + (smooth - smooth.detach())  # value of the rounded one, exactly; gradient of the smooth one
    return grey * _C


def _luma(levels: Tensor) -> Tensor:
    """Compute luminance (B, H, W) of levels (B, 1 or 3, H, W) in [0, 255]; 0 where a channel is NaN."""
    channels = levels.unbind(1)
    if len(channels) == 1:
        return channels[0].nan_to_num(0.0)
    total = channels[0] * _LUMA[0]
    total = total.add_(channels[1], alpha=_LUMA[1]).add_(channels[2], alpha=_LUMA[2])
    return total.mul_(1.0 / _LUMA_ONE).nan_to_num(0.0)


def _exact(x: Tensor) -> bool:
    """Return whether a fused multiply-add has to be spelled out, since compilers and ONNX round twice."""
    return (torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export()) and x.device.type != "mps"


def _add_scaled(total: Tensor, x: Tensor, weight: float) -> Tensor:
    """Compute total + weight · x with one rounding, and overwrite total."""
    if _exact(total):
        return (total.double() + weight * x.double()).float()
    return total.add_(x, alpha=weight)  # eager kernels fuse this


def _blur(padded: Tensor) -> Tensor:
    """Blur images (…, H + 6, W + 6), padded by 3, with the Gaussian window: (…, H, W)."""
    height, width = padded.shape[-2] - 6, padded.shape[-1] - 6
    # rows in sequence, columns from the centre outwards in pairs: the rounding errors of the reference
    rows = padded[..., :width] * _WINDOW[3]
    for i in range(1, 7):
        rows = _add_scaled(rows, padded[..., i : i + width], _WINDOW[abs(i - 3)])
    out = rows[..., 3 : 3 + height, :] * _WINDOW[0]
    for i in range(1, 4):
        pair = rows[..., 3 - i : 3 - i + height, :] + rows[..., 3 + i : 3 + i + height, :]
        out = _add_scaled(out, pair, _WINDOW[i])
    return out


def _normalized(grey: Tensor) -> Tensor:
    """Compute the mean-subtracted, contrast-normalized coefficients (B, H, W) by eq. (1)-(3)."""
    padded = F.pad(grey[:, None], (3, 3, 3, 3), mode="replicate")[:, 0]
    both = padded, padded * padded  # in a graph, at once: half as many operations
    mean, square = _blur(torch.stack(both)).unbind() if exporting() else map(_blur, both)
    variance = square - mean * mean
    # clamped above 0, since the square root has no gradient there (and is slow on negatives)
    deviation = variance.clamp(min=1e-14).sqrt()
    usable = variance.detach().sign().clamp_(max=0.0).add_(1.0)
    return (grey - mean).div_(deviation + _C).mul_(usable)


def _taps(size: int, half: int, like: Tensor) -> Tensor:
    """Compute the cubic weights (2, 4, half), a = -0.75, of the samples of a half-size image.

    Sample d lies between 2d + j and 2d + j + 1 with j in {0, 1} (1 in the far half of odd sizes) and reads the four
    samples from 2d + j - 1 on; entry [j] holds its weights, the other entry zeros.
    """
    d = torch.arange(half, device=like.device, dtype=_wide(like.device))
    position = (d + 0.5) * (size / half) - 0.5
    first = position.floor()
    x = position - first
    a = -0.75
    w0 = ((a * (x + 1) - 5 * a) * (x + 1) + 8 * a) * (x + 1) - 4 * a
    w1 = ((a + 2) * x - (a + 3)) * x * x + 1
    w2 = ((a + 2) * (1 - x) - (a + 3)) * (1 - x) * (1 - x) + 1
    weights = torch.stack([w0, w1, w2, 1 - w0 - w1 - w2])
    odd = first - 2.0 * d
    return torch.stack([weights * (1.0 - odd), weights * odd]).float()


def _halve(grey: Tensor) -> Tensor:
    """Interpolate cubically to half size (B, H, W), rounded down and at least 1, without anti-aliasing."""
    x = _every_second(grey, -1)
    w = _taps(grey.shape[-1], x[0].shape[-1], grey)
    # paired and fused as in the reference, see the second point at the top
    wide = _near_and_far(
        grey.shape[-1],
        lambda j: (x[j] * w[j, 0] + x[j + 1] * w[j, 1]) + (x[j + 2] * w[j, 2] + x[j + 3] * w[j, 3]),
    )
    y = _every_second(wide, -2)
    v = _taps(wide.shape[-2], y[0].shape[-2], grey)[..., None]
    return _near_and_far(
        wide.shape[-2],
        lambda j: _add_product(y[j + 1] * v[j, 1], y[j], v[j, 0]) + _add_product(y[j + 3] * v[j, 3], y[j + 2], v[j, 2]),
    )


def _near_and_far(size: int, term: Callable[[int], Tensor]) -> Tensor:
    """Sum of the terms of both halves (one is 0 in each sample); of an even size, all is near."""
    return term(0) if not in_graph() and size % 2 == 0 else term(0) + term(1)


def _every_second(x: Tensor, axis: int) -> tuple[Tensor, ...]:
    """Return views of the samples 2d - 1, …, 2d + 3 along an axis, d < size // 2 (at least 1), borders repeated."""
    # one pixel misses one to read; a trace must not compare sizes, so its images have at least two
    after = 3 if not torch.jit.is_tracing() and x.shape[axis] == 1 else 2
    padding = (1, after, 0, 0) if axis == -1 else (0, 0, 1, after)
    padded = F.pad(x[:, None], padding, mode="replicate")[:, 0]
    last = padded.shape[axis] - 4
    windows = [slice(first, last + first, 2) for first in range(5)]
    return tuple(padded[..., window] if axis == -1 else padded[..., window, :] for window in windows)


def _add_product(total: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    if _exact(total):
        return (total.double() + x.double() * weight.double()).float()
    return torch.addcmul(total, x, weight)


def _shape_ratios(like: Tensor) -> Tensor:
    """Compute r(α) = Γ(2/α)² / (Γ(1/α) Γ(3/α)) of the searched shapes, ascending: (9801,).

    Computed at each call, in a fraction of a millisecond: a cached tensor would have to know about devices, fake
    tensors and graph capture.
    """
    dtype = _wide(like.device)
    inverse = 1.0 / (_SHAPE_FIRST + _SHAPE_STEP * torch.arange(_SHAPE_COUNT, device=like.device, dtype=dtype))
    once, twice, thrice = log_gamma(torch.stack([inverse, 2.0 * inverse, 3.0 * inverse])).unbind()
    return (2.0 * twice - once - thrice).exp()


def _features(sums: Tensor, ratios: Tensor) -> Tensor:
    """Compute the 36 features (B, 36) of sums (B, 2, 5, 6), in the dtype of ``ratios``."""
    shape, mean, left, right = _fit(sums, ratios)
    first = torch.stack([shape[..., 0], (left[..., 0] + right[..., 0]) / 2], dim=-1)
    rest = torch.stack([part[..., 1:] for part in (shape, mean, left, right)], dim=-1)
    return torch.cat([first, rest.flatten(2)], dim=-1).flatten(1)


def _is_compiled(images: Tensor) -> bool:
    """Return whether C++ computes the features; the size of an image alone decides, so the batch has no influence."""
    if in_graph() or (torch.is_grad_enabled() and images.requires_grad) or images.device.type != "cpu":
        return False
    return may_read(images, large=images.shape[-2] * images.shape[-1] >= _MIN_PIXELS)


def _all_sums(grey: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute sums (B, 5, 5) of the normalized coefficients and of their products with four neighbours."""
    y = _normalized(grey)
    height, width = y.shape[-2:]
    if exporting():  # at once, in a fifth of the operations; zeros beyond the border count nowhere
        around = F.pad(y, (0, 1, 1, 1))
        neighbours = [around[:, 1 + down :][:, :height, right:][..., :width] for down, right in _SHIFTS]
        return _sums(torch.stack([y, *(y * neighbour for neighbour in neighbours)], dim=1), dtype)
    sums = [_sums(y, dtype)]
    for down, right in _SHIFTS:
        top, bottom = max(0, -down), max(0, down)
        pixels = y[:, top : height - bottom, : width - right]
        neighbour = y[:, bottom : height - top, right:]
        sums.append(_sums(pixels * neighbour, dtype))
    return torch.stack(sums, dim=1)


def _sums(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum each image of x (…, H, W): squares left and right of 0, magnitudes, numbers left, right; (…, 5)."""

    def total(t: Tensor) -> Tensor:
        return t.sum(-1).sum(-1, dtype=dtype)  # rows first: the order of summation is the same in every batch

    def squares(t: Tensor) -> Tensor:
        return torch.linalg.vector_norm(t, dim=-1).to(dtype).square()  # reads once; t * t would be written first

    left, right = x.clamp(max=0.0), x.clamp(min=0.0)
    sign = x.detach().sign()
    balance, used = total(sign), squares(sign).round().sum(-1)  # right - left, right + left
    magnitudes = total(right) - total(left)
    return torch.stack(
        [squares(left).sum(-1), squares(right).sum(-1), magnitudes, (used - balance) / 2, (used + balance) / 2], dim=-1
    )


def _fit(sums: Tensor, ratios: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fit asymmetric generalized Gaussians by moments (Lasmar, Stitou, Berthoumieu, 2009) to sums (…, 6).

    Returns:
        shape, mean, left variance, right variance, each (…).
    """
    # products over the border count as zeros: each mean is over all pixels
    left_squares, right_squares, magnitudes, lefts, rights, pixels = sums.unbind(-1)
    left, right = left_squares / lefts.clamp(min=1.0), right_squares / rights.clamp(min=1.0)
    tiny = 1e-30  # under the roots for their gradient; in divisors where all samples are 0
    left_deviation, right_deviation = (left + tiny).sqrt(), (right + tiny).sqrt()
    with without_grad():
        squares = left_squares + right_squares
        ratio = (magnitudes / pixels).square() / (squares / pixels).clamp(min=tiny)
        # symmetric form of (γ³ + 1)(γ + 1) / (γ² + 1)², γ = left / right
        skew = (
            (left_deviation**3 + right_deviation**3) * (left_deviation + right_deviation) / (left + right + tiny) ** 2
        )
        # a side without samples: the reference has NaN, and its search ends at the largest shape
        ratio = torch.where((lefts > 0) & (rights > 0), ratio * skew, torch.ones_like(ratio))
        # the nearest entry, the larger of two equally near: as a search upwards that stops when it gets worse
        nearest = count_up_to((ratios[1:] + ratios[:-1]) / 2, ratio)
        shape = _SHAPE_FIRST + _SHAPE_STEP * nearest
        scale = ratios[nearest].sqrt()
    # Γ(2/α)/Γ(1/α) · sqrt(Γ(1/α)/Γ(3/α)) of the mean, eq. (13)-(16), is sqrt(r(α))
    return shape.to(sums.dtype), (right_deviation - left_deviation) * scale, left, right
