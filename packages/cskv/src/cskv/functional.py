"""The mathematics of CSKV (arXiv 2409.10593) as tensor functions: no model, no state.

Symbols: x (..., d) is the input of the key and value projections W (d_kv, d); A (r, d) compresses, B (d_kv, r)
rebuilds: c = A x, k_hat = B c. Shapes name B batch, H_q query heads, H_kv key-value heads, T tokens, D channels of a
head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Axis = Literal["token", "channel"]
ZeroPoint = Literal["affine", "clamped"]

SMALLEST_RANGE = 1e-5
"""A group whose values span less than this is quantised as if it spanned this much."""

BEYOND_FLOAT16 = "x has values beyond the range of float16, or that are not finite; it cannot be quantised"

QUERY_BLOCK = 256
"""Queries that `bibranch_attention` scores at once."""


# Factors (section 3.1, 3.2)


def rank_from_density(density: float, num_kv_heads: int, head_dim: int) -> int:
    """Rank that keeps a share `density` of the channels: int(density * head_dim) per head, at least 1, times the heads.

    Raises ValueError for a density outside (0, 1] or a size below 1.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density = {density!r} is not valid: a share in (0, 1]")
    for name, size in (("num_kv_heads", num_kv_heads), ("head_dim", head_dim)):
        if size < 1:
            raise ValueError(f"{name} = {size!r} is not valid: at least 1")
    return max(int(density * head_dim), 1) * num_kv_heads


def svd_factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best factors of the weight itself: W = U S V^T, B = U_r sqrt(S_r), A = sqrt(S_r) V_r^T (section 3.2).

    `weight`: (d_out, d_in), floating point. Returns a (rank, d_in) and b (d_out, rank) in its dtype; computed in
    float32 or better. Raises ValueError for a rank outside 1 .. min(d_out, d_in) or a weight that is not finite.
    """
    exact = _exact_weight(weight, rank)
    a, b = _balanced(exact, rank)
    return a.to(weight.dtype), b.to(weight.dtype)


def asvd_factors(
    weight: Tensor, rank: int, input_abs_mean: Tensor, *, alpha: float = 0.5, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Factors of W diag(s), with s = (mean |x| + eps)^alpha undone in A (ASVD, section 3.2).

    `weight`: (d_out, d_in); `input_abs_mean`: (d_in,), of any positive scale. Returns a (rank, d_in), b (d_out, rank)
    in the weight's dtype. Raises ValueError as `svd_factors` does, and for means that are negative or not finite.
    """
    exact = _exact_weight(weight, rank)
    means = input_abs_mean.to(exact)
    if means.shape != exact.shape[1:]:
        raise ValueError(f"input_abs_mean has shape {tuple(means.shape)}; ({exact.shape[1]},) is needed")
    if not bool(torch.isfinite(means).all()) or bool((means < 0).any()):
        raise ValueError("input_abs_mean must be finite and at least 0 in every channel")
    scale = (means + eps).pow(alpha)
    a, b = _balanced(exact * scale, rank)
    return (a / scale).to(weight.dtype), b.to(weight.dtype)


