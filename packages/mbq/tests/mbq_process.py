"""What each process of test_distributed runs: calibrate on its share of the samples and save what it found."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

METHODS = ("mbq", "gptq", "smoothquant")


def model_and_batches():
    """The same in every process."""
    from mbq_models import explicit_batches, language_model

    torch.manual_seed(0)
    model = language_model(num_hidden_layers=2)
    return model, explicit_batches(model, 4)


def main(out: Path) -> None:
    """Save the result of every method into `out`, one file a process."""
    import mbq
    from accelerate import Accelerator

    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    model, batches = model_and_batches()
    for method in METHODS:
        config = mbq.MBQConfig(group_size=32, grid=3, method=method)
        result = mbq.calibrate(model, batches, config, accelerator=accelerator)
        result.save(out / f"{method}-{accelerator.process_index}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
