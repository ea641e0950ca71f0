"""Calibration in two processes gives what one process gives."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import mbq
import mbq_process
import pytest
import torch

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The folder that two processes wrote their results into."""
    out = tmp_path_factory.mktemp("shared")
    # Processes of their own, not forks: autograd does not survive one.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, str(Path(mbq_process.__file__)), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.parametrize("method", mbq_process.METHODS)
def test_two_processes_share_the_samples_out_and_agree(method, shared):
    model, batches = mbq_process.model_and_batches()
    whole = mbq.calibrate(model, batches, mbq.MBQConfig(group_size=32, grid=3, method=method))
    for place in range(2):
        found = mbq.MBQResult.load(shared / f"{method}-{place}.safetensors")
        if method == "mbq":
            for one, two in zip(found.weights, whole.weights, strict=True):
                assert one == pytest.approx(two, rel=1e-5)
        for one, two in zip(found.groups, whole.groups, strict=True):
            assert one.ratio == two.ratio
            torch.testing.assert_close(one.scale, two.scale)
            assert one.losses == pytest.approx(two.losses, rel=1e-5)
        for name, code in whole.codes.items():
            assert found.codes[name].scales.equal(code.scales)
            assert (found.codes[name].codes.int() - code.codes.int()).abs().float().mean() < 0.01
