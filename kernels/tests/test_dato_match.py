from __future__ import annotations

import os
import subprocess
import sys

import pared_kernels
import pytest
import torch
from pared_kernels import best_match, dispatch
from pared_kernels.ops.dato_match.cases import draw

BACKENDS = (
    "reference",
    "cpu",
    pytest.param("triton", marks=pytest.mark.skipif(not dispatch.has_triton(), reason="no triton")),
)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_keys_go_to_the_lower_position(backend, generator):
    token = torch.randn(1, 1, 37, generator=generator)
    metric = token.expand(1, 300, 37).contiguous()
    query_idx = torch.arange(0, 60)[None]
    with pared_kernels.use(backend):
        similarity, position = best_match(metric, query_idx, torch.arange(60, 300)[None])
    assert position.eq(0).all()
    torch.testing.assert_close(similarity, torch.ones(1, 60))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_token_without_direction_has_similarity_zero(backend, value, generator):
    metric = -torch.rand(1, 6, 8, generator=generator)
    metric[0, 0] = -metric[0, 0]
    metric[0, 5] = value
    with pared_kernels.use(backend):
        similarity, position = best_match(metric, torch.tensor([[0, 5]]), torch.tensor([[1, 2, 5, 3]]))
    assert similarity.tolist() == [[0.0, 0.0]]
    assert position.tolist() == [[2, 0]]


def test_position_indexes_key_idx_not_tokens(generator):
    metric, query_idx, key_idx = draw(2, 40, 16, 20, 12, torch.float32, generator)
    similarity, position = best_match(metric, query_idx, key_idx)
    key_token = key_idx.gather(1, position)
    pairs = [(b, i) for b in range(2) for i in range(20)]
    cosine = [torch.cosine_similarity(metric[b, query_idx[b, i]], metric[b, key_token[b, i]], dim=0) for b, i in pairs]
    torch.testing.assert_close(similarity.flatten(), torch.stack(cosine))


def test_no_query_gives_empty_outputs():
    similarity, position = best_match(
        torch.randn(2, 4, 3), torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, 1, dtype=torch.long)
    )
    assert similarity.shape == position.shape == (2, 0)


def test_cpu_blocks_agree_with_the_whole_matrix(generator, monkeypatch):
    monkeypatch.setattr("pared_kernels.ops.dato_match.cpu.QUERY_BLOCK", 7)
    monkeypatch.setattr("pared_kernels.ops.dato_match.cpu.KEY_BLOCK", 5)
    arguments = draw(2, 64, 24, 40, 24, torch.float64, generator)
    with pared_kernels.use("reference"):
        expected = best_match(*arguments)
    with pared_kernels.use("cpu"):
        actual = best_match(*arguments)
    torch.testing.assert_close(actual, expected)


@pytest.mark.slow
def test_memory_at_16384_tokens_stays_below_64_megabytes():
    arguments = draw(2, 16384, 320, 12288, 4096, torch.float16, torch.Generator().manual_seed(0))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        best_match(*arguments)
    held, peak = 0, 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert 0 < peak < 64 * 2**20


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"metric": torch.zeros(4, 3)}, ValueError, "metric"),
        ({"metric": torch.zeros(2, 4, 3, dtype=torch.int32)}, TypeError, "metric"),
        ({"query_idx": torch.zeros(2, 2)}, TypeError, "query_idx"),
        ({"query_idx": torch.zeros(1, 2, dtype=torch.long)}, ValueError, "query_idx"),
        ({"key_idx": torch.zeros(2, 0, dtype=torch.long)}, ValueError, "key_idx"),
    ],
)
def test_wrong_arguments_are_named(change, error, named):
    index = torch.zeros(2, 2, dtype=torch.long)
    with pytest.raises(error, match=named):
        best_match(**({"metric": torch.zeros(2, 4, 3), "query_idx": index, "key_idx": index} | change))


@pytest.mark.slow
@pytest.mark.skipif(not dispatch.has_triton(), reason="no triton")
def test_gathered_rows_reach_hopper_tensor_cores_by_16_byte_asynchronous_copies():
    script = """
from pared_kernels import aot
from pared_kernels.ops.dato_match.aot import kernels
specialization = next(s for s in kernels() if s.kernel.fn.__name__ == "best_match_kernel" and "bf16" in s.label)
print(aot.compile_kernel(specialization, aot.TARGETS["cuda-90"]).asm["ptx"])
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16" in done.stdout
    assert "cp.async.cg.shared.global" in done.stdout
    assert "ld.global.b16" not in done.stdout
