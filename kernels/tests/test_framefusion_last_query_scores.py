from __future__ import annotations

import pytest
import torch
from pared_kernels import dispatch, framefusion_last_query_scores

BACKENDS = ("reference", "triton")


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param == "triton" and not dispatch.has_triton():
        pytest.skip("triton is not installed")
    with dispatch.use(framefusion_last_query_scores=request.param):
        yield request.param


def test_equals_the_softmax_with_repeated_heads(backend, generator):
    query, key = (torch.randn(2, h, n, 8, generator=generator) for h, n in ((6, 3), (2, 70)))
    logits = query @ key.repeat_interleave(3, 1).transpose(-1, -2) * 0.3
    causal = torch.arange(70) <= 67 + torch.arange(3)[:, None]
    expected = logits.masked_fill(~causal, -torch.inf).softmax(-1).mean((1, 2))
    torch.testing.assert_close(framefusion_last_query_scores(query, key, 0.3), expected, atol=1e-6, rtol=1e-5)


def test_hidden_keys_get_nothing_and_the_others_share_one(backend, generator):
    query, key = torch.randn(2, 4, 1, 8, generator=generator), torch.randn(2, 4, 90, 8, generator=generator)
    valid = torch.ones(2, 90, dtype=torch.bool)
    valid[0, :66] = False
    valid[1] = False
    found = framefusion_last_query_scores(query, key, 1.0, valid)
    assert (found[0, :66] == 0).all()
    assert found[0].sum().item() == pytest.approx(1.0)
    assert (found[1] == 0).all()


def test_large_logits_do_not_overflow(backend):
    query, key = torch.full((1, 1, 1, 8), 100.0), torch.full((1, 1, 5, 8), 100.0)
    key[0, 0, 2] = 101.0
    found = framefusion_last_query_scores(query, key, 1.0)
    assert found[0].tolist() == [0.0, 0.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"query": torch.zeros(1, 3, 1, 4)}, ValueError, "heads of query"),
        ({"query": torch.zeros(1, 4, 6, 4)}, ValueError, "queries is 6"),
        ({"key": torch.zeros(1, 2, 5, 3)}, ValueError, "head_dim of key"),
        ({"key": torch.zeros(1, 2, 5, 4, dtype=torch.float16)}, TypeError, "key has"),
        ({"scaling": float("inf")}, ValueError, "scaling"),
        ({"key_valid": torch.ones(1, 4, dtype=torch.bool)}, ValueError, "key_valid"),
    ],
)
def test_wrong_arguments_are_named(change, error, named):
    valid = {"query": torch.zeros(1, 4, 1, 4), "key": torch.zeros(1, 2, 5, 4), "scaling": 0.5}
    with pytest.raises(error, match=named):
        framefusion_last_query_scores(**(valid | change))
