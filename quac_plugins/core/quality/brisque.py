"""BRISQUE: 36 natural-scene statistics of an image (Mittal, Moorthy, Bovik, IEEE TIP 21(12), 2012), batched.

The reference is OpenCV's ``cv2.quality.QualityBRISQUE_computeFeatures``. Three of its habits decide the numbers as much
as the paper does, and are kept:

1. It reads 8-bit pictures and rounds the luminance to 8 bits. So do we, whatever the dtype of the images.
2. It counts how many coefficients lie left and right of zero. Where a picture is flat, coefficients are rounding errors,
   and their *sign* decides; so the local means are summed in the same order with fused multiply-adds.
3. Where rounding makes a local variance negative, the coefficient is 0.

Everything is elementwise operations, slices and sums: no convolution or matrix product, hence nothing that autocast or
TF32 rounds coarser, and a result that does not depend on what else is in the batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from quac_plugins.core.quality.table import quality_function

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


@quality_function("brisque", channels=36)
def brisque(images: Tensor) -> Tensor:
    """Compute the 36 BRISQUE features of each image, without the support vector machine that makes a score of them.

    For each of two scales (full and half size), 18 numbers: shape α and variance of the normalized luminance, then for
    the products of neighbours in the directions horizontal, vertical and the two diagonals: shape, mean, left variance,
    right variance of an asymmetric generalized Gaussian.

    Args:
        images: (B, 3, H, W) RGB or (B, 1, H, W) grey, any floating dtype, values in [0, 1], any H, W ≥ 1. Values outside
            are clamped, ±inf with them; a pixel with a NaN in any channel is black. Values are rounded to 8 bits.

    Returns:
        (B, 36) on the device of the images, float64 for float64 images and float32 otherwise, always finite. Shapes lie in
        [0.2, 10], variances are ≥ 0. A side of a distribution that has no samples has variance 0; a constant image gives
        shapes of 10 and zeros elsewhere (OpenCV: 10 and NaN).

    Raises:
        TypeError: ``images`` is not a tensor, or not of a floating dtype.
        ValueError: ``images`` is not (B, 3, H, W) or (B, 1, H, W), or has no pixels.

    Note:
        Pixels are processed in float32 and statistics in float64, also for images of other dtypes and under autocast. If
        the images require a gradient, it flows through variances and means (rounding to 8 bits passes it straight
        through); the shapes, found by table look-up, contribute none.

    Example:
        >>> ramp = torch.linspace(0, 1, 64).expand(2, 3, 64, 64)
        >>> brisque(ramp).shape
        torch.Size([2, 36])
        >>> brisque(torch.full((1, 3, 32, 32), 0.5))[0, :4].tolist()
        [10.0, 0.0, 10.0, 0.0]
    """
    _check(images)
    grey = _grey(images)
    ratios = _shape_ratios(grey)
    features = torch.cat([_statistics(grey, ratios), _statistics(_halve(grey), ratios)], dim=1)
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


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64


def _grey(images: Tensor) -> Tensor:
    """(B, 1 or 3, H, W) → luminance (B, H, W), float32, multiples of 1/255."""
    with torch.no_grad():
        grey = _luma(images.float().mul(255.0).round())
    if torch.is_grad_enabled() and images.requires_grad:
        smooth = _luma_smooth(images.float().mul(255.0))
        grey = grey + (smooth - smooth.detach())  # value of the rounded one, exactly; gradient of the smooth one
    return grey * _C


def _luma_smooth(levels: Tensor) -> Tensor:
    levels = levels.clamp(0.0, 255.0)
    if levels.shape[1] == 1:
        return levels[:, 0].nan_to_num(0.0)
    red, green, blue = levels.unbind(1)
    return ((red * _LUMA[0] + green * _LUMA[1] + blue * _LUMA[2]) / _LUMA_ONE).nan_to_num(0.0)


def _luma(levels: Tensor) -> Tensor:
    # floor(v + 1/2): integer arithmetic rounds halves up. Grey levels are integers already and stay what they are.
    return (_luma_smooth(levels) + 0.5).floor()


def _exact() -> bool:
    """Whether a fused multiply-add has to be spelled out, since the compiler would round twice."""
    is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)
    return torch.compiler.is_compiling() and not is_exporting()


def _add_scaled(total: Tensor, x: Tensor, weight: float) -> Tensor:
    """total + weight · x with one rounding."""
    if _exact() and total.device.type != "mps":
        return (total.double() + weight * x.double()).float()
    return torch.add(total, x, alpha=weight)  # eager kernels fuse this


def _blur(padded: Tensor) -> Tensor:
    """Gaussian window on images (B, H + 6, W + 6) that were padded by 3; (B, H, W)."""
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
    """Mean-subtracted, contrast-normalized coefficients, eq. (1)-(3); (B, H, W)."""
    padded = F.pad(grey[:, None], (3, 3, 3, 3), mode="replicate")[:, 0]
    mean = _blur(padded)
    variance = _blur(padded * padded) - mean * mean
    # clamped above 0, since the square root has no gradient there (and is slow on negatives)
    deviation = variance.clamp(min=1e-14).sqrt()
    usable = 1.0 + variance.detach().sign().clamp(max=0.0)
    return (grey - mean) / (deviation + _C) * usable


def _taps(size: int, half: int, like: Tensor) -> Tensor:
    """Cubic weights (a = -0.75) of the samples of a half-size image; (2, 4, half).

    Sample d lies between 2d + j and 2d + j + 1 with j in {0, 1} (1 in the far half of odd sizes) and reads the four
    samples from 2d + j - 1 on; entry [j] holds its weights, the other entry zeros.
    """
    d = torch.arange(half, device=like.device, dtype=_wide(like.device))
    # rounded to float32 as in the reference, which shows at the far end of odd sizes
    position = ((d + 0.5) * (size / half) - 0.5).float()
    first = position.floor()
    x = position - first
    a = -0.75
    w0 = ((a * (x + 1) - 5 * a) * (x + 1) + 8 * a) * (x + 1) - 4 * a
    w1 = ((a + 2) * x - (a + 3)) * x * x + 1
    w2 = ((a + 2) * (1 - x) - (a + 3)) * (1 - x) * (1 - x) + 1
    weights = torch.stack([w0, w1, w2, 1 - w0 - w1 - w2])
    odd = first - 2.0 * d.float()
    return torch.stack([weights * (1.0 - odd), weights * odd])


def _halve(grey: Tensor) -> Tensor:
    """Cubic interpolation to half size, rounded down and at least 1, without anti-aliasing; (B, H, W)."""
    height, width = grey.shape[-2:]
    rows, columns = torch.sym_max(height // 2, 1), torch.sym_max(width // 2, 1)
    padded = F.pad(grey[:, None], (1, 3, 1, 3), mode="replicate")[:, 0]
    x = [padded[..., k : k + 2 * columns - 1 : 2] for k in range(5)]
    w = _taps(width, columns, grey)
    # paired and fused as in the reference, see the second point at the top; of each sum over j one term is 0
    wide = sum((x[j] * w[j, 0] + x[j + 1] * w[j, 1]) + (x[j + 2] * w[j, 2] + x[j + 3] * w[j, 3]) for j in (0, 1))
    y = [wide[:, k : k + 2 * rows - 1 : 2] for k in range(5)]
    w = _taps(height, rows, grey)[..., None]
    return sum(
        _add_product(y[j + 1] * w[j, 1], y[j], w[j, 0]) + _add_product(y[j + 3] * w[j, 3], y[j + 2], w[j, 2])
        for j in (0, 1)
    )


def _add_product(total: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    if _exact() and total.device.type != "mps":
        return (total.double() + x.double() * weight.double()).float()
    return torch.addcmul(total, x, weight)


def _shape_ratios(like: Tensor) -> Tensor:
    """r(α) = Γ(2/α)² / (Γ(1/α) Γ(3/α)) of the searched shapes, ascending; (9801,).

    Computed at each call, in a fraction of a millisecond: a cached tensor would have to know about devices, fake tensors
    and graph capture.
    """
    dtype = _wide(like.device)
    inverse = 1.0 / (_SHAPE_FIRST + _SHAPE_STEP * torch.arange(_SHAPE_COUNT, device=like.device, dtype=dtype))
    return (2.0 * torch.lgamma(2.0 * inverse) - torch.lgamma(inverse) - torch.lgamma(3.0 * inverse)).exp()


def _statistics(grey: Tensor, ratios: Tensor) -> Tensor:
    """The 18 features of one scale; (B, 18), in the dtype of ``ratios``."""
    y = _normalized(grey)
    height, width = y.shape[-2:]
    sums = [_sums(y, ratios.dtype)]
    for down, right in _SHIFTS:
        top, bottom = max(0, -down), max(0, down)
        here = y[:, top : height - bottom, : width - right]
        there = y[:, bottom : height - top, right:]
        sums.append(_sums(here * there, ratios.dtype))
    # products over the border count as zeros: each mean is over all pixels
    shape, mean, left, right_ = _fit(torch.stack(sums, dim=1), height * width, ratios)
    first = torch.stack([shape[:, 0], (left[:, 0] + right_[:, 0]) / 2], dim=1)
    rest = torch.stack([shape[:, 1:], mean[:, 1:], left[:, 1:], right_[:, 1:]], dim=2)
    return torch.cat([first, rest.flatten(1)], dim=1)


def _sums(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Of each image of x (B, H, W): sums of squares left and right of 0, of magnitudes, numbers left, right; (B, 5)."""

    def total(t: Tensor) -> Tensor:
        return t.sum(-1).sum(-1, dtype=dtype)  # rows first: the order of summation is the same in every batch

    left, right = x.clamp(max=0.0), x.clamp(min=0.0)
    return torch.stack(
        [
            total(left * left),
            total(right * right),
            total(right) - total(left),
            -total(left.detach().sign()),
            total(right.detach().sign()),
        ],
        dim=1,
    )


