from __future__ import annotations

import pytest
import torch
from pared_kernels import dispatch, sjd_topk_threshold


@pytest.fixture(params=("reference", "triton"))
def backend(request):
    if request.param == "triton" and not dispatch.has_triton():
        pytest.skip("triton is not installed")
    with dispatch.use(sjd_topk_threshold=request.param):
        yield request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_comparing_with_the_threshold_keeps_k_tokens_and_their_ties(backend, dtype, generator):
    logits = torch.randn(2, 300, generator=generator).to(dtype)
    for k in (1, 17, 299, 300):
        kept = (logits.float() >= sjd_topk_threshold(logits, k)[:, None]).sum(1)
        above = (logits.float() > sjd_topk_threshold(logits, k)[:, None]).sum(1)
        assert (kept >= k).all()
        assert (above < k).all()


def test_infinities_take_part(backend):
    logits = torch.tensor([[-torch.inf, 1.0, torch.inf, -2.0]])
    assert [sjd_topk_threshold(logits, k).item() for k in (1, 2, 3, 4)] == [torch.inf, 1.0, -2.0, -torch.inf]


@pytest.mark.parametrize(("logits", "k", "named"), [(torch.zeros(2, 3), 4, "k is 4"), (torch.zeros(2, 3), 0, "k is 0"),
                                                   (torch.zeros(3), 1, "logits")])  # fmt: skip
def test_wrong_arguments_are_named(logits, k, named):
    with pytest.raises(ValueError, match=named):
        sjd_topk_threshold(logits, k)
