"""Running one decoder layer on the calibration samples, and keeping what its modules received and returned."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from pared_hooks import Patch
from torch import Tensor, nn
from torch.func import functional_call

from mbq.batches import Sample, joined, micro_batches
from mbq.errors import CalibrationError
from mbq.functional import fake_quantize_activation
from mbq.layers import LayerPlan


@dataclass
class Call:
    """One call of a module: its hidden states (B, T, K) and other arguments, and its output (B, T, C), on the CPU."""

    hidden: Tensor
    arguments: dict[str, Any]
    output: Tensor
    positional: bool


@dataclass
class MicroBatch:
    """Samples of one length that run at once, and the calls that a layer made for them."""

    samples: list[int]
    answer: Tensor
    vision: Tensor
    calls: dict[str, Call]


class Stream:
    """The hidden states of all samples as they go from layer to layer; one layer's activations at a time."""

    def __init__(self, samples: list[Sample], batch_size: int) -> None:
        self.samples = samples
        self.hidden = [sample.hidden for sample in samples]
        self.batch_size = batch_size

    def copy(self) -> Stream:
        """A second stream at the same place."""
        return Stream(self.samples, self.batch_size)

    @torch.no_grad()
    def run(
        self,
        plan: LayerPlan,
        modules: Iterable[str] = (),
        state: Mapping[str, Tensor] | None = None,
        a_bits: int = 16,
        advance: bool = False,
    ) -> list[MicroBatch]:
        """Run the layer on every sample and return the calls of `modules`; `advance` makes its outputs the new inputs.

        `state` replaces parameters; with `a_bits` 8 the inputs of all quantised linear layers are rounded.

        Raises CalibrationError naming layer and sample where the output is not finite.
        """
        batches = []
        outputs: dict[int, Tensor] = {}
        for numbers in micro_batches(self.samples, self.batch_size):
            hidden, arguments = self._joined(plan, numbers)
            calls: dict[str, Call] = {}
            with _recording(plan, modules, calls, a_bits):
                called: Any = functional_call(plan.module, dict(state or {}), (hidden,), arguments)
            result: Tensor = called[0] if isinstance(called, tuple) else called
            finite = torch.isfinite(result).flatten(1).all(1)
            if not bool(finite.all()):
                first = numbers[int((~finite).nonzero()[0, 0])]
                raise CalibrationError(f"the output of {plan.name} is not finite for calibration sample {first}")
            if advance:
                outputs |= {number: result[place : place + 1].cpu() for place, number in enumerate(numbers)}
            answer = torch.cat([self.samples[number].answer for number in numbers])
            vision = torch.cat([self.samples[number].vision for number in numbers])
            batches.append(MicroBatch(numbers, answer, vision, calls))
        if advance:
            following = plan.index + 1
            for place, sample in enumerate(self.samples):
                extra = sample.additions.get(following)
                self.hidden[place] = outputs[place] if extra is None else outputs[place] + extra
        return batches

    def _joined(self, plan: LayerPlan, numbers: list[int]) -> tuple[Tensor, dict[str, Any]]:
        hidden = torch.cat([self.hidden[number] for number in numbers]).to(plan.device)
        tokens = hidden.shape[1]
        all_arguments = [self.samples[number].arguments[plan.layer_type] for number in numbers]
        names = all_arguments[0]
        return hidden, {
            name: joined([arguments[name] for arguments in all_arguments], tokens, plan.device) for name in names
        }


@contextmanager
def _recording(plan: LayerPlan, modules: Iterable[str], calls: dict[str, Call], a_bits: int) -> Iterator[None]:
    patch = Patch("mbq.activations")

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            rest = dict(kwargs)
            hidden = args[0] if args else rest.pop("hidden_states")
            result = output[0] if isinstance(output, tuple) else output
            calls[name] = Call(hidden.cpu(), rest, result.cpu(), bool(args))

        return hook

    def rounded(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (fake_quantize_activation(args[0]), *args[1:])

    try:
        with patch:
            for name in dict.fromkeys(modules):
                patch.add_hook(plan.module.get_submodule(name), "forward", record(name), with_kwargs=True)
            for name in plan.linears if a_bits == 8 else ():
                patch.add_hook(plan.linear(name), "forward_pre", rounded)
        yield
    finally:
        patch.remove()


def call_again(module: nn.Module, call: Call, hidden: Tensor, state: dict[str, Tensor]) -> Tensor:
    """The output of `module` for other hidden states and parameters, in a call that is otherwise the same."""
    arguments = dict(call.arguments)
    if not call.positional:
        arguments["hidden_states"] = hidden
    output: Any = functional_call(module, state, (hidden,) if call.positional else (), arguments)
    result: Tensor = output[0] if isinstance(output, tuple) else output
    return result


class InputSums:
    """Sums over tokens of what a linear layer receives: mean and largest |x| per channel, and moments x x^T."""

    def __init__(self, columns: int, moments: bool = False) -> None:
        self.total = torch.zeros(columns, dtype=torch.float64)
        self.largest = torch.zeros(columns, dtype=torch.float64)
        self.moment = torch.zeros(columns, columns, dtype=torch.float64) if moments else None
        self.count = torch.zeros((), dtype=torch.float64)

    def add(self, hidden: Tensor) -> None:
        """Add hidden states (B, T, K)."""
        # Sample by sample, so that the sums do not depend on how samples were batched.
        for states in hidden:
            magnitude = states.float().abs()
            self.total += magnitude.sum(0, dtype=torch.float64).cpu()
            self.largest = torch.maximum(self.largest, magnitude.amax(0).double().cpu())
            self.count += len(states)
            if self.moment is not None:
                wide = states.float()
                self.moment += (wide.T @ wide).double().cpu()

    @property
    def mean(self) -> Tensor:
        """Mean |x| per channel, float32 (K,)."""
        return (self.total / self.count).float()
