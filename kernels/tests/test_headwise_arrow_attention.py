from __future__ import annotations

import pytest
import torch
from pared_kernels import dispatch, headwise_arrow_attention, use
from pared_kernels.ops.headwise_arrow_attention.geometry import Arrow, block_map, visited_pairs, visits

BACKENDS = [
    "reference",
    "cpu",
    pytest.param("triton", marks=pytest.mark.skipif(not dispatch.has_triton(), reason="no triton")),
]
LIMITS = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-5}


def run(backend, *arguments, **options):
    with use(headwise_arrow_attention=backend):
        return headwise_arrow_attention(*arguments, **options)


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("part", range(6))
def test_many_shapes_are_within_rounding_of_the_float64_reference(backend, part, generator):
    def pick(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    for _ in range(10):
        vision, text, head_dim = pick(1, 130), pick(0, 50), (40, 64, 72, 80, 96, 128)[pick(0, 6)]
        dtype = (torch.bfloat16, torch.float16)[pick(0, 2)]
        windows = [(-1, 0, pick(1, 20), pick(1, 70))[pick(0, 4)] for _ in range(2)]
        size = (pick(1, 3), vision + text, 2, head_dim)
        q, k, v = (torch.randn(size, generator=generator).to(dtype) for _ in range(3))
        options = {"block": ((16, 32), (32, 16), (64, 64), None)[pick(0, 4)], "text_first": bool(pick(0, 2))}
        if pick(0, 2):
            options["text_valid"] = torch.randint(0, text + 1, (size[0],), generator=generator)
        ours = run(backend, q, k, v, windows, text, **options)
        exact = run("reference", q.double(), k.double(), v.double(), windows, text, **options)
        assert (ours.double() - exact).abs().max() <= LIMITS[dtype], (size, windows, dtype, options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_skipped_heads_are_never_written(backend, generator):
    q = torch.randn(2, 50, 3, 32, generator=generator)
    out = torch.full_like(q, torch.nan)
    result = run(backend, q, q, q, [0, 4, 0], 10, block=(16, 16), out=out)
    assert result is out
    assert out[:, :, [0, 2]].isnan().all()
    assert out[:, :, 1].isfinite().all()


@pytest.mark.skipif(not dispatch.has_triton(), reason="no triton")
def test_live_heads_start_with_the_most_expensive_and_leave_out_those_that_are_skipped():
    from pared_kernels.ops.headwise_arrow_attention.triton import _live_heads

    live = _live_heads((0, 5, -1, 20, 0, 5), 100, 10, False, torch.device("cpu"))
    assert live.tolist() == [[2, -1], [3, 20], [1, 5], [5, 5]]
    assert live.dtype == torch.int32


def test_nothing_runs_when_all_heads_are_skipped(generator, monkeypatch):
    from pared_kernels.ops import headwise_arrow_attention as folder

    calls = []
    monkeypatch.setattr(folder, "_operator", lambda *arguments: calls.append(arguments))
    q = torch.randn(1, 20, 2, 32, generator=generator)
    assert headwise_arrow_attention(q, q, q, torch.zeros(2, dtype=torch.int32), 4).eq(0).all()
    assert not calls


@pytest.mark.parametrize("backend", BACKENDS)
def test_text_rows_of_a_last_block_that_begins_in_the_picture_see_everything(backend, generator):
    # 100 tokens in blocks of 32 rows: the last block has rows 96 to 99, the picture ends at 97.
    q, k, v = (torch.randn(1, 100, 1, 32, generator=generator) for _ in range(3))
    ours = run(backend, q, k, v, [1], 3, block=(32, 16))
    weights = (q[0, 97:, 0].double() @ k[0, :, 0].double().T * 32**-0.5).softmax(-1)
    torch.testing.assert_close(ours[0, 97:, 0].double(), weights @ v[0, :, 0].double(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_is_attended_to_by_nobody(backend, generator):
    q, k, v = (torch.randn(2, 60, 2, 32, generator=generator) for _ in range(3))
    valid = torch.tensor([4, 10], dtype=torch.int32)
    ours = run(backend, q, k, v, [-1, 5], 10, block=(16, 16), text_valid=valid)
    for name in "kv":
        changed = {"k": k.clone(), "v": v.clone()}
        changed[name][0, 54:] += 100
        again = run(backend, q, changed["k"], changed["v"], [-1, 5], 10, block=(16, 16), text_valid=valid)
        assert again.equal(ours)


@pytest.mark.parametrize("text_first", [False, True])
def test_visits_are_those_of_the_published_kernel(text_first):
    """The block ranges of the method's section 3.7, where its last row block needs no repair."""
    vision, text, window, (rows, columns) = 1024, 256, 100, (128, 64)
    tokens = vision + text
    for row in range(tokens // rows):
        here = visits(Arrow(vision, text, window, text_first), row, (rows, columns))
        blocks = {*here.band, *here.text}
        if text_first:
            dense = row * rows < text
            low = max(text // columns, (row * rows - window) // columns)
            band = range(low, min(tokens // columns, -(-((row + 1) * rows + window) // columns)))
            expected = {*range(text // columns), *band}
        else:
            dense = (row + 1) * rows > vision
            high = min(vision // columns, -(-((row + 1) * rows + window) // columns))
            expected = {
                *range(max(0, (row * rows - window) // columns), high),
                *range(vision // columns, tokens // columns),
            }
        assert blocks == (set(range(tokens // columns)) if dense else expected)


def test_visited_pairs_are_those_of_the_block_map(generator):
    for text_first in (False, True):
        arrow = Arrow(70, 13, 9, text_first)
        blocks = block_map(arrow, (16, 8))
        place = torch.arange(83)
        expected = int(blocks[(place // 16)[:, None], (place // 8)[None, :]].sum())
        assert visited_pairs(arrow, (16, 8)) == expected
        assert visited_pairs(arrow, None) == int(arrow.keeps(place, place).sum())


def test_cost_of_the_cpu_path_follows_the_visited_pairs(generator, monkeypatch):
    from pared_kernels.ops.headwise_arrow_attention import cpu

    counted = []
    original = cpu.scaled_dot_product_attention

    def counting(query, key, value, **options):
        counted.append(query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2])
        return original(query, key, value, **options)

    monkeypatch.setattr(cpu, "scaled_dot_product_attention", counting)
    q = torch.randn(2, 300, 3, 16, generator=generator)
    run("cpu", q, q, q, [-1, 0, 20], 40, block=(32, 16))
    expected = 2 * sum(visited_pairs(Arrow(260, 40, window, False), (32, 16)) for window in (-1, 20))
    assert sum(counted) == expected


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"q": torch.zeros(1, 20, 32)}, ValueError, "q has"),
        ({"k": torch.zeros(1, 21, 2, 32)}, ValueError, "shape of k"),
        ({"v": torch.zeros(1, 20, 2, 32).half()}, TypeError, "v has"),
        ({"windows": [1]}, ValueError, "number of windows"),
        ({"windows": [1, -2]}, ValueError, "windows"),
        ({"num_text": 20}, ValueError, "num_text"),
        ({"num_text": -1}, ValueError, "num_text"),
        ({"block": (128, 48)}, ValueError, "block"),
        ({"text_valid": torch.zeros(2, dtype=torch.int64)}, ValueError, "text_valid"),
        ({"text_valid": torch.zeros(1)}, TypeError, "text_valid"),
        ({"scale": 0.0}, ValueError, "scale"),
        ({"out": torch.zeros(1, 20, 2, 64)[..., :32]}, ValueError, "strides of out"),
    ],
)
def test_wrong_arguments_are_named(change, error, named):
    valid = {"q": torch.zeros(1, 20, 2, 32), "k": torch.zeros(1, 20, 2, 32), "v": torch.zeros(1, 20, 2, 32)}
    with pytest.raises(error, match=named):
        headwise_arrow_attention(**(valid | {"windows": [1, -1], "num_text": 4} | change))
