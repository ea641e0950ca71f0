from __future__ import annotations

import pared_kernels
import pytest
import torch
from pared_kernels import cskv_append, dispatch
from pared_kernels.ops.cskv_append.cases import draw

BACKENDS = (
    "reference",
    pytest.param("triton", marks=pytest.mark.skipif(not dispatch.has_triton(), reason="no triton")),
)


def given(generator, batch=2, pairs=8):
    *arguments, cos, sin, cos_row, sin_row = draw(batch, 48, 2, 16, 8, 12, pairs, torch.float32, generator)
    return arguments, (cos, sin, cos_row, sin_row) if pairs else None


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_row_of_the_token_is_written(backend, generator):
    arguments, rotary = given(generator)
    with pared_kernels.use(backend):
        cskv_append(*arguments, rotary=rotary)
    hidden, down, key, value, c_k, c_v, k_row, v_row = arguments
    torch.testing.assert_close(torch.cat((c_k, c_v), 1), hidden @ down.T)
    for written, exact in ((k_row, key), (v_row, value), (rotary[2], rotary[0]), (rotary[3], rotary[1])):
        assert torch.equal(written, exact)
    for written in (c_k, c_v, k_row, v_row, *rotary[2:]):
        room = written._base
        assert bool(room[:, :3].isnan().all())
        assert bool(room[:, 4:].isnan().all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_rotary_row_may_serve_all_samples(backend, generator):
    arguments, rotary = given(generator, batch=3)
    shared = tuple(one[:1] for one in rotary)
    with pared_kernels.use(backend):
        cskv_append(*arguments, rotary=shared)
    assert torch.equal(shared[2], shared[0])
    assert bool(rotary[2][1:].isnan().all())


@pytest.mark.parametrize(
    ("place", "tensor", "error", "named"),
    [
        (0, torch.zeros(48), ValueError, "hidden"),
        (1, torch.zeros(21, 48), ValueError, "down"),
        (2, torch.zeros(2, 2, 16, dtype=torch.float64), TypeError, "key"),
        (3, torch.zeros(2, 2, 15), ValueError, "value"),
        (4, torch.zeros(3, 8), ValueError, "c_k"),
        (6, torch.zeros(2, 3, 16), ValueError, "k_row"),
    ],
)
def test_wrong_arguments_are_named(place, tensor, error, named, generator):
    arguments, rotary = given(generator)
    arguments[place] = tensor
    with pytest.raises(error, match=named):
        cskv_append(*arguments, rotary=rotary)


def test_a_rotary_row_of_another_width_is_named(generator):
    arguments, rotary = given(generator)
    with pytest.raises(ValueError, match="sin_row"):
        cskv_append(*arguments, rotary=(*rotary[:3], torch.zeros(2, 9)))
