from __future__ import annotations

import pared_kernels
import pytest
import torch
from pared_kernels import QuantizedLatents, cskv_decode, dispatch, registry
from pared_kernels.ops.cskv_decode import cases

TRITON = pytest.param("triton", marks=pytest.mark.skipif(not dispatch.has_triton(), reason="no triton"))
BACKENDS = ("reference", "cpu", TRITON)
PADDED = cases.Shape(batch=2, heads=2, group=2, rank_k=20, rank_v=24, old=90, recent=7, padded=True, biased=True)


def run(arguments, backend="reference"):
    with pared_kernels.use(backend):
        return registry.operators()["cskv_decode"](*arguments)


def public(shape, generator, **changes):
    """The public function's arguments of a case, with some of them changed."""
    given = cases.draw(shape, torch.float32, generator)
    names = ("q", "c_k", "c_v", "b_k", "b_v", "k_tail", "v_tail", "cos", "sin")
    options = {"scale": given[9], "start": given[10], "bias_k": given[11], "bias_v": given[12]}
    return {**dict(zip(names, given[:9], strict=True)), **options, **changes}


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_before_the_start_do_not_count(backend, generator):
    arguments = list(cases.draw(PADDED, torch.float32, generator))
    arguments[10] = torch.tensor([33, 92])
    expected = run(arguments, backend)
    for place, first in ((1, 33), (2, 33), (7, 33), (8, 33)):
        arguments[place] = arguments[place].clone()
        arguments[place][0, :first] = 100.0
        arguments[place][1] = 100.0
    for place in (5, 6):
        arguments[place] = arguments[place].clone()
        arguments[place][1, :, :2] = 100.0
    torch.testing.assert_close(run(arguments, backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_without_tokens_is_nan_and_leaves_the_others(backend, generator):
    arguments = list(cases.draw(PADDED, torch.float32, generator))
    arguments[10] = torch.tensor([0, 97])
    output = run(arguments, backend)
    assert bool(output[1].isnan().all())
    assert bool(output[0].isfinite().all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_very_large_scores_do_not_overflow(backend, generator):
    arguments = list(cases.draw(PADDED, torch.float32, generator))
    arguments[0] = 1000 * arguments[0]
    torch.testing.assert_close(run(arguments, backend), run(arguments), rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(not dispatch.has_triton(), reason="no triton")
@pytest.mark.parametrize("processors", [1, 50])
def test_the_number_of_programs_does_not_change_the_result(processors, generator, monkeypatch):
    from pared_kernels.ops.cskv_decode import triton as kernel

    split = kernel._split
    monkeypatch.setattr(kernel, "_split", lambda old, block, *rest: (1, 3 * block) if processors == 1 else (9, block))
    shape = cases.Shape(heads=2, group=2, old=70 if processors == 1 else 9 * 32, recent=4)
    arguments = cases.draw(shape, torch.float32, generator)
    assert split(shape.old, 32, 2, arguments[0].device)[0] > 1
    torch.testing.assert_close(run(arguments, "triton"), run(arguments), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_inside_a_larger_cache_are_read_where_they_lie(backend, generator):
    arguments = list(cases.draw(PADDED, torch.float32, generator))
    expected = run(arguments, backend)
    for place in (1, 2, 7, 8):
        room = torch.full((2, 150, arguments[place].shape[2]), torch.nan)
        room[:, 11:101] = arguments[place]
        arguments[place] = room[:, 11:101]
    for place in (5, 6):
        # Exact tokens are kept token by token.
        room = torch.full((2, 20, 2, 64), torch.nan)
        room[:, 5:12] = arguments[place].transpose(1, 2)
        arguments[place] = room[:, 5:12].transpose(1, 2)
    torch.testing.assert_close(run(arguments, backend), expected)


def test_cpu_tiles_agree_with_the_whole_and_hold_little(generator, monkeypatch):
    monkeypatch.setattr("pared_kernels.ops.cskv_decode.cpu.TOKENS", 40)
    for shape in (PADDED, cases.SHAPES[6]):
        arguments = cases.draw(shape, torch.float64, generator)
        torch.testing.assert_close(run(arguments, "cpu"), run(arguments))


def test_quantised_latents_equal_their_values(generator):
    shape = cases.SHAPES[6]
    given = cases.draw(shape, torch.float32, generator)
    parts = QuantizedLatents(*given[13:16], 4, 32), QuantizedLatents(*given[16:19], 4, given[22])
    names = {"scale": given[9], "start": given[10]}
    found = cskv_decode(*given[:9], **names, k_quantized=parts[0], v_quantized=parts[1])
    from pared_kernels.ops.cskv_decode.reference import dequantized

    wide = (
        [one.repeat_interleave(32, 1) for one in parts[0][1:3]],
        [one.repeat_interleave(given[22], 2) for one in parts[1][1:3]],
    )
    values = [
        dequantized(part.codes, *both, given[place].shape[2], 4, False, torch.float32)
        for part, both, place in zip(parts, wide, (1, 2), strict=True)
    ]
    whole = [torch.cat((value, given[place]), 1) for value, place in zip(values, (1, 2), strict=True)]
    torch.testing.assert_close(found, cskv_decode(given[0], *whole, *given[3:9], **names))


def test_values_of_a_large_rank_are_left_to_the_reference(generator):
    arguments = cases.draw(cases.Shape(rank_v=1025, old=3), torch.float32, generator)
    reason = dispatch.why_not(registry.operators()["cskv_decode"], "triton", arguments)
    assert reason is not None
    if dispatch.has_triton():
        assert "1025" in reason


@pytest.mark.skipif(not dispatch.has_triton(), reason="no triton")
@pytest.mark.parametrize(
    ("wavefront", "shape", "dtype", "named"),
    [
        (32, PADDED, torch.bfloat16, None),
        (32, PADDED, torch.float32, "float32"),
        (32, cases.SHAPES[6], torch.bfloat16, "codes"),
        (32, cases.Shape(dim=256, old=3), torch.bfloat16, "128 channels"),
        (32, cases.Shape(group=9, old=3), torch.bfloat16, "8 query heads"),
        (32, cases.Shape(rank_k=205, rank_v=205, old=3), torch.bfloat16, "odd number"),
        (32, cases.Shape(rank_v=513, old=3), torch.bfloat16, "513"),
        (64, cases.Shape(dim=256, group=17, rank_k=205, rank_v=513, old=3), torch.bfloat16, None),
        (64, cases.SHAPES[6], torch.float32, None),
        (64, cases.Shape(rank_v=513, old=3), torch.float32, "513"),
    ],
)
def test_what_an_amd_gpu_cannot_hold_is_left_to_the_reference(wavefront, shape, dtype, named, generator, monkeypatch):
    monkeypatch.setattr("pared_kernels.ops.cskv_decode.triton._wavefront", lambda device: wavefront)
    arguments = cases.draw(shape, dtype, generator)
    reason = dispatch.why_not(registry.operators()["cskv_decode"], "triton", arguments)
    assert reason is None if named is None else named in str(reason)


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"q": torch.zeros(2, 4, 2, 64)}, ValueError, "queries is 2"),
        ({"q": torch.zeros(2, 3, 1, 64)}, ValueError, "heads of k_tail is 2"),
        ({"c_k": torch.zeros(2, 90, 20, dtype=torch.float16)}, TypeError, "c_k"),
        ({"c_v": torch.zeros(2, 89, 24)}, ValueError, "old tokens of values is 89"),
        ({"b_k": torch.zeros(128, 21)}, ValueError, "b_k"),
        ({"cos": torch.zeros(2, 90, 33), "sin": torch.zeros(2, 90, 33)}, ValueError, "cos"),
        ({"sin": None}, ValueError, "cos and sin"),
        ({"start": torch.zeros(2)}, TypeError, "start"),
        ({"start": torch.zeros(3, dtype=torch.int64)}, ValueError, "start"),
        ({"bias_v": torch.zeros(3)}, ValueError, "bias_v"),
        ({"v_tail": torch.zeros(2, 2, 6, 64)}, ValueError, "v_tail"),
    ],
)
def test_wrong_arguments_are_named(change, error, named, generator):
    with pytest.raises(error, match=named):
        cskv_decode(**public(PADDED, generator, **change))


def test_no_token_at_all_is_refused(generator):
    with pytest.raises(ValueError, match="number of tokens"):
        cskv_decode(**public(cases.Shape(), generator))


@pytest.mark.parametrize(("bits", "group", "named"), [(3, 32, "bits"), (4, 0, "group"), (4, 16, "scale")])
def test_wrong_codes_are_named(bits, group, named, generator):
    given = cases.draw(cases.SHAPES[6], torch.float32, generator)
    arguments = public(cases.SHAPES[6], generator)
    with pytest.raises(ValueError, match=named):
        cskv_decode(**arguments, k_quantized=QuantizedLatents(*given[13:16], bits, group))
