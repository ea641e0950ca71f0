"""Running a denoiser by a plan (section 3.5)."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from pared_hooks import DenoiserView
from torch import Tensor

from ditfastattn2.config import DiTFastAttnV2Config
from ditfastattn2.errors import PlanMismatch
from ditfastattn2.heads import Inputs, Launch, Program, Remainder, compute, program, remainder_of
from ditfastattn2.interception import Hook
from ditfastattn2.memory import LayerMemory, stored
from ditfastattn2.plan import FULL_LETTER, Plan, methods_of
from ditfastattn2.run import Call, HeadwiseRun


class Replay(HeadwiseRun):
    """Gives every head the method that the plan has for it."""

    def __init__(
        self, view: DenoiserView, pipeline: Any, plan: Plan, *, strict: bool = True, allow_grad: bool = False
    ) -> None:
        super().__init__(view, pipeline, plan.config, allow_grad=allow_grad)
        self._given = plan
        self._strict = strict
        self._plan: Plan | None = None

    def _new_run(self) -> None:
        super()._new_run()
        self._plan = None

    def prepare(self, call: Call) -> None:
        if self._plan is None or self._plan.num_vision != call.layout.num_vision:
            self._plan = self._fitted(call)
        plan = self._plan
        if call.step >= plan.num_steps:
            self.statistics.beyond_plan += 1
            self.warn_once(
                "beyond",
                f"ditfastattn2: the run is longer than the plan of {plan.num_steps} steps; the rest runs in full",
            )
            self.dense = True
            self.memory.clear()
            return
        if self.config.skip_projections:
            for hook in self.hooks:
                hook.recalls = self._recalls(plan, call, hook)

    def _recalls(self, plan: Plan, call: Call, hook: Hook) -> bool:
        """Whether a layer needs nothing but what it remembers."""
        if hook.finish is None:
            return False
        methods = plan.methods(plan.branch_for(call.branch), call.step, hook.index)
        memory = self.memory.of(call.branch, hook.index)
        return all(method.kind == "cached" for method in methods) and memory.has(range(len(methods)))

    def run_site(self, hook: Hook, call: Call, inputs: Inputs) -> Tensor:
        assert self._plan is not None
        plan, config, layer, sequence = self._plan, self.config, hook.index, inputs.sequence
        branch = plan.branch_for(call.branch)
        memory = self.memory.of(call.branch, layer)
        letters = plan.letters(branch, call.step, layer)
        tokens = (sequence.num_vision, sequence.num_text, sequence.text_first)
        chosen = program(letters, config, *tokens, call.batched)
        missing = _missing(chosen, memory)
        if missing:
            # Nothing to reuse at the start of a run in the middle of the schedule, or where another cache skipped us.
            self.statistics.cache_misses += len(missing)
            letters = "".join(FULL_LETTER if head in missing else letter for head, letter in enumerate(letters))
            chosen = program(letters, config, *tokens, call.batched)
        out: Tensor | None = None
        if chosen.cached:
            out = torch.empty(inputs.q.shape, dtype=inputs.q.dtype, device=inputs.q.device)
            memory.fill(out, chosen.cached)
        if chosen.launches:
            out = compute(chosen.launches, inputs, out, config)
        assert out is not None
        for head, remainder in chosen.residuals:
            out[:, :, head] += memory.residuals[head, remainder].to(out.device, out.dtype)
        for head, remainder in _residuals_ahead(plan.choices[branch], call.step, layer, config, tokens[0]):
            if letters[head] == FULL_LETTER:
                window, reorder = remainder
                arrow = compute((Launch((window,), reorder, False),), inputs.of_heads([head]), None, config)
                memory.residuals[head, remainder] = stored(out[:, :, head] - arrow[:, :, 0], out, config)
        self._keep(plan, call, hook, memory, out, recalled=chosen.cached)
        batch, length, heads, channels = out.shape
        full = 4 * channels * batch * length**2
        self.statistics.count(layer, full * heads, full * chosen.pairs)
        return out

    def recall(self, hook: Hook) -> Tensor:
        assert self._plan is not None
        call = self._now()
        memory = self.memory.of(call.branch, hook.index)
        assert memory.output is not None
        out = memory.output
        sequence = call.layout.of_site(hook.site.text)
        self.statistics.skipped_projections += 1
        self.statistics.count(hook.index, 4 * out.shape[3] * out.shape[0] * out.shape[1] ** 2 * out.shape[2], 0.0)
        self._keep(self._plan, call, hook, memory, out, recalled=memory.heads)
        return sequence.spread(out)

    def _keep(
        self, plan: Plan, call: Call, hook: Hook, memory: LayerMemory, out: Tensor, recalled: tuple[int, ...]
    ) -> None:
        """Keep the outputs that the next step reuses."""
        ahead: tuple[int, ...] = ()
        if call.step + 1 < plan.num_steps:
            methods = plan.methods(plan.branch_for(call.branch), call.step + 1, hook.index)
            ahead = tuple(head for head, method in enumerate(methods) if method.kind == "cached")
        # What was only recalled is passed on as it is.
        if not (ahead and ahead == memory.heads and set(ahead) <= set(recalled)):
            memory.keep(out, ahead, self.config)
        if hook.index == len(self.hooks) - 1:
            self.statistics.note_memory(self.memory.num_bytes)

    def _fitted(self, call: Call) -> Plan:
        """Return the plan for the tokens and steps of this run; raises `PlanMismatch` unless that is allowed."""
        plan, vision, steps = self._given, call.layout.num_vision, call.num_steps
        if not self._strict:
            return plan.retarget(V=vision, steps=steps)
        differences = []
        if vision != plan.num_vision:
            differences.append(f"{vision} vision tokens instead of {plan.num_vision}")
        if steps is not None and steps < plan.num_steps:
            differences.append(f"{steps} steps instead of {plan.num_steps}")
        if differences:
            raise PlanMismatch(
                differences, "calibrate for this run, use plan.retarget(V=..., steps=...), or strict=False"
            )
        return plan


def _missing(chosen: Program, memory: LayerMemory) -> set[int]:
    """Return the heads whose method needs what is not remembered."""
    missing = {head for head in chosen.cached if head not in memory.heads}
    return missing | {head for head, remainder in chosen.residuals if (head, remainder) not in memory.residuals}


@lru_cache(maxsize=65536)
def _residuals_ahead(
    rows: tuple[str, ...], step: int, layer: int, config: DiTFastAttnV2Config, num_vision: int
) -> tuple[tuple[int, Remainder], ...]:
    """Return what to remember of heads that are full at `step`: what their arrows will lack until the next time."""
    found: dict[tuple[int, Remainder], None] = {}
    now = rows[step].split(" ")[layer]
    if not any(method.residual for method in config.parsed_methods()):
        return ()
    open_heads = {head for head, letter in enumerate(now) if letter == FULL_LETTER}
    for row in rows[step + 1 :]:
        for head, method in enumerate(methods_of(row.split(" ")[layer], config)):
            if head in open_heads and method.residual:
                found[head, remainder_of(method, num_vision)] = None
            elif method.name == "full":
                open_heads.discard(head)
    return tuple(found)
