"""A decoder layer in two halves, so that tokens can leave between its attention and its MLP."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from pared_hooks import DecoderLayer, DecoderView
from torch import Tensor, nn

from framefusion.errors import UnsupportedLayerError

Rest = Callable[[Tensor, dict[str, Any]], Tensor]
"""(hidden states after the attention, arguments of the layer) -> what the layer returns."""

REST: dict[str, Callable[[DecoderLayer], Rest]] = {}
"""Second halves that are not norm, MLP and norm, by class of the layer; adapters register them."""

LINEAR = "linear_attention"


def parameters(module: nn.Module) -> tuple[str, ...]:
    """Names of the positional parameters of a module's forward."""
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


class SplitLayer:
    """A layer as attention() and rest(), which together compute what the layer computes."""

    def __init__(self, layer: DecoderLayer) -> None:
        self.layer = layer
        self.linear = layer.layer_type == LINEAR
        self.names = parameters(layer.module)
        make = REST.get(type(layer.module).__name__)
        self.rest: Rest = make(layer) if make is not None else self._norm_and_mlp

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All arguments of a call but the hidden states, by name."""
        return {**dict(zip(self.names[1:], args, strict=False)), **kwargs}

    def attention(self, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        """h + attention(norm(h)), with the norm after the attention where the family has one."""
        norms = self.layer.norms
        normed = norms["attention"](hidden) if "attention" in norms else hidden
        mixer: Any = self.layer.attention
        if self.linear:
            given = {key: value for key, value in arguments.items() if key not in _NOT_FOR_LINEAR}
            cache = arguments.get("past_key_values")
            mixed = mixer(hidden_states=normed, cache_params=cache, **given)
        else:
            mixed = mixer(hidden_states=normed, **arguments)[0]
        if "after_attention" in norms:
            mixed = norms["after_attention"](mixed)
        return hidden + mixed

    def _norm_and_mlp(self, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        norms = self.layer.norms
        out: Any = self.layer.mlp(norms["mlp"](hidden) if "mlp" in norms else hidden)
        out = out[0] if isinstance(out, tuple) else out
        if "after_mlp" in norms:
            out = norms["after_mlp"](out)
        return hidden + out


_NOT_FOR_LINEAR = ("past_key_values", "position_embeddings", "position_ids")


@torch.no_grad()
def check_layers(view: DecoderView, layers: list[SplitLayer]) -> None:
    """Raise `UnsupportedLayerError` unless every layer, put together from its halves, is bitwise the original."""
    parameter = next(view.model.parameters())
    if parameter.device.type == "meta":
        return
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 4, view.hidden_size, generator=generator).to(parameter)
    for split in layers:
        arguments = _probe(view, split, hidden)
        module = split.layer.module
        training = module.training
        module.eval()
        try:
            whole: Any = module(hidden.clone(), **arguments)
            halves = split.rest(split.attention(hidden.clone(), dict(arguments)), dict(arguments))
        except (TypeError, AttributeError, KeyError, RuntimeError) as error:
            raise _unsupported(split, f"{type(error).__name__}: {error}") from error
        finally:
            module.train(training)
        whole = whole[0] if isinstance(whole, tuple) else whole
        if not halves.equal(whole):
            raise _unsupported(split, "the halves give something else than the layer")


def _probe(view: DecoderView, split: SplitLayer, hidden: Tensor) -> dict[str, Any]:
    positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
    rotary: Any = view.rotary
    given = tuple(inspect.signature(rotary.forward).parameters)
    if "layer_type" in given:
        embeddings = rotary(hidden, positions, split.layer.layer_type)
    elif any(kind in type(view.model).__name__ for kind in _GRIDS):
        embeddings = rotary(hidden, positions.expand(3, 1, -1))
    else:
        embeddings = rotary(hidden, positions)
    arguments: dict[str, Any] = {"position_embeddings": embeddings, "attention_mask": None}
    if "shared_kv_states" in split.names:
        arguments["shared_kv_states"] = {}
    width: int = getattr(view.config, "hidden_size_per_layer_input", None) or 0
    if "per_layer_input" in split.names and width:
        arguments["per_layer_input"] = hidden[..., :width]
    return arguments


_GRIDS = ("Qwen2VL", "Qwen2_5_VL", "Qwen3VL", "Qwen3_5")


def _unsupported(split: SplitLayer, reason: str) -> UnsupportedLayerError:
    kind = type(split.layer.module)
    return UnsupportedLayerError(
        f"layer {split.layer.name} ({kind.__module__}.{kind.__qualname__}) cannot be split between attention and MLP: "
        f'{reason}. Use FrameFusionConfig(placement="layer_input"), which leaves layers whole'
    )
