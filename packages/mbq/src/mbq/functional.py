"""The mathematics of MBQ (arXiv 2412.19509) as pure tensor functions: quantisers, scales, objective, sensitivities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from pared_kernels.bitstream import pack_dense, unpack_dense
from pared_kernels.ops.mbq_linear_w4a8 import reference as w4a8
from pared_kernels.ops.mbq_linear_w16 import reference as w16
from torch import Tensor

__all__ = [
    "LossSums",
    "QuantizedWeight",
    "channel_scale",
    "combine_losses",
    "dequantize_weight",
    "fake_quantize_activation",
    "fake_quantize_weight",
    "fold",
    "layer_weights",
    "linear_w4a8",
    "linear_w16",
    "loss_sums",
    "pack_dense",
    "quantize_activation",
    "quantize_weight",
    "reconstruction_loss",
    "smooth_scale",
    "token_sensitivity",
    "unpack_dense",
]

SMALLEST_RANGE = 1e-5
SMALLEST_SCALE = 1e-4

Mode = Literal["mae", "mse"]
FoldKind = Literal["norm", "norm_plus_one", "rows"]


class QuantizedWeight(NamedTuple):
    """Codes of a weight with what turns them back into numbers: (codes - zero) * scale for each group."""

    codes: Tensor
    """Unsigned codes, uint8 (N, K)."""
    scales: Tensor
    """(N, G), in the dtype they are stored in."""
    zeros: Tensor | None
    """uint8 (N, G); None for symmetric codes, whose zero is 2^(bits - 1)."""
    bits: int
    group_size: int
    """Input channels that share a scale; -1 for all of a row."""
    symmetric: bool


def quantize_weight(
    w: Tensor,
    bits: int,
    group_size: int,
    symmetric: bool = False,
    include_zero: bool = True,
    scale_dtype: torch.dtype = torch.float32,
    clip: Tensor | None = None,
) -> QuantizedWeight:
    """Round a weight to `bits` bits per entry (section 3.1 of the paper's supplement: min-max, round half to even).

    Args:
        w: (N, K) floating; computed in float32 (float64 stays).
        bits: 2 to 8.
        group_size: input channels that share a scale, a divisor of K; -1: one scale a row.
        symmetric: codes around zero, scale max |w| / (2^(b-1) - 1); else min-max with a zero point.
        include_zero: let the range of a group hold zero. Without it a group of one sign saturates (the paper's code).
        scale_dtype: scales are rounded to it before codes and zero points are computed from them, so that what is
            stored is what was meant.
        clip: (N, G) shares of the range to keep; None: all.

    Raises:
        ValueError: for bits, a group size or a clip that do not fit.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"bits = {bits!r} is not valid: 2 to 8")
    if w.dim() != 2 or not w.is_floating_point():
        raise ValueError(f"w of shape {tuple(w.shape)} and {w.dtype} is not valid: a floating (N, K) tensor")
    rows, columns = w.shape
    size = columns if group_size == -1 else group_size
    if size < 1 or columns % size:
        raise ValueError(f"group_size = {group_size!r} is not valid: -1 or a divisor of the {columns} input channels")
    wide = w if w.dtype == torch.float64 else w.float()
    groups = wide.reshape(rows, -1, size)
    if clip is not None and clip.shape != groups.shape[:2]:
        raise ValueError(f"clip of shape {tuple(clip.shape)} is not valid: {tuple(groups.shape[:2])}")
    kept = 1.0 if clip is None else clip.to(wide)
    if symmetric:
        largest = 2 ** (bits - 1) - 1
        extent = (groups.abs().amax(-1) * kept).clamp(min=SMALLEST_RANGE)
        scales = _rounded(extent / largest, scale_dtype)
        signed = (groups / scales.to(wide)[..., None]).round().clamp(-largest - 1, largest)
        codes = (signed + (largest + 1)).to(torch.uint8).view(rows, columns)
        return QuantizedWeight(codes, scales, None, bits, group_size, True)
    high, low = groups.amax(-1) * kept, groups.amin(-1) * kept
    if include_zero:
        high, low = high.clamp(min=0), low.clamp(max=0)
    levels = 2**bits - 1
    scales = _rounded((high - low).clamp(min=SMALLEST_RANGE) / levels, scale_dtype)
    exact = scales.to(wide)
    zeros = (-(low / exact).round()).clamp(0, levels)
    codes = ((groups / exact[..., None]).round() + zeros[..., None]).clamp(0, levels)
    return QuantizedWeight(
        codes.to(torch.uint8).view(rows, columns), scales, zeros.to(torch.uint8), bits, group_size, False
    )


def _rounded(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales in `dtype`; one that float16 would round to zero becomes the smallest number it has."""
    stored = scales.to(dtype)
    if dtype == torch.float16:
        stored = stored.clamp(min=2.0**-24, max=torch.finfo(dtype).max)
    return stored


def dequantize_weight(qw: QuantizedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return (codes - zero) * scale as (N, K) in `dtype`; the product is computed in it, at least in float32."""
    rows, columns = qw.codes.shape
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    codes = qw.codes.to(wide).view(rows, qw.scales.shape[1], -1)
    zeros = 2 ** (qw.bits - 1) if qw.zeros is None else qw.zeros.to(wide)[..., None]
    return ((codes - zeros) * qw.scales.to(wide)[..., None]).view(rows, columns).to(dtype)


def fake_quantize_weight(
    w: Tensor, bits: int, group_size: int, symmetric: bool = False, include_zero: bool = True
) -> Tensor:
    """Return `w` (N, K) after quantising with float32 scales and dequantising, in its dtype."""
    wide = torch.float64 if w.dtype == torch.float64 else torch.float32
    qw = quantize_weight(w, bits, group_size, symmetric, include_zero)
    return dequantize_weight(qw, wide).to(w.dtype)


def quantize_activation(x: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Return codes int8 like x and float32 scales (..., 1): symmetric per token over the last dimension.

    Raises:
        ValueError: for bits outside 2 to 8.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"bits = {bits!r} is not valid: 2 to 8")
    return w4a8.quantize_tokens(x, bits)


def fake_quantize_activation(x: Tensor, bits: int = 8) -> Tensor:
    """Return x (..., K) after quantising per token and dequantising, in its dtype."""
    codes, scale = quantize_activation(x, bits)
    return (codes.to(scale.dtype) * scale).to(x.dtype)


def channel_scale(mean_abs: Tensor, ratio: float) -> Tensor:
    """Return s (K,) = clamp(m^ratio, min 1e-4) / sqrt(max s * min s) for mean magnitudes m (K,); ratio 0 gives ones."""
    scale = mean_abs.pow(ratio).clamp(min=SMALLEST_SCALE)
    return scale / (scale.max() * scale.min()).sqrt()


def smooth_scale(max_abs: Tensor, weight_max: Tensor, alpha: float = 0.5) -> Tensor:
    """Return SmoothQuant's s (K,) = max|x|^alpha / max|w|^(1 - alpha), its eq. 4, for maxima over tokens and rows."""
    return (max_abs.clamp(min=SMALLEST_RANGE) ** alpha / weight_max.clamp(min=SMALLEST_RANGE) ** (1 - alpha)).clamp(
        min=SMALLEST_RANGE
    )


class LossSums(NamedTuple):
    """Sums of |D| (mae) or D^2 (mse) over elements, with the number of elements: answer, vision, all."""

    answer: Tensor
    vision: Tensor
    every: Tensor
    answer_count: int
    vision_count: int
    every_count: int

    def plus(self, other: LossSums) -> LossSums:
        """Sums over both parts of the data."""
        return LossSums(
            self.answer + other.answer,
            self.vision + other.vision,
            self.every + other.every,
            self.answer_count + other.answer_count,
            self.vision_count + other.vision_count,
            self.every_count + other.every_count,
        )


def loss_sums(
    ref: Tensor,
    out: Tensor,
    answer_mask: Tensor | None = None,
    vision_mask: Tensor | None = None,
    mode: Mode = "mae",
    token_weight: Tensor | None = None,
) -> LossSums:
    """Sum up the error of `out` against `ref` (B, T, C) by modality, in float64; masks bool (B, T).

    `token_weight` (B, T) multiplies the error of each token before it is summed.
    """
    if mode not in ("mae", "mse"):
        raise ValueError(f"mode = {mode!r} is not valid: 'mae' or 'mse'")
    difference = ref.float() - out.float()
    per_token = (difference.abs() if mode == "mae" else difference.square()).sum(-1, dtype=torch.float64)
    if token_weight is not None:
        per_token = per_token * token_weight.to(per_token)
    channels, zero = ref.shape[-1], per_token.new_zeros(())
    sums, counts = [], []
    for mask in (answer_mask, vision_mask):
        sums.append(zero if mask is None else (per_token * mask).sum())
        counts.append(0 if mask is None else int(mask.sum()) * channels)
    return LossSums(sums[0], sums[1], per_token.sum(), counts[0], counts[1], ref.numel())


def combine_losses(sums: LossSums, weight: float | None, mode: Mode) -> Tensor:
    """Return the objective of section 3.4 from `sums`, float32; `weight` is lambda, None for the plain mean.

    "mae": (sum |D| answer + lambda sum |D| vision) / (elements of both). "mse": mean D^2 over the answer plus lambda
    times that over vision. Both are as in the paper's code; they differ in more than the norm.
    """
    if weight is None:
        return (sums.every / max(sums.every_count, 1)).float()
    if mode == "mae":
        count = max(sums.answer_count + sums.vision_count, 1)
        return ((sums.answer + weight * sums.vision) / count).float()
    answer = sums.answer / max(sums.answer_count, 1)
    return (answer + weight * sums.vision / max(sums.vision_count, 1)).float()


def reconstruction_loss(
    ref: Tensor,
    out: Tensor,
    answer_mask: Tensor | None = None,
    vision_mask: Tensor | None = None,
    weight: float | None = None,
    mode: Mode = "mae",
) -> Tensor:
    """Return how far `out` is from `ref` (B, T, C), weighted by modality (section 3.4), as a float32 scalar.

    Masks are bool (B, T). `weight` is lambda, the weight of vision tokens; None gives the plain mean over everything.

    Raises:
        ValueError: for another mode, shapes that differ, or a weight without masks.
    """
    if ref.shape != out.shape:
        raise ValueError(f"out of shape {tuple(out.shape)} is not valid: that of ref, {tuple(ref.shape)}")
    if weight is not None and (answer_mask is None or vision_mask is None):
        raise ValueError(f"weight = {weight!r} is not valid without answer_mask and vision_mask")
    return combine_losses(loss_sums(ref, out, answer_mask, vision_mask, mode), weight, mode)


def token_sensitivity(grad: Tensor, mask: Tensor) -> Tensor:
    """Return mean |grad| (B,) over the masked positions and all channels; grad (B, T, C), mask bool (B, T).

    NaN for a sample whose mask is empty.
    """
    per_token = grad.float().abs().sum(-1) * mask
    return per_token.sum(-1) / (mask.sum(-1) * grad.shape[-1])


def layer_weights(
    vision: Sequence[float], answer: Sequence[float], floor: Literal["median"] | None = "median"
) -> list[float]:
    """Return lambda of each layer: mean |g| of vision over that of answer tokens, at least the median over layers.

    `floor=None` leaves out that minimum, which is in the paper's code and not in its text.

    Raises:
        ValueError: for lists of different length, another floor, or an answer sensitivity that is not positive.
    """
    if len(vision) != len(answer):
        raise ValueError(f"vision has {len(vision)} layers and answer {len(answer)}; they must be equal")
    if floor not in ("median", None):
        raise ValueError(f"floor = {floor!r} is not valid: 'median' or None")
    for index, value in enumerate(answer):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"answer[{index}] = {value!r} is not valid: a positive number")
    ratios = [float(v) / float(a) for v, a in zip(vision, answer, strict=True)]
    if floor is None or not ratios:
        return ratios
    middle = sorted(ratios)
    half = len(middle) // 2
    median = middle[half] if len(middle) % 2 else (middle[half - 1] + middle[half]) / 2
    return [max(ratio, median) for ratio in ratios]


def fold(prev_weight: Tensor, scale: Tensor, kind: FoldKind) -> Tensor:
    """Return the weight (or bias) of the preceding operation, its outputs divided by `scale` (section 3.7).

    "norm": w / s. "norm_plus_one": (1 + w) / s - 1, for norms that multiply by 1 + weight. "rows": the last len(s) rows
    of a matrix (entries of a bias) divided by s.

    Raises:
        ValueError: for another kind, or a scale that does not fit.
    """
    size = scale.shape[0]
    if kind not in ("norm", "norm_plus_one", "rows"):
        raise ValueError(f"kind = {kind!r} is not valid: 'norm', 'norm_plus_one' or 'rows'")
    if prev_weight.shape[0] < size or (kind != "rows" and prev_weight.shape != scale.shape):
        raise ValueError(f"scale of {size} entries does not fit a weight of shape {tuple(prev_weight.shape)}")
    if kind == "norm":
        return prev_weight / scale
    if kind == "norm_plus_one":
        return (1 + prev_weight) / scale - 1
    folded = prev_weight.clone()
    folded[-size:] /= scale.view(-1, *[1] * (prev_weight.dim() - 1))
    return folded


def linear_w16(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    bias: Tensor | None = None,
) -> Tensor:
    """Return x W^T + bias for a packed weight: what the kernels are measured against.

    x (..., K); packed int32 (N, ceil(K bits / 32)) as by `pack_dense`; scales (N, G); zeros uint8 (N, G), or packed
    along dim 0 as they are stored, int32 (ceil(N bits / 32), G), or None for symmetric codes; group_size -1 for one
    group a row.
    """
    columns = x.shape[-1]
    if zeros is not None and zeros.dtype != torch.int32:
        zeros = pack_dense(zeros, bits, dim=0)
    flat = x.reshape(-1, columns)
    size = columns if group_size == -1 else group_size
    return w16.mbq_linear_w16(flat, packed, scales, zeros, bits, size, bias).view(*x.shape[:-1], -1)


def linear_w4a8(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the product of x (..., K), quantised per token to 8 bits, with a packed symmetric 4-bit weight.

    packed int32 (N, ceil(K / 8)); scales (N, 1) or (N,). The integer sums are exact.
    """
    flat = x.reshape(-1, x.shape[-1])
    return w4a8.mbq_linear_w4a8(flat, packed, scales.view(-1, 1), bias).view(*x.shape[:-1], -1)
