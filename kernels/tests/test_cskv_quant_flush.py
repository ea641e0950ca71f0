from __future__ import annotations

import pared_kernels
import pytest
import torch
from pared_kernels import cskv_quant_flush, dispatch
from pared_kernels.ops.cskv_decode.reference import dequantized
from pared_kernels.ops.cskv_quant_flush.cases import SHAPES, draw

TRITON = pytest.param("triton", marks=pytest.mark.skipif(not dispatch.has_triton(), reason="no triton"))
BACKENDS = ("reference", TRITON)


def flush(arguments, backend="reference"):
    latents, codes, scale, offset, bits, group, per_token, clamped = arguments
    with pared_kernels.use(backend):
        cskv_quant_flush(latents, codes, scale, offset, bits=bits, group=group, per_token=per_token, clamped=clamped)
    return codes, scale, offset


@pytest.mark.skipif(not dispatch.has_triton(), reason="no triton")
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_scales_and_offsets_are_those_of_torch_bit_for_bit(shape, seed):
    # Whoever reads a cache cannot tell which backend wrote it.
    results = [
        flush(draw(*shape, torch.float32, torch.Generator().manual_seed(seed)), backend)
        for backend in ("reference", "triton")
    ]
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("per_token", [False, True])
def test_a_group_of_one_sign_keeps_half_a_step(backend, per_token, generator):
    shape = (1, 32, 64, 4, 32, per_token, False)
    arguments = draw(*shape, torch.float32, generator)
    arguments[0].abs_().add_(3)
    codes, scale, offset = flush(arguments, backend)
    wide = [one.float().repeat_interleave(32, 2 if per_token else 1) for one in (scale, offset)]
    values = dequantized(codes, *wide, 64, 4, False, torch.float32)
    assert bool(((values - arguments[0]).abs() <= 0.5 * wide[0] + 0.02).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_rows_of_the_group_are_written(backend, generator):
    arguments = draw(*SHAPES[2], torch.float32, generator)
    flush(arguments, backend)
    codes, scale, offset = (one._base for one in arguments[1:4])
    assert bool((codes[:, :2] == 170).all() and (codes[:, -1:] == 170).all())
    for written in (scale, offset):
        assert bool(written[:, :2].isnan().all() and written[:, -1:].isnan().all())
        assert bool(written[:, 2:-1].isfinite().all())


@pytest.mark.parametrize(
    ("place", "value", "error", "named"),
    [
        (0, torch.zeros(64, 40), ValueError, "latents"),
        (1, torch.zeros(2, 64, 20), TypeError, "codes"),
        (2, torch.zeros(2, 3, 40).half(), ValueError, "scale"),
        (3, torch.zeros(2, 2, 40), TypeError, "offset"),
        (4, 3, ValueError, "bits is 3"),
        (5, 24, ValueError, "group is 24"),
    ],
)
def test_wrong_arguments_are_named(place, value, error, named, generator):
    arguments = list(draw(*SHAPES[0], torch.float32, generator))
    arguments[place] = value
    with pytest.raises(error, match=named):
        flush(arguments)