def whitened_factors(weight: Tensor, rank: int, second_moment: Tensor, *, ridge: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Factors that minimise tr((W - BA) M (W - BA)^T), M = E[x x^T] + ridge * mean(diag) * I (section 3.2).

    This is the least-squares problem of the paper's loss, solved in closed form: SVD of W M^(1/2), with M^(-1/2) undone
    in A. `weight`: (d_out, d_in); `second_moment`: (d_in, d_in), symmetric. Returns a (rank, d_in), b (d_out, rank) in
    the weight's dtype; computed in float64. Raises ValueError as `svd_factors` does, and for a moment of another shape
    or with entries that are not finite.
    """
    exact = _exact_weight(weight, rank).double()
    root, inverse = moment_roots(second_moment, ridge)
    if root.shape[0] != exact.shape[1]:
        raise ValueError(f"second_moment has shape {tuple(root.shape)}; ({exact.shape[1]}, {exact.shape[1]}) is needed")
    a, b = _balanced(exact @ root, rank)
    return (a @ inverse).to(weight.dtype), b.to(weight.dtype)


def moment_roots(second_moment: Tensor, ridge: float = 1e-6) -> tuple[Tensor, Tensor]:
    """M^(1/2) and M^(-1/2), float64, of M = second_moment + ridge * mean(diag) * I; both (d, d).

    Raises ValueError for a matrix that is not square, not finite, or zero.
    """
    moment = second_moment.double()
    if moment.ndim != 2 or moment.shape[0] != moment.shape[1]:
        raise ValueError(f"second_moment has shape {tuple(moment.shape)}; a square matrix is needed")
    if not bool(torch.isfinite(moment).all()):
        raise ValueError("second_moment must be finite in every entry")
    floor = ridge * moment.diagonal().mean()
    if not float(floor) > 0:
        raise ValueError("second_moment must have a positive trace, and ridge must be positive")
    values, vectors = torch.linalg.eigh((moment + moment.T) / 2)
    # Rounding may leave eigenvalues of a semidefinite matrix slightly below zero.
    values = values.clamp(min=0) + floor
    return (vectors * values.sqrt()) @ vectors.T, (vectors * values.rsqrt()) @ vectors.T


def _exact_weight(weight: Tensor, rank: int) -> Tensor:
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(f"weight is {tuple(weight.shape)} of {weight.dtype}; a floating-point matrix is needed")
    if not 1 <= rank <= min(weight.shape):
        raise ValueError(f"rank = {rank!r} is not valid: 1 to {min(weight.shape)} for a weight {tuple(weight.shape)}")
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("weight must be finite in every entry")
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))


def _balanced(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Rank-`rank` factors (A, B) of the matrix with the singular values shared evenly."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    root = s[:rank].sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root


# Quantisation of latents (section 3.5)


@dataclass(frozen=True)
class PackedMeta:
    """How a `Packed` tensor is to be read. `shape` is that of the tensor that was quantised."""

    shape: tuple[int, ...]
    bits: int
    axis: Axis
    group_size: int
    zero_point: ZeroPoint
    dtype: torch.dtype


@dataclass(frozen=True)
class Packed:
    """A quantised tensor (..., T, C): `codes` uint8 (..., T, bytes), `scale` and `offset` float16, one per group.

    Groups of axis "channel" give (..., T / group_size, C), groups of axis "token" (..., T, C / group_size). `offset` is
    the group's minimum ("affine") or the integer zero point ("clamped").
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor
    meta: PackedMeta

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and offsets."""
        return self.codes.nbytes + self.scale.nbytes + self.offset.nbytes


def fake_quantize(x: Tensor, *, bits: int, axis: Axis, group_size: int, zero_point: ZeroPoint = "affine") -> Tensor:
    """Round to the values that `bits` bits can hold, keeping shape and dtype (section 3.5).

    `x`: (..., T, C). Axis "token" groups `group_size` channels inside a token, axis "channel" groups `group_size`
    tokens of one channel. The gradient passes straight through; with "clamped", not where the value lies at or beyond
    the ends of what the group can represent. Raises ValueError for bits outside 1 .. 8, an unknown axis or zero point,
    or a group size that does not divide its axis.
    """
    groups, axis_of_group = _grouped(x, bits, axis, group_size, zero_point)
    exact = groups.to(torch.promote_types(x.dtype, torch.float32))
    codes, scale, offset = _codes(exact.detach(), bits, axis_of_group, zero_point)
    if zero_point == "affine":
        rounded = codes * scale + offset
        passed = exact
    else:
        rounded = (codes - offset) * scale
        inside = (exact < scale * (2**bits - 1 - offset)) & (exact > -scale * offset)
        passed = torch.where(inside, exact, exact.detach())
    if x.requires_grad:
        rounded = rounded + (passed - passed.detach())
    return rounded.reshape(x.shape).to(x.dtype)


def quantize(x: Tensor, *, bits: int, axis: Axis, group_size: int, zero_point: ZeroPoint = "affine") -> Packed:
    """Quantise and pack: the codes of `fake_quantize`, 8 // bits of them in a byte, scale and offset in float16.

    `x`: (..., T, C); bits 2, 4 or 8. Raises ValueError as `fake_quantize` does, and when a scale or offset is beyond
    float16.
    """
    if bits not in (2, 4, 8):
        raise ValueError(f"bits = {bits!r} is not valid: 2, 4 or 8 can be packed")
    groups, axis_of_group = _grouped(x, bits, axis, group_size, zero_point)
    exact = groups.detach().to(torch.promote_types(x.dtype, torch.float32))
    codes, scale, offset = _codes(exact, bits, axis_of_group, zero_point)
    scale, offset = scale.squeeze(axis_of_group).half(), offset.squeeze(axis_of_group).half()
    if not bool(torch.isfinite(scale).all() & torch.isfinite(offset).all()):
        raise ValueError(BEYOND_FLOAT16)
    meta = PackedMeta(tuple(x.shape), bits, axis, group_size, zero_point, x.dtype)
    return Packed(_pack(codes.reshape(x.shape).to(torch.uint8), bits), scale, offset, meta)


def dequantize(packed: Packed) -> Tensor:
    """The tensor that `packed` stands for, in the shape and dtype that was quantised."""
    meta = packed.meta
    work = torch.promote_types(meta.dtype, torch.float32)
    codes = _unpack(packed.codes, meta.bits, meta.shape[-1])
    groups, axis_of_group = _grouped(codes, meta.bits, meta.axis, meta.group_size, meta.zero_point)
    scale = packed.scale.unsqueeze(axis_of_group).to(work)
    offset = packed.offset.unsqueeze(axis_of_group).to(work)
    values = groups.to(work)
    values = values * scale + offset if meta.zero_point == "affine" else (values - offset) * scale
    return values.reshape(meta.shape).to(meta.dtype)


def _grouped(x: Tensor, bits: int, axis: str, group_size: int, zero_point: str) -> tuple[Tensor, int]:
    """View `x` (..., T, C) with one more axis that runs inside a group, and say which."""
    if not 1 <= bits <= 8:
        raise ValueError(f"bits = {bits!r} is not valid: 1 to 8")
    if zero_point not in ("affine", "clamped"):
        raise ValueError(f"zero_point = {zero_point!r} is not valid: 'affine' or 'clamped'")
    if axis not in ("token", "channel"):
        raise ValueError(f"axis = {axis!r} is not valid: 'token' or 'channel'")
    if x.ndim < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; (..., tokens, channels) is needed")
    tokens, channels = x.shape[-2:]
    size, name = (channels, "channels") if axis == "token" else (tokens, "tokens")
    if group_size < 1 or size % group_size:
        raise ValueError(f"group_size = {group_size!r} is not valid: a divisor of the {size} {name}")
    if axis == "token":
        return x.reshape(*x.shape[:-1], channels // group_size, group_size), -1
    return x.reshape(*x.shape[:-2], tokens // group_size, group_size, channels), -2


def _codes(groups: Tensor, bits: int, axis: int, zero_point: str) -> tuple[Tensor, Tensor, Tensor]:
    """Whole codes 0 .. 2^bits - 1 of grouped values, with each group's scale and offset."""
    levels = 2**bits - 1
    low, high = groups.aminmax(dim=axis, keepdim=True)
    scale = (high - low).clamp(min=SMALLEST_RANGE) / levels
    if zero_point == "affine":
        return ((groups - low) / scale).round().clamp(0, levels), scale, low
    zero = (-(low / scale).round()).clamp(0, levels)
    return ((groups / scale).round() + zero).clamp(0, levels), scale, zero


def _pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes (..., C) to bytes (..., ceil(C * bits / 8)), the first code in the lowest bits."""
    per_byte = 8 // bits
    if per_byte == 1:
        return codes
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % per_byte))
    codes = codes.reshape(*codes.shape[:-1], codes.shape[-1] // per_byte, per_byte)
    packed = codes[..., 0].clone()
    for place in range(1, per_byte):
        packed |= codes[..., place] << (bits * place)
    return packed


def _unpack(packed: Tensor, bits: int, channels: int) -> Tensor:
    per_byte = 8 // bits
    if per_byte == 1:
        return packed
    parts = [(packed >> (bits * place)) & (2**bits - 1) for place in range(per_byte)]
    return torch.stack(parts, dim=-1).flatten(-2)[..., :channels]


# The two branches (sections 3.4, 3.6)


def full_precision_tail(num_tokens: int, window: int, policy: str) -> int:
    """How many of `num_tokens` tokens, the current one among them, are attended exactly (section 3.4).

    "sliding": the current token and the `window` before it. "block": windows are aligned to multiples of `window`, so
    the tail grows from 1 to `window` and starts anew. Raises ValueError for fewer than one token, a negative window, a
    block of 0, or an unknown policy.
    """
    if num_tokens < 1:
        raise ValueError(f"num_tokens = {num_tokens!r} is not valid: at least 1")
    if policy == "sliding":
        if window < 0:
            raise ValueError(f"window = {window!r} is not valid: at least 0")
        return min(num_tokens, window + 1)
    if policy == "block":
        if window < 1:
            raise ValueError(f"window = {window!r} is not valid: at least 1 for policy 'block'")
        return num_tokens % window or window
    raise ValueError(f"policy = {policy!r} is not valid: 'sliding' or 'block'")


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the rotate-half convention.

    `x`: (B, H, T, D); `cos`, `sin`: (B or 1, T, D_rot). Channels beyond D_rot pass unchanged.
    """
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned, kept = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    half = turned.shape[-1] // 2
    swapped = torch.cat((-turned[..., half:], turned[..., :half]), dim=-1)
    turned = turned * cos + swapped * sin
    return torch.cat((turned, kept), dim=-1) if kept.shape[-1] else turned


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, T, heads * D) to (B, heads, T, D)."""
    return x.view(*x.shape[:2], num_heads, x.shape[-1] // num_heads).transpose(1, 2)


def reconstruct_keys(
    c: Tensor,
    b: Tensor,
    bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    num_kv_heads: int,
    norm: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Rebuild rotated keys from latents: k_hat = rope(norm(B c + bias)) (section 3.4).

    `c`: (B, T, r); `b`: (d_kv, r); `bias`: (d_kv,) or None; `cos`, `sin`: (B or 1, T, D_rot), rotate-half convention.
    `norm` is applied per head, to (B, T, H_kv, D). Returns (B, H_kv, T, D) in the dtype of `c`. Raises ValueError when
    the rows of `b` are no multiple of the heads or its columns are not the channels of `c`.
    """
    if b.shape[-1] != c.shape[-1] or b.shape[0] % num_kv_heads:
        raise ValueError(
            f"b has shape {tuple(b.shape)}; (a multiple of {num_kv_heads} heads, {c.shape[-1]} channels of c) is needed"
        )
    keys = torch.nn.functional.linear(c, b, bias)
    keys = keys.view(*keys.shape[:2], num_kv_heads, b.shape[0] // num_kv_heads)
    if norm is not None:
        keys = norm(keys)
    return rotate(keys.transpose(1, 2), cos, sin).to(c.dtype)


def decode_attention(
    q: Tensor,
    c_k: Tensor,
    c_v: Tensor,
    b_k: Tensor,
    b_v: Tensor,
    k_tail: Tensor,
    v_tail: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    scale: float,
    start: Tensor | None = None,
    bias_k: Tensor | None = None,
    bias_v: Tensor | None = None,
) -> Tensor:
    """Attention of one query over old tokens, kept as latents, and recent ones, kept exactly (sections 3.4, 3.6).

    Keys are rebuilt; values are not: o_h = B_V,h (sum_t p_t c_t) + the exact part.

    `q`: (B, H_q, 1, D), rotated; `c_k`: (B, T_c, r_k); `c_v`: (B, T_c, r_v); `b_k`: (H_kv * D, r_k); `b_v`: (H_kv * D,
    r_v); `k_tail` (rotated), `v_tail`: (B, H_kv, T_w, D); `cos`, `sin`: (B or 1, T_c, D_rot) of the old tokens;
    `start`: (B,) int, the first valid token of each row, counted from the first old one; biases (H_kv * D,). T_c or
    T_w may be 0. Softmax in float32 or better. Returns (B, H_q, 1, D) in the dtype of `q`. Raises ValueError when
    there is no token, the query has more than one token, or the heads do not fit.
    """
    batch, query_heads, queries, head_dim = q.shape
    heads, old, recent = k_tail.shape[1], c_k.shape[1], k_tail.shape[2]
    if queries != 1:
        raise ValueError(f"q has {queries} tokens; decode_attention takes one")
    if old + recent == 0:
        raise ValueError("there is no token to attend to: c_k and k_tail are both empty")
    if query_heads % heads or b_k.shape[0] != heads * head_dim:
        raise ValueError(
            f"q has {query_heads} heads of {head_dim}, b_k {b_k.shape[0]} rows; they do not fit {heads} heads"
        )
    work = torch.promote_types(q.dtype, torch.float32)
    grouped = q.reshape(batch, heads, query_heads // heads, head_dim)
    keys = reconstruct_keys(c_k, b_k, bias_k, cos, sin, num_kv_heads=heads)
    scores = torch.cat((grouped @ keys.transpose(2, 3), grouped @ k_tail.transpose(2, 3)), dim=-1).to(work) * scale
    if start is not None:
        place = torch.arange(old + recent, device=q.device)
        scores = scores.masked_fill((place < start[:, None])[:, None, None], -math.inf)
    weights = scores.softmax(dim=-1).to(q.dtype)
    old_weights, recent_weights = weights[..., :old], weights[..., old:]
    latent = torch.einsum("bhgt,btr->bhgr", old_weights, c_v)
    output = torch.einsum("bhgr,hdr->bhgd", latent, b_v.view(heads, head_dim, -1))
    if bias_v is not None:
        output = output + old_weights.sum(-1, keepdim=True) * bias_v.view(1, heads, 1, head_dim)
    output = output + recent_weights @ v_tail
    return output.reshape(batch, query_heads, 1, head_dim)


def reconstruction_loss(
    hidden: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    a_k: Tensor,
    b_k: Tensor,
    a_v: Tensor,
    b_v: Tensor,
    *,
    cos: Tensor,
    sin: Tensor,
    num_kv_heads: int,
    k_bits: int | None = None,
    v_bits: int | None = None,
    group_size: int = 32,
    zero_point: ZeroPoint = "affine",
) -> tuple[Tensor, Tensor]:
    """Layer-wise regression loss (section 3.3): MSE(rope(K), rope(B_K Q(A_K x))) and MSE(V, B_V Q(A_V x)).

    `hidden`: (B, T, d); `w_*`: (d_kv, d); `a_*`: (r, d); `b_*`: (d_kv, r); `cos`, `sin`: (B or 1, T, D). Q quantises
    keys over `group_size` tokens of a channel and values over r_v / num_kv_heads channels of a token, or does nothing
    without bits. Returns two scalars, means over all elements. A bias of the projection is in both terms and drops
    out. Raises ValueError when groups do not divide T or r_v.
    """
    latent_k, latent_v = (torch.nn.functional.linear(hidden, a) for a in (a_k, a_v))
    if k_bits is not None:
        latent_k = fake_quantize(latent_k, bits=k_bits, axis="channel", group_size=group_size, zero_point=zero_point)
    if v_bits is not None:
        if latent_v.shape[-1] % num_kv_heads:
            raise ValueError(f"a_v has rank {latent_v.shape[-1]}; a multiple of {num_kv_heads} heads is needed")
        channels = latent_v.shape[-1] // num_kv_heads
        latent_v = fake_quantize(latent_v, bits=v_bits, axis="token", group_size=channels, zero_point=zero_point)
    keys = rotate(split_heads(torch.nn.functional.linear(hidden, w_k), num_kv_heads), cos, sin)
    rebuilt = rotate(split_heads(torch.nn.functional.linear(latent_k, b_k), num_kv_heads), cos, sin)
    values = torch.nn.functional.linear(hidden, w_v)
    loss_k = torch.nn.functional.mse_loss(rebuilt, keys)
    return loss_k, torch.nn.functional.mse_loss(torch.nn.functional.linear(latent_v, b_v), values)


def bibranch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_hat: Tensor,
    v_hat: Tensor,
    *,
    window: int,
    policy: str,
    prefix: int,
    scale: float,
) -> Tensor:
    """Causal attention of a whole sequence as step-by-step decoding computes it after a prompt of `prefix` tokens.

    Rows t < prefix use exact `k`, `v`. Row t >= prefix uses them for its last `full_precision_tail(t + 1)` columns,
    its own among them, and `k_hat`, `v_hat` for those before (section 3.4).

    `q`: (B, H_q, T, D), rotated; the others (B, H_kv, T, D), keys rotated. Softmax in float32 or better. Returns
    (B, H_q, T, D) in the dtype of `q`. Raises ValueError as `full_precision_tail` does, and for a negative prefix.
    """
    if prefix < 0:
        raise ValueError(f"prefix = {prefix!r} is not valid: at least 0")
    batch, query_heads, tokens, head_dim = q.shape
    heads = k.shape[1]
    work = torch.promote_types(q.dtype, torch.float32)
    first = first_exact_columns(tokens, window, policy, device=q.device)
    first[: min(prefix, tokens)] = 0
    columns = torch.arange(tokens, device=q.device)
    grouped = q.reshape(batch, heads, query_heads // heads, tokens, head_dim)
    outputs = []
    for begin in range(0, tokens, QUERY_BLOCK):
        end = min(begin + QUERY_BLOCK, tokens)
        rows = grouped[:, :, :, begin:end]
        rebuilt = columns[:end] < first[begin:end, None]
        future = columns[:end] > columns[begin:end, None]
        exact = torch.einsum("bhgqd,bhtd->bhgqt", rows, k[:, :, :end])
        approximate = torch.einsum("bhgqd,bhtd->bhgqt", rows, k_hat[:, :, :end])
        scores = torch.where(rebuilt, approximate, exact).to(work) * scale
        weights = scores.masked_fill(future, -math.inf).softmax(dim=-1).to(q.dtype)
        output = torch.einsum("bhgqt,bhtd->bhgqd", weights.masked_fill(rebuilt, 0), v[:, :, :end])
        output = output + torch.einsum("bhgqt,bhtd->bhgqd", weights.masked_fill(~rebuilt, 0), v_hat[:, :, :end])
        outputs.append(output)
    return torch.cat(outputs, dim=3).reshape(batch, query_heads, tokens, head_dim)


def first_exact_columns(
    tokens: int, window: int, policy: str, *, begin: int = 0, device: torch.device | str | None = None
) -> Tensor:
    """First column that row t attends exactly, t + 1 - full_precision_tail(t + 1), for t = begin .. begin + tokens - 1.

    Returns int64 (tokens,). Raises ValueError as `full_precision_tail` does.
    """
    full_precision_tail(1, window, policy)
    rows = torch.arange(begin, begin + tokens, device=device)
    return (rows - window).clamp(min=0) if policy == "sliding" else rows // window * window
