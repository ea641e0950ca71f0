"""What the steps of a run leave for later ones: outputs of heads that will be reused, and what arrows lacked."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ditfastattn2.config import DiTFastAttnV2Config
from ditfastattn2.heads import Remainder, pick, put


@dataclass
class LayerMemory:
    """Memory of one layer in one guidance branch; outputs are (B, S, h, D)."""

    heads: tuple[int, ...] = ()
    output: Tensor | None = None
    residuals: dict[tuple[int, Remainder], Tensor] = field(default_factory=dict)
    """By head and arrow: full minus arrow at the last full step of that head, (B, S, D)."""

    def has(self, heads: Collection[int]) -> bool:
        """Whether the outputs of all `heads` are here."""
        return set(heads) <= set(self.heads)

    def fill(self, out: Tensor, heads: Collection[int]) -> None:
        """Write the outputs of `heads`, which are here, into `out` (B, S, H, D)."""
        assert self.output is not None
        source = pick(self.output, [self.heads.index(head) for head in heads])
        put(out, heads, source.to(out.device, out.dtype))

    def keep(self, out: Tensor, heads: tuple[int, ...], config: DiTFastAttnV2Config) -> None:
        """Keep the outputs of `heads` for the next step, in place of those kept before."""
        if not heads:
            self.heads, self.output = (), None
            return
        self.heads = heads
        kept = pick(out, heads)
        # A copy: what the model got may be written over by a compiled graph.
        self.output = stored(out.clone() if kept is out else kept, out, config)

    @property
    def num_bytes(self) -> int:
        """Bytes of everything held."""
        held = list(self.residuals.values())
        if self.output is not None:
            held.append(self.output)
        return sum(one.numel() * one.element_size() for one in held)


def stored(x: Tensor, like: Tensor, config: DiTFastAttnV2Config) -> Tensor:
    """Return `x` in the type and on the device that caches are kept in."""
    dtype = like.dtype if config.cache_dtype is None else getattr(torch, config.cache_dtype)
    device = torch.device("cpu") if config.cache_device == "cpu" else like.device
    return x.to(device, dtype)


class Memory:
    """Memories by guidance branch and layer; nothing outlives a run."""

    def __init__(self) -> None:
        self._layers: dict[tuple[str, int], LayerMemory] = {}

    def of(self, branch: str, layer: int) -> LayerMemory:
        """Return the memory of a layer, new at its first use."""
        return self._layers.setdefault((branch, layer), LayerMemory())

    def clear(self) -> None:
        """Forget everything."""
        self._layers.clear()

    @property
    def num_bytes(self) -> int:
        """Bytes of everything held."""
        return sum(layer.num_bytes for layer in self._all())

    def _all(self) -> Iterable[LayerMemory]:
        return self._layers.values()
