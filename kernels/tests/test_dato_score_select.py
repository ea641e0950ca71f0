from __future__ import annotations

import pytest
import torch
from pared_kernels import dato_score_select, dispatch, use
from pared_kernels.ops.dato_score_select.philox import noise
from pared_kernels.philox import philox

TRITON = pytest.param("triton", marks=pytest.mark.skipif(not dispatch.has_triton(), reason="no triton"))
BACKENDS = ("reference", TRITON)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter, key, expected):
    words = philox(tuple(torch.tensor([word]) for word in counter), key)
    assert tuple(int(word) for word in words) == expected


def test_noise_is_normal_up_to_its_documented_deviation():
    drawn = noise(4, 16384, 5, 6, 7, torch.device("cpu")).double()
    assert abs(drawn.mean()) < 4 / 65536**0.5
    assert abs(drawn.var() - 1) < 4 * (2 / 65536) ** 0.5
    ordered = drawn.flatten().sort().values
    normal = torch.special.ndtr(ordered)
    # 1.95 / sqrt(n) is the Kolmogorov bound at one in a thousand; 0.001 is the deviation of the distribution itself.
    assert (normal - torch.linspace(0, 1, 65536, dtype=torch.float64)).abs().max() < 1.95 / 256 + 0.001


def test_noise_differs_by_seed_call_block_and_sample():
    base = noise(2, 64, 1, 2, 3, torch.device("cpu"))
    others = [noise(1, 64, *words, torch.device("cpu"))[0] for words in ((2**33 + 1, 2, 3), (1, 3, 3), (1, 2, 4))]
    for other in (base[1], *others):
        assert (base[0] - other).abs().max() > 0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_noise_alone_chooses_the_same_tokens_with_every_backend(backend):
    current = torch.empty(2, 4, 16, 16)
    drawn = noise(2, 256, 11, 4, 2, current.device).view(2, 8, 2, 8, 2).transpose(2, 3).flatten(3)
    with use(backend):
        tokens = dato_score_select(current, None, seed=11, call=4, block=2)
    chosen = noise(2, 256, 11, 4, 2, current.device).gather(1, tokens)
    assert chosen.equal(drawn.amax(-1).flatten(1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_largest_change_of_each_patch_is_chosen_and_leftovers_never(backend):
    previous, current = torch.zeros(2, 1, 2, 5, 4)
    current[0, :, 1, 0] = 1.0
    current[0, :, 2, 3] = -2.0
    current[0, :, 4, :] = 9.0
    with use(backend):
        tokens = dato_score_select(current, previous, alpha=0.0)
        opposite = dato_score_select(current, previous, alpha=0.0, gamma=-1.0)
    assert tokens.tolist() == [[4, 2, 8, 11]]
    assert opposite.tolist() == [[0, 2, 8, 10]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_guided_halves_choose_alike_from_the_first_half(backend, generator):
    previous, current = torch.randn(2, 4, 3, 4, 4, generator=generator)
    with use(backend):
        tokens = dato_score_select(current, previous, cfg_groups=2)
        alone = dato_score_select(current[:2], previous[:2])
        odd = dato_score_select(current[:3], previous[:3], cfg_groups=2, alpha=0.0)
        each = dato_score_select(current[:3], previous[:3], alpha=0.0)
    assert tokens.equal(alone.repeat(2, 1))
    assert odd.equal(each)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_change_that_is_not_finite_counts_as_none(backend, value):
    previous, current = torch.zeros(2, 1, 1, 2, 2)
    current[0, 0, 0, 1], current[0, 0, 1, 1] = value, 0.5
    with use(backend):
        assert dato_score_select(current, previous, alpha=0.01).tolist() == [[3]]


def test_normalisation_makes_the_choice_independent_of_the_scale(generator):
    previous, current = torch.randn(2, 2, 4, 8, 8, generator=generator)
    tokens = dato_score_select(current, previous)
    assert dato_score_select(current / 64, previous / 64).equal(tokens)
    assert not dato_score_select(current / 64, previous / 64, normalize=False).equal(tokens)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"previous": torch.zeros(1, 2, 4, 5)}, "previous"),
        ({"grid": (3, 4)}, "grid"),
        ({"patch": (2, 5)}, "patch"),
        ({"gamma": float("nan")}, "gamma"),
        ({"alpha": float("inf")}, "alpha"),
        ({"seed": -1}, "seed"),
        ({"call": 2**31}, "call"),
        ({"block": -1}, "block"),
        ({"cfg_groups": 0}, "cfg_groups"),
    ],
)
def test_wrong_arguments_are_named(change, named):
    with pytest.raises(ValueError, match=named):
        dato_score_select(**({"current": torch.zeros(1, 2, 4, 4), "previous": None} | change))


def test_public_function_compiles_once_for_all_calls(generator):
    previous, current = torch.randn(2, 2, 4, 8, 8, generator=generator)
    graphs = []

    def count(module, inputs):
        graphs.append(module)
        return module

    @torch.compile(fullgraph=True, backend=count, dynamic=True)
    def select(call):
        return dato_score_select(current, previous, call=call, alpha=3.0)

    chosen = [select(call) for call in range(2, 6)]
    assert len(graphs) <= 2
    for call, tokens in enumerate(chosen, start=2):
        assert tokens.equal(dato_score_select(current, previous, call=call, alpha=3.0))
    assert not chosen[0].equal(chosen[1])
