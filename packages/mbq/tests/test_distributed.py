"""Calibration in two processes gives what one process gives."""

from __future__ import annotations

import mbq
import pytest
import torch
from mbq_models import explicit_batches, language_model

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("options", [{"method": "mbq"}, {"method": "gptq"}, {"method": "smoothquant"}])
def test_two_processes_share_the_samples_out_and_agree(options, tmp_path):
    from accelerate import Accelerator, debug_launcher

    model = language_model(num_hidden_layers=2)
    batches, config = explicit_batches(model, 4), mbq.MBQConfig(group_size=32, grid=3, **options)

    def work():
        torch.set_num_threads(1)
        accelerator = Accelerator(cpu=True)
        result = mbq.calibrate(model, batches, config, accelerator=accelerator)
        result.save(tmp_path / f"{accelerator.process_index}.safetensors")

    debug_launcher(work, num_processes=2)
    whole = mbq.calibrate(model, batches, config)
    for place in range(2):
        found = mbq.MBQResult.load(tmp_path / f"{place}.safetensors")
        for one, two in zip(found.groups, whole.groups, strict=True):
            assert one.ratio == two.ratio
            torch.testing.assert_close(one.scale, two.scale)
            assert one.losses == pytest.approx(two.losses, rel=1e-5)
        for name, code in whole.codes.items():
            assert found.codes[name].scales.equal(code.scales)
            assert (found.codes[name].codes.int() - code.codes.int()).abs().float().mean() < 0.01
