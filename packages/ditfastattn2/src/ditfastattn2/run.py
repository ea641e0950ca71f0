"""What replaying and calibrating share: which step and branch a denoiser call is, and where its tokens lie."""

from __future__ import annotations

import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pared_hooks import DenoiserView, ParedError, Patch, StepClock, UnsupportedModelError
from torch import Tensor

from ditfastattn2.adapters.base import check_hooks, check_parallelism, check_site, family_of, sites_of
from ditfastattn2.config import DiTFastAttnV2Config
from ditfastattn2.errors import GradientError
from ditfastattn2.heads import Dense, Inputs
from ditfastattn2.interception import Hook
from ditfastattn2.layout import Layout, LayoutReader, Tokens, valid_text_of
from ditfastattn2.memory import Memory
from ditfastattn2.stats import Statistics

SITE = "attention.output"
"""The name under which a method claims that the output of an attention module is its own."""


@dataclass(frozen=True)
class Call:
    """A denoiser call: step of the schedule, guidance branch ("cond" also for both in one batch), tokens."""

    step: int
    num_steps: int | None
    branch: str
    batched: bool
    layout: Layout


class HeadwiseRun(ABC):
    """Runs one denoiser with its attention in our hands, one call at a time."""

    def __init__(
        self, view: DenoiserView, pipeline: Any, config: DiTFastAttnV2Config, *, allow_grad: bool = False
    ) -> None:
        self.view = view
        self.config = config
        self.clock = StepClock(pipeline)
        self.memory = Memory()
        self.dense = False
        self.call: Call | None = None
        self.allow_grad = allow_grad
        self._pipeline = weakref.ref(pipeline) if pipeline is not None else lambda: None
        self._family = family_of(view)
        self._reader = LayoutReader(view, self._family.count_text)
        self._warned: set[str] = set()
        self.hooks = [
            Hook(index, site, self._family.finish(site.module), self) for index, site in enumerate(sites_of(view))
        ]
        self.statistics = Statistics([hook.site.name for hook in self.hooks])
        check_parallelism(view.model)

    def install(self, patch: Patch) -> None:
        """Put everything in place; the patch takes it back."""
        for hook in self.hooks:
            patch.claim(hook.site.module, SITE)
            check_site(hook.site, self._family)
        patch.on_remove(self.memory.clear)
        self.clock.on_new_run(self._new_run)
        self.clock.on_shape_change(lambda old, new: self.memory.clear())
        self.clock.attach(patch, self.view.model, self.view.timestep_name)
        patch.wrap_forward(self.view.model, self._forward)
        for hook in self.hooks:
            hook.install(patch)

    def attend(self, hook: Hook, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        """Attention of one site, all (B, H, S, D); called from inside the processor."""
        call = self._now()
        sequence = call.layout.of_site(hook.site.text)
        if q.shape[2] != sequence.num_vision + sequence.num_text:
            raise ParedError(
                f"{hook.site.name} attends to {q.shape[2]} tokens, expected {sequence.num_vision} of the picture and "
                f"{sequence.num_text} others: the layout of this call is not known"
            )
        reason, sequence = self._with_mask(sequence, mask, call)
        if reason is not None:
            self.statistics.dense[reason] += 1
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        q, k, v = (sequence.gathered(one.transpose(1, 2)) for one in (q, k, v))
        inputs = Inputs(q, k, v, sequence, scale, self._chosen_backend(hook, scale))
        return sequence.spread(self.run_site(hook, call, inputs)).transpose(1, 2)

    @abstractmethod
    def prepare(self, call: Call) -> None:
        """Look at a call before its blocks run."""

    @abstractmethod
    def run_site(self, hook: Hook, call: Call, inputs: Inputs) -> Tensor:
        """Return the output of one site, (B, S, H, D) in the order of `inputs`."""

    def recall(self, hook: Hook) -> Tensor:
        """Output (B, S, H, D) of a site all of whose heads are cached, in the order of the model."""
        raise NotImplementedError

    def forget(self) -> None:
        """Drop what a run has left."""
        self.memory.clear()

    def _new_run(self) -> None:
        self.forget()

    def _now(self) -> Call:
        if self.call is None:
            raise ParedError(
                "attention runs outside a call of the denoiser; compressed attention needs to know its step"
            )
        return self.call

    def _forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            self._begin(self.view.bind(args, kwargs))
            return original(*args, **kwargs)
        except BaseException:
            # What a broken run has left must not meet the next one.
            self.clock.reset()
            self.forget()
            raise
        finally:
            self.call, self.dense = None, False

    def _begin(self, arguments: dict[str, Any]) -> None:
        check_parallelism(self.view.model)
        for hook in self.hooks:
            check_hooks(hook.site)
            if hook.site.module.processor is not hook.processor:
                raise ParedError(
                    f"the attention processor of {hook.site.name} was replaced after ditfastattn2 was applied; "
                    "remove the handle first, then change processors, then apply again"
                )
            hook.recalls = False
        if arguments.get("kv_cache_mode") is not None:
            raise UnsupportedModelError(
                f"{type(self.view.model).__name__} with kv_cache_mode is not supported: keys of reference pictures are "
                "cached and attention is not one over all tokens"
            )
        state = self.clock.state
        if state is None:
            raise ParedError("call the denoiser itself, not its forward method: that is how its step is known")
        reason = self._why_dense(state.branch)
        layout = self._reader.read(arguments)
        if layout.irregular:
            reason = "padding is not behind the text"
            self.warn_once("irregular", f"ditfastattn2: {reason}; such calls run in full")
        batched = state.branch == "both" and _guided(self._pipeline())
        branch = "cond" if state.branch == "both" else state.branch
        step = state.first_call + state.call
        num_steps = None if state.num_calls is None else state.first_call + state.num_calls
        self.call = Call(step, num_steps, branch, batched, layout)
        self.dense = reason is not None
        self.statistics.calls += 1
        if reason is None:
            self.prepare(self.call)
        else:
            self.statistics.dense[reason] += 1

    def _why_dense(self, branch: str) -> str | None:
        if torch.is_grad_enabled():
            if not self.allow_grad:
                raise GradientError(
                    "gradients are enabled and compressed attention has no backward pass: call the denoiser under "
                    "torch.no_grad(), or apply with allow_grad=True to run such calls in full"
                )
            return "gradients"
        return "a further forward of a smaller batch" if branch == "extra" else None

    def _with_mask(self, sequence: Tokens, mask: Tensor | None, call: Call) -> tuple[str | None, Tokens]:
        """Return why a mask keeps attention from being compressed, or None, and the sequence with its padding."""
        if mask is None or call.layout.masked:
            return None, sequence
        valid, regular = valid_text_of(mask, sequence)
        if not regular:
            self.warn_once("mask", "ditfastattn2: an attention mask is not one of text padding; such calls run in full")
            return "a mask that is not text padding", sequence
        return None, sequence.padded(valid)

    def _chosen_backend(self, hook: Hook, scale: float | None) -> Dense | None:
        from diffusers.models import attention_dispatch as dispatch

        native = dispatch.AttentionBackendName.NATIVE
        chosen = hook.processor._attention_backend or dispatch._AttentionBackendRegistry.get_active_backend()[0]
        if chosen == native:
            return None

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (one.transpose(1, 2) for one in (q, k, v))
            out: Tensor = dispatch.dispatch_attention_fn(q, k, v, scale=scale, backend=chosen)
            return out.transpose(1, 2)

        return run

    def warn_once(self, key: str, message: str) -> None:
        """Warn unless this was warned of before."""
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(message, stacklevel=2)


def _guided(pipeline: Any) -> bool:
    """Whether the pipeline guides now, so that a batch holds both branches."""
    try:
        return bool(pipeline.do_classifier_free_guidance)
    except (AttributeError, TypeError):
        # No such property, or one that reads what only a call of the pipeline sets.
        return False
