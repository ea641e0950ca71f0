"""What is measured at full size on a GPU, with small shapes on the CPU."""

from __future__ import annotations

import pytest
import torch
from cskv.bench import capacity, speed
from cskv.bench.full_size import SMOLLM2, Setting, prefilled
from pared_bench import BenchContext

SHAPES = SMOLLM2 | {"num_hidden_layers": 2, "intermediate_size": 64, "vocab_size": 97}


@pytest.fixture
def context(tmp_path):
    return BenchContext("cpu", out=tmp_path)


@pytest.mark.parametrize("limit", [0, 1, 2, 5, 7, 8, 100])
def test_the_largest_batch_is_found(limit):
    tried = []
    assert capacity.largest(lambda batch: tried.append(batch) or batch <= limit, 64) == min(limit, 64)
    assert max(tried) <= 64
    assert len(tried) <= 14


def test_copies_of_one_cache_fill_the_memory_until_it_runs_out(context, monkeypatch):
    setting = Setting("tiny", SHAPES, 40, 1, torch.float32)
    model, ids = setting.model(context), setting.ids(context)
    original = capacity.stepper

    def crowded(model, ids, cache):
        if ids.shape[0] > 5:
            raise torch.OutOfMemoryError
        return original(model, ids, cache)

    monkeypatch.setattr(capacity, "stepper", crowded)
    found = {r.metric: r for r in capacity.measure(context, "full cache", model, ids, None, setting.record("capacity"))}
    assert found["largest batch"].value == 5
    assert found["decoding at that batch"].value > 0


def test_without_a_gpu_capacity_says_so(context):
    (record,) = capacity.run(context)
    assert record.value is None
    assert "cpu" in record.note


def test_decoding_and_reading_are_timed_against_the_full_cache(context):
    setting = Setting("tiny", SHAPES, 80, 1, torch.float32)
    for records in (speed.decoding(context, setting), speed.prompt(context, setting)):
        assert {"full cache", *speed.VARIANTS} <= {record.variant for record in records}
        assert all(record.value > 0 for record in records if record.metric.startswith("speed-up"))


def test_a_step_leaves_the_cache_as_long_as_it_was(context):
    from cskv.bench.full_size import stepper

    setting = Setting("tiny", SHAPES, 40, 2, torch.float32)
    model, ids = setting.model(context), setting.ids(context)
    cache = prefilled(model, ids, None)
    step = stepper(model, ids, cache)
    step()
    step()
    assert cache.get_seq_length() == 40