def _fit(sums: Tensor, pixels: int, ratios: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fit asymmetric generalized Gaussians by moments (Lasmar, Stitou, Berthoumieu, 2009) to sums (B, N, 5).

    Returns:
        shape, mean, left variance, right variance, each (B, N).
    """
    left_squares, right_squares, magnitudes, lefts, rights = sums.unbind(-1)
    left, right = left_squares / lefts.clamp(min=1.0), right_squares / rights.clamp(min=1.0)
    tiny = 1e-30  # under the roots for their gradient; in divisors where all samples are 0
    left_deviation, right_deviation = (left + tiny).sqrt(), (right + tiny).sqrt()
    with torch.no_grad():
        squares = left_squares + right_squares
        ratio = (magnitudes / pixels).square() / (squares / pixels).clamp(min=tiny)
        # symmetric form of (γ³ + 1)(γ + 1) / (γ² + 1)², γ = left / right: no division by a side without samples
        skew = (
            (left_deviation**3 + right_deviation**3) * (left_deviation + right_deviation) / (left + right + tiny) ** 2
        )
        ratio = torch.where(squares > 0, ratio * skew, torch.ones_like(ratio))
        # the nearest entry, the larger of two equally near: as a search upwards that stops when it gets worse
        nearest = torch.searchsorted((ratios[1:] + ratios[:-1]) / 2, ratio, right=True)
        shape = _SHAPE_FIRST + _SHAPE_STEP * nearest
        scale = ratios[nearest].sqrt()
    # Γ(2/α)/Γ(1/α) · sqrt(Γ(1/α)/Γ(3/α)) of the mean, eq. (13)-(16), is sqrt(r(α))
    return shape.to(sums.dtype), (right_deviation - left_deviation) * scale, left, right
