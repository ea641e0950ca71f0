"""The hooks backend: the model's own forward runs, with wrappers that skip units and prune self-attention."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pared_kernels
import torch
from pared_hooks import ConfigError, Patch
from pared_kernels import dato_norm_gather
from torch import Tensor, nn

from dato.adapters.base import DenoiserAdapter
from dato.config import DaToConfig
from dato.functional import TokenPlan, prune_tokens, recover_tokens
from dato.pruning import PruneSite, TokenPruner, gather_mask
from dato.state import Call, RunState


def install(patch: Patch, adapter: DenoiserAdapter, run: RunState, pruner: TokenPruner, *, prunes: bool) -> None:
    """Wrap the denoiser, the units its policy skips and, when it `prunes`, the blocks that may be pruned."""
    wrap_denoiser(patch, adapter, run, lambda original, call, arguments: original(**adapter.adjust(call, arguments)))
    adapter.install_cache(patch, run)
    for site in adapter.sites if prunes else ():
        _wrap_site(patch, site, run, pruner)


def wrap_denoiser(
    patch: Patch,
    adapter: DenoiserAdapter,
    run: RunState,
    compute: Callable[[Callable[..., Any], Call, dict[str, Any]], Any],
) -> None:
    """Let `run` decide at each denoiser call; a skipped call returns the previous prediction (section 3.1).

    `compute(original_forward, call, arguments)` carries out the other calls.
    """
    config = run.config

    def forward(original: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = adapter.arguments(args, kwargs)
        if adapter.passes_by(arguments):
            return original(*args, **kwargs)
        sample, timestep = adapter.inputs(arguments)
        refuse_gradients(config)
        call = run.begin(sample, timestep, adapter.needs_full(arguments))
        if call is None:
            return original(*args, **kwargs)
        if call.depth == 0:
            assert call.memory.latest is not None
            output = call.memory.latest.clone()
            run.finish(call, None)
            return adapter.wrap_output(output, arguments)
        try:
            with kernel_choice(config, sample):
                output = compute(original, call, arguments)
        except BaseException:
            run.fail()
            raise
        run.finish(call, adapter.prediction(output))
        return output

    patch.wrap_forward(adapter.denoiser, forward)


def refuse_gradients(config: DaToConfig) -> None:
    """Raise `ConfigError` when a denoiser call records gradients that cached tensors would cut."""
    if torch.is_grad_enabled() and not config.allow_grad:
        raise ConfigError(
            "DaTo reuses tensors of earlier calls, which cuts gradients: call the model under torch.no_grad(), or set "
            "DaToConfig.allow_grad = True",
            "allow_grad",
        )


def kernel_choice(config: DaToConfig, sample: Tensor) -> AbstractContextManager[None]:
    """The implementation that `config.kernels` asks for; "auto" leaves the caller's `pared_kernels.use` in force."""
    if config.kernels == "auto":
        return contextlib.nullcontext()
    if config.kernels == "triton":
        return pared_kernels.use("triton")
    return pared_kernels.use("cpu" if sample.device.type == "cpu" else "reference")


def _wrap_site(patch: Patch, site: PruneSite, run: RunState, pruner: TokenPruner) -> None:
    gather_first = site.gather_first and pruner.config.metric == "hidden"

    def norm(original: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        call = run.call
        if call is None or call.ratio == 0:
            return original(hidden_states, *args, **kwargs)
        if pruner.config.metric == "norm":
            normalised = original(hidden_states, *args, **kwargs)
            plan = pruner.plan(site, normalised[0] if isinstance(normalised, tuple) else normalised)
        else:
            plan = pruner.plan(site, hidden_states)
            # Normalisation is per token: gathering first does less of it (section 3.5).
            if plan is not None and gather_first:
                normalised = _normalise_kept(original, hidden_states, plan, *args, **kwargs)
            else:
                normalised = original(hidden_states, *args, **kwargs)
        if plan is not None:
            call.pending[site.name] = plan
        return normalised

    def attention(original: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        call = run.call
        plan = call.pending.get(site.name) if call is not None else None
        if plan is None:
            return original(hidden_states, *args, **kwargs)
        if not gather_first:
            hidden_states = prune_tokens(hidden_states, plan)
        if kwargs.get("attention_mask") is not None:
            heads = getattr(site.attentions[0], "heads", 1)
            kwargs = {**kwargs, "attention_mask": gather_mask(kwargs["attention_mask"], plan, heads)}
        attended = original(hidden_states, *args, **kwargs)
        if isinstance(attended, tuple):
            # Joint attention also returns the text tokens, which are never pruned.
            return (recover_tokens(attended[0], plan), *attended[1:])
        return recover_tokens(attended, plan)

    patch.wrap_forward(site.norm, norm)
    for module in site.attentions:
        patch.wrap_forward(module, attention)


def _normalise_kept(original: Any, hidden_states: Tensor, plan: TokenPlan, *args: Any, **kwargs: Any) -> Any:
    """Normalise the kept tokens alone; in one pass where nothing else is wrapped around a plain layer norm."""
    if getattr(original, "__func__", None) is nn.LayerNorm.forward:
        norm = original.__self__
        return dato_norm_gather(hidden_states, plan.keep_idx, norm.weight, norm.bias, norm.eps)
    return original(prune_tokens(hidden_states, plan), *args, **kwargs)
