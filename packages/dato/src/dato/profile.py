"""How much the features change from call to call: the quantity in which the paper argues (section 10.2)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from pared_hooks import UnsupportedModelError
from torch import Tensor, nn

from dato.adapters.base import find_denoiser
from dato.adapters.unet_units import enumerate_units
from dato.apply import applied
from dato.config import DaToConfig


def dynamics_profile(
    pipe: Any, prompts: Sequence[str], config: DaToConfig | None = None, **pipe_arguments: Any
) -> Tensor:
    """Mean ``|feature_t - feature_{t-1}|`` of the last up unit at every denoiser call of one run of `pipe`.

    Returns `(calls,)` in fp32 on the CPU; entry 0 is 0, as no call precedes it, and a skipped call has 0. `config` is
    applied for the run; None profiles the pipeline as it stands. `pipe_arguments` go to the pipeline. For a DiT the
    feature is the output of its last block. Raises what `pipe` and `dato.apply` raise.
    """
    denoiser = find_denoiser(pipe)
    profile = _Profile()
    handles = [
        _last_module(denoiser).register_forward_hook(profile.note_feature),
        denoiser.register_forward_hook(profile.note_call),
    ]
    try:
        with nullcontext() if config is None else applied(pipe, config):
            pipe(prompt=list(prompts), **{"output_type": "latent", **pipe_arguments})
    finally:
        for handle in handles:
            handle.remove()
    return torch.tensor(profile.changes)


class _Profile:
    def __init__(self) -> None:
        self.changes: list[float] = []
        self._feature: Tensor | None = None
        self._previous: Tensor | None = None

    def note_feature(self, _module: nn.Module, _args: Any, output: Any) -> None:
        # Transformers return a tuple; the joint blocks of SD3 put the image tokens last.
        feature = output if isinstance(output, Tensor) else output[-1]
        self._feature = feature.detach().float()

    def note_call(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        change = 0.0
        if self._feature is not None and self._previous is not None and self._feature.shape == self._previous.shape:
            change = float((self._feature - self._previous).abs().mean())
        self.changes.append(change)
        self._previous = self._feature


def _last_module(denoiser: nn.Module) -> nn.Module:
    if hasattr(denoiser, "up_blocks"):
        return enumerate_units(denoiser).up[0].modules[-1]
    blocks = getattr(denoiser, "transformer_blocks", None)
    if not isinstance(blocks, nn.ModuleList):
        raise UnsupportedModelError.unknown(denoiser, ["UNet2DConditionModel"], "dato.profile needs units or blocks.")
    return blocks[-1]
