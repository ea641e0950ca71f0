"""GPTQ (arXiv 2210.17323), the baseline that rounds column by column and hands each error on."""

from __future__ import annotations

import torch
from torch import Tensor

from mbq.config import MBQConfig
from mbq.fold import quantize
from mbq.functional import QuantizedWeight

DAMPING = 0.01
BLOCK = 128


def gptq(weight: Tensor, moment: Tensor, config: MBQConfig) -> QuantizedWeight:
    """Quantise `weight` (N, K) for inputs with the sum of squares `moment` (K, K), its algorithm 1.

    Scales and zero points are those of plain rounding, fixed before the first column ("static groups"). Columns whose
    input is always zero become zero.
    """
    plain = quantize(weight, config)
    rows, columns = weight.shape
    hessian = moment.double().clone()
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1.0
    hessian.diagonal().add_(DAMPING * hessian.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    inverse = inverse.to(weight.device, torch.float32)
    left = weight.detach().float().clone()
    left[:, dead.to(weight.device)] = 0
    size = columns // plain.scales.shape[1]
    scales = plain.scales.float().repeat_interleave(size, 1)
    zeros = 2 ** (config.w_bits - 1) if plain.zeros is None else plain.zeros.float().repeat_interleave(size, 1)
    codes = torch.empty_like(plain.codes)
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        errors = left.new_zeros(rows, stop - start)
        for column in range(start, stop):
            zero = zeros if isinstance(zeros, int) else zeros[:, column]
            code = ((left[:, column] / scales[:, column]).round() + zero).clamp(0, 2**config.w_bits - 1)
            codes[:, column] = code.to(torch.uint8)
            error = (left[:, column] - (code - zero) * scales[:, column]) / inverse[column, column]
            left[:, column:stop] -= error[:, None] * inverse[column, column:stop]
            errors[:, column - start] = error
        left[:, stop:] -= errors @ inverse[start:stop, stop:]
    return plain._replace(codes=codes)
