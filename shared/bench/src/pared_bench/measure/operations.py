"""Floating-point operations of a call, from torch's counter and the formulas that kernels register."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_flop_count


@dataclass(frozen=True)
class FlopCount:
    """FLOPs of one call (a multiply-add counts two), by operator; `uncounted` names custom operators without a formula.

    A count with `uncounted` operators is a lower bound.
    """

    total: int
    by_operator: Mapping[str, int] = field(default_factory=dict)
    uncounted: tuple[str, ...] = ()


def flops(run: Callable[[], object], formulas: Mapping[Any, Callable[..., int]] | None = None) -> FlopCount:
    """Count the FLOPs of one call of `run`; tensors may be on the meta device, so that nothing is computed.

    Custom operators count by the formula given for them in `torch.utils.flop_counter.register_flop_formula`, or by
    `formulas` (operator -> function of the argument shapes). Element-wise work is not counted.
    """
    mapping = {**_attention_on_cpu(), **(formulas or {})}
    watch = _CustomOperators({*flop_registry, *mapping})
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter, watch:
        run()
    counts = counter.get_flop_counts().get("Global", {})
    by_operator = {str(operator): int(count) for operator, count in counts.items()}
    return FlopCount(int(counter.get_total_flops()), by_operator, tuple(sorted(watch.without_formula)))


class _CustomOperators(TorchDispatchMode):
    """Notes operators from outside torch's own libraries that have no formula."""

    def __init__(self, known: set[Any]) -> None:
        super().__init__()
        self._known = known
        self.without_formula: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func._overloadpacket
        if func.namespace not in ("aten", "prim", "prims", "profiler") and packet not in self._known:
            self.without_formula.add(str(packet))
        return func(*args, **(kwargs or {}))


def _attention_on_cpu() -> dict[Any, Callable[..., int]]:
    """Return the formula of the processor's fused attention where this torch has none: it would count as nothing."""
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    if operator in flop_registry:
        return {}

    def count(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return int(sdpa_flop_count(query, key, value))

    return {operator: count}
