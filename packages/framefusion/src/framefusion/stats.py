"""What happened since the last reset: tokens by layer, the cost that was met, FLOPs and bytes that were saved."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pared_hooks import DecoderView

from framefusion.request import Request


@dataclass(frozen=True)
class Sizes:
    """Widths that FLOPs and bytes of one layer are computed from."""

    hidden: int
    query: int
    key: int
    mlp: int
    element: int
    layers: int

    @classmethod
    def of(cls, view: DecoderView) -> Sizes:
        """Read the widths of a decoder; a mixture of experts counts its active ones."""
        config = view.config
        mlp = getattr(config, "intermediate_size", 4 * view.hidden_size)
        if experts := getattr(config, "num_experts_per_tok", None) or getattr(config, "top_k_experts", None):
            mlp = experts * getattr(config, "moe_intermediate_size", mlp)
        parameter = next(view.model.parameters())
        return cls(
            view.hidden_size,
            view.num_heads * view.head_dim,
            view.num_key_value_heads * view.head_dim,
            mlp,
            parameter.element_size(),
            len(view.layers),
        )

    def flops(self, attention: float, mlp: float) -> float:
        """FLOPs of one layer with `attention` tokens in its attention and `mlp` in its MLP, a multiply-add as two."""
        projections = 2 * attention * self.hidden * (2 * self.query + 2 * self.key)
        # The lower triangle alone, products with keys and with values.
        scores = 2 * attention * attention * self.query
        return projections + scores + 6 * mlp * self.hidden * self.mlp


@dataclass
class Stats:
    """Sums over requests; `report` turns them into what `handle.stats()` returns."""

    sizes: Sizes
    requests: int = 0
    sequences: int = 0
    vision: float = 0.0
    attention: list[float] = field(default_factory=list)
    mlp: list[float] = field(default_factory=list)
    costs: list[float] = field(default_factory=list)
    dense_flops: float = 0.0
    flops: float = 0.0
    saved_bytes: float = 0.0
    seconds: float = 0.0

    def add(self, request: Request, post_attention: bool) -> None:
        """Count a finished request."""
        layers = self.sizes.layers
        if not self.attention:
            self.attention, self.mlp = [0.0] * layers, [0.0] * layers
        self.requests += 1
        self.seconds += request.seconds
        first = request.trace[0].before if request.trace else request.states[0].vision
        for row in range(request.batch):
            total = first[row]
            if total == 0:
                continue
            self.sequences += 1
            self.vision += total
            length = request.lengths[row]
            spent = 0.0
            for layer in range(layers):
                before, after = request.state_at(layer), request.state_at(layer + 1)
                after = after if post_attention else before
                self.attention[layer] += before.vision[row]
                self.mlp[layer] += after.vision[row]
                spent += before.vision[row]
                self.flops += self.sizes.flops(before.tokens[row], after.tokens[row])
                self.dense_flops += self.sizes.flops(length, length)
                self.saved_bytes += 2 * (length - before.tokens[row]) * self.sizes.key * self.sizes.element
            self.costs.append(spent / (layers * total))

    def report(self) -> dict[str, Any]:
        """Averages over the sequences that had vision tokens."""
        count = max(self.sequences, 1)
        return {
            "requests": self.requests,
            "sequences": self.sequences,
            "vision_tokens": self.vision / count,
            "attention_tokens": [one / count for one in self.attention],
            "mlp_tokens": [one / count for one in self.mlp],
            "cost": sum(self.costs) / len(self.costs) if self.costs else None,
            "costs": list(self.costs),
            "flops_ratio": self.flops / self.dense_flops if self.dense_flops else None,
            "kv_bytes_saved": self.saved_bytes,
            "controller_seconds": self.seconds,
        }
