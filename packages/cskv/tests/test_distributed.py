"""Calibration and finetuning in two processes give what one process gives."""

from __future__ import annotations

import pytest
import torch
from cskv import CSKVConfig, Statistics, calibrate, finetune, fit, load, save

pytestmark = pytest.mark.slow

CONFIG = CSKVConfig(k_rank=8, v_rank=12, k_bits=4, v_bits=4, quant_group=8, init="svd")


def test_two_processes_share_the_batches_out_and_agree(language_model, tokens, tmp_path):
    from accelerate import Accelerator, debug_launcher

    model, batches = language_model(), [tokens(1, 16) for _ in range(4)]
    factors = fit(model, CONFIG)

    def work():
        torch.set_num_threads(1)
        accelerator = Accelerator(cpu=True)
        place = accelerator.process_index
        calibrate(model, batches, accelerator=accelerator).save(tmp_path / f"stats-{place}.safetensors")
        trained = finetune(model, CONFIG, factors, batches, steps=2, learning_rate=1e-3, accelerator=accelerator)
        save(tmp_path / f"factors-{place}", CONFIG, trained)

    debug_launcher(work, num_processes=2)
    whole = calibrate(model, batches)
    for place in range(2):
        stats = Statistics.load(tmp_path / f"stats-{place}.safetensors")
        assert stats.tokens == whole.tokens
        for index, moment in whole.second_moments.items():
            assert torch.allclose(stats.second_moments[index], moment)
    # A step of two processes is one of both their batches, whose gradients are averaged.
    joined = [torch.cat(batches[0:2]), torch.cat(batches[2:4])]
    expected = finetune(model, CONFIG, factors, joined, steps=2, learning_rate=1e-3)
    for place in range(2):
        trained = load(tmp_path / f"factors-{place}")[1]
        for index in expected:
            assert torch.allclose(trained[index].a_k, expected[index].a_k, atol=1e-5)
            assert torch.allclose(trained[index].b_v, expected[index].b_v, atol=1e-5)
