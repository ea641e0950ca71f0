"""Growing tensors and latent stores: what goes in comes out, in place, and is counted."""

from __future__ import annotations

import pytest
import torch
from cskv import functional as F
from cskv.storage import GrowingTensor, LatentStore, QuantizationPlan
from hypothesis import given, settings
from hypothesis import strategies as st

KEYS = QuantizationPlan(bits=4, axis="channel", tokens=8, channels=3, zero_point="affine")
VALUES = QuantizationPlan(bits=2, axis="token", tokens=8, channels=3, zero_point="affine")


def test_rows_are_appended_in_place_and_copied_only_when_the_room_is_used_up(randn):
    store, parts = GrowingTensor(), [randn(2, n, 3) for n in [5] + [1] * 100]
    copies, address = 0, None
    for part in parts:
        store.append(part)
        copies += store.data.data_ptr() != address
        address = store.data.data_ptr()
    assert torch.equal(store.rows(), torch.cat(parts, 1))
    assert copies <= 14


def test_free_room_stays_a_sixteenth_of_a_long_store():
    store = GrowingTensor()
    store.append(torch.zeros(1, 4096, 4))
    store.append(torch.zeros(1, 4096, 4))
    assert store.nbytes <= 8192 * 4 * 4 * (1 + 1 / 16)


def dequantised(x, plan):
    whole = x.shape[1] - x.shape[1] % plan.tokens
    packed = F.quantize(x[:, :whole], bits=plan.bits, axis=plan.axis, group_size=plan.group_size)
    return torch.cat((F.dequantize(packed), x[:, whole:]), 1)


@pytest.mark.parametrize("plan", [None, KEYS, VALUES])
@settings(max_examples=12, deadline=None)
@given(parts=st.lists(st.integers(1, 20), min_size=1, max_size=6), seed=st.integers(0, 1000))
def test_latents_read_the_same_however_they_were_appended(plan, parts, seed):
    x = torch.randn(2, sum(parts), 6, generator=torch.Generator().manual_seed(seed))
    store = LatentStore(plan)
    for part in x.split(parts, dim=1):
        store.append(part)
        store.quantize(store.length)
    expected = x if plan is None else dequantised(x, plan)
    assert torch.equal(store.read(), expected)
    for end in {1, len(x[0]) // 2, len(x[0])} - {0}:
        assert torch.equal(store.read(end), expected[:, :end])


@pytest.mark.parametrize("plan", [None, KEYS, VALUES])
@pytest.mark.parametrize("length", [0, 3, 8, 13, 16, 20, 21])
def test_a_group_that_is_cut_becomes_raw_and_can_grow_again(randn, plan, length):
    x, more = randn(2, 21, 6), randn(2, 9, 6)
    store = LatentStore(plan)
    store.append(x)
    store.quantize(21)
    before = store.read().clone()
    store.truncate(length)
    assert store.length == length
    if length:
        kept = before[:, :length].clone()
        if plan is not None and 8 < length < 16:
            kept[:, 8:] = x[:, 8:length]
        assert torch.equal(store.read(), kept)
    store.append(more)
    store.quantize(store.length)
    joined = torch.cat((before[:, :length], more), 1)
    if plan is None:
        assert torch.equal(store.read(), joined)
    else:
        whole = length - length % 8
        if length > 8:
            # The latest group was the second.
            joined[:, whole:length] = x[:, whole:length]
        expected = torch.cat((before[:, :whole], dequantised(joined[:, whole:], plan)), 1)
        assert torch.allclose(store.read(), expected, atol=1e-6)


def test_batch_rows_can_be_selected_and_repeated(randn):
    x = randn(3, 11, 6)
    store = LatentStore(KEYS)
    store.append(x)
    store.quantize(8)
    before = store.read()
    for part in store.tensors():
        part.repeat(2)
    assert torch.equal(store.read(), before.repeat_interleave(2, 0))
    for part in store.tensors():
        part.select(torch.tensor([4, 0]))
    assert torch.equal(store.read(), before[[2, 0]])


def test_quantised_latents_take_the_bytes_they_should():
    store = LatentStore(KEYS)
    store.append(torch.randn(1, 8 * 200, 64))
    store.quantize(8 * 200)
    assert store.latent_nbytes <= 8 * 200 * 32 * (1 + 1 / 16) + 4 * 64 * 24
    assert store.metadata_nbytes <= 2 * 2 * 64 * (200 + 12)


def test_groups_are_quantised_up_to_a_limit_and_the_rest_stays_as_it_is(randn):
    x = randn(1, 30, 6)
    store = LatentStore(KEYS)
    store.append(x)
    store.quantize(23)
    assert store.codes.length == 16
    assert torch.equal(store.read()[:, 16:], x[:, 16:])
    assert not torch.equal(store.read()[:, :16], x[:, :16])
    store.quantize(10)
    assert store.codes.length == 16
    store.quantize(17, touching=True)
    assert store.codes.length == 24
