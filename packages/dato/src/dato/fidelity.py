"""Quality of a policy as closeness to the unaccelerated images: the evaluator that `search` uses by default."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dato.apply import applied
from dato.config import DaToConfig
from dato.policy import Policy


class FidelityEvaluator:
    """Mean PSNR in dB of a pipeline's images under a policy to its own images without dato.

    Prompts, initial latents and the scheduler's noise are the same for every policy (common random numbers), so that
    two policies differ by what they do alone. `pipe` is a text-to-image pipeline of diffusers; `pipe_arguments` go to
    every call of it, such as `num_inference_steps` and `guidance_scale`. Raises what `pipe` and `dato.apply` raise.
    """

    def __init__(
        self,
        pipe: Any,
        prompts: Sequence[str],
        *,
        config: DaToConfig | None = None,
        seed: int = 0,
        batch_size: int = 8,
        **pipe_arguments: Any,
    ) -> None:
        self._pipe, self._prompts, self._batch_size = pipe, list(prompts), batch_size
        self._config = config or DaToConfig()
        self._seed = seed
        self._arguments = pipe_arguments
        self._references = self.images()

    def __call__(self, policy: Policy) -> float:
        """Mean over the prompts of the PSNR of the policy's image, in dB; identical images count as 100 dB."""
        with applied(self._pipe, self._config.replace(policy=policy)):
            images = self.images()
        error = (images - self._references).square().flatten(1).mean(dim=1).clamp_min(1e-10)
        return float((-10 * error.log10()).mean())

    def images(self) -> Tensor:
        """The images of all prompts as the pipeline stands, `(prompts, 3, height, width)` in [0, 1] on the CPU."""
        batches = []
        for start in range(0, len(self._prompts), self._batch_size):
            prompts = self._prompts[start : start + self._batch_size]
            # One generator per image: its noise depends neither on the batch nor on what the scheduler draws.
            generators = [torch.Generator().manual_seed(self._seed + start + i) for i in range(len(prompts))]
            output = self._pipe(prompt=prompts, generator=generators, output_type="pt", **self._arguments)
            batches.append(output.images.float().cpu())
        return torch.cat(batches)
