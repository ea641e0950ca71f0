"""`DecoderView`: the layers, projections and heads of a transformers language model, or of that part of a VLM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from pared_hooks.errors import ConfigError, UnsupportedModelError


@dataclass(frozen=True)
class DecoderFamily:
    """Names of the parts of one architecture, as its modeling file spells them.

    `decoders` are the class names of the module that owns the layers. `projections`, `mlp_projections` and
    `attention_norms`/`layer_norms` map a role to the attribute on the attention, on the MLP, and on the attention or
    the layer. A family that fuses projections has a role "qkv" or "gate_up" in place of the separate ones; `optional`
    are the roles that some of its layers lack. `linear_attention` is the attribute in the place of the attention in
    layers of type "linear_attention", and `linear_projections` are the roles of its linear layers.
    """

    name: str
    decoders: tuple[str, ...]
    layers: str = "layers"
    attention: str = "self_attn"
    mlp: str = "mlp"
    projections: Mapping[str, str] = field(
        default_factory=lambda: {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
    )
    mlp_projections: Mapping[str, str] = field(
        default_factory=lambda: {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    )
    attention_norms: Mapping[str, str] = field(default_factory=dict)
    layer_norms: Mapping[str, str] = field(
        default_factory=lambda: {"attention": "input_layernorm", "mlp": "post_attention_layernorm"}
    )
    norm: str = "norm"
    rotary: str = "rotary_emb"
    embed: str = "embed_tokens"
    linear_attention: str | None = None
    linear_projections: Mapping[str, str] = field(default_factory=dict)
    optional: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class DecoderLayer:
    """One layer of a decoder; `name` is its path from the model that was passed to `DecoderView.of`."""

    index: int
    name: str
    module: nn.Module
    attention: nn.Module
    mlp: nn.Module
    projections: Mapping[str, nn.Module]
    """Roles "query", "key", "value", "output" to linear layers of the attention; a fused one has the role "qkv".

    Empty for a layer of linear attention; without "key" and "value" where a layer takes those of an earlier one.
    """
    mlp_projections: Mapping[str, nn.Module]
    """Roles "gate", "up", "down" to linear layers of the MLP ("gate_up": fused); empty for a mixture of experts."""
    norms: Mapping[str, nn.Module]
    """Roles "attention" and "mlp" (before them), "after_attention" and "after_mlp", "query" and "key".

    A family has some of them. The weight of the last two has the length of one head, or (OLMo) of all heads.
    """
    layer_type: str
    """ "full_attention", "sliding_attention" and so on, as in `config.layer_types`."""
    sliding_window: int | None
    linear_projections: Mapping[str, nn.Module] = field(default_factory=dict)
    """Roles of the linear layers of linear attention: "output", the others read what the layer's norm hands on."""


@dataclass(frozen=True, eq=False)
class DecoderView:
    """The parts of a language model that efficiency methods work on, under the same names for every family."""

    family: str
    root: nn.Module
    """The model that was passed to `of`."""
    model: nn.Module
    """The decoder: embeds tokens, runs the layers, applies the last norm."""
    name: str
    """Path of the decoder from the root; empty when they are the same."""
    config: Any
    """Text configuration, of the language part in a VLM."""
    layers: tuple[DecoderLayer, ...]
    embed: nn.Module
    norm: nn.Module
    rotary: nn.Module
    head: nn.Module | None
    """The output embedding; None when the root is a bare decoder."""
    vision: nn.Module | None
    """Vision tower of a VLM."""
    projector: nn.Module | None
    """Module between vision tower and decoder; None when the tower merges tokens itself."""
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_size: int

    @property
    def attention(self) -> tuple[nn.Module, ...]:
        """Attention module of every layer."""
        return tuple(layer.attention for layer in self.layers)

    @property
    def num_key_value_groups(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_key_value_heads

    @staticmethod
    def of(model: nn.Module) -> DecoderView:
        """View a transformers model: `...ForCausalLM`, `...ForConditionalGeneration`, or a bare decoder.

        Raises `UnsupportedModelError` for an architecture that no registered family knows.
        """
        model = getattr(model, "_orig_mod", model)
        decoder, family = _find(model)
        config: Any = getattr(decoder, "config")  # noqa: B009 (nn.Module types every attribute)
        name = _path(model, decoder)
        parent = model.get_submodule(name.rpartition(".")[0]) if name else model
        return DecoderView(
            family=family.name,
            root=model,
            model=decoder,
            name=name,
            config=config,
            layers=tuple(
                _layer(family, decoder, config, index, f"{name}.{family.layers}.{index}".lstrip("."), module)
                for index, module in enumerate(_part(decoder, family.layers, family).children())
            ),
            embed=_part(decoder, family.embed, family),
            norm=_part(decoder, family.norm, family),
            rotary=_part(decoder, family.rotary, family),
            head=_head(model),
            vision=_first(parent, _VISION) if decoder is not model else None,
            projector=_first(parent, _PROJECTOR) if decoder is not model else None,
            num_heads=config.num_attention_heads,
            num_key_value_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            hidden_size=config.hidden_size,
        )


_VISION = ("vision_tower", "visual", "vision_model")
_PROJECTOR = ("multi_modal_projector", "connector", "projector")
_families: dict[str, DecoderFamily] = {}


def register_decoder_family(family: DecoderFamily) -> None:
    """Make `DecoderView.of` read another architecture; raises `ConfigError` for a name that is taken."""
    if family.name in _families:
        raise ConfigError(f"name = {family.name!r} is not valid: this decoder family is registered already", "name")
    _families[family.name] = family


def _find(model: nn.Module) -> tuple[nn.Module, DecoderFamily]:
    find = getattr(model, "get_decoder", None)
    candidates = [find(), model] if callable(find) else [model]
    for candidate in candidates:
        classes = {kind.__name__ for kind in type(candidate).__mro__}
        for family in _families.values():
            if classes & set(family.decoders):
                return candidate, family
    supported = [f"{name} ({', '.join(family.decoders)})" for name, family in _families.items()]
    raise UnsupportedModelError.unknown(
        candidates[0],
        supported,
        "To support it, describe its attribute names: "
        "pared_hooks.register_decoder_family(DecoderFamily(name=..., decoders=('ItsModelClass',), ...)).",
    )


def _layer(
    family: DecoderFamily, decoder: nn.Module, config: Any, index: int, name: str, module: nn.Module
) -> DecoderLayer:
    layer_types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    layer_type = layer_types[index] if layer_types else "sliding_attention" if window else "full_attention"
    linear = family.linear_attention if layer_type == "linear_attention" else None
    attention = _part(module, family.attention if linear is None else linear, family)
    mlp = _part(module, family.mlp, family)
    norms = {role: _part(module, attribute, family) for role, attribute in family.layer_norms.items()}
    if linear is None:
        norms |= _roles(attention, family.attention_norms, family)
    return DecoderLayer(
        index=index,
        name=name,
        module=module,
        attention=attention,
        mlp=mlp,
        projections={} if linear is not None else _roles(attention, family.projections, family),
        # A mixture of experts has no single gate, up and down.
        mlp_projections={
            role: getattr(mlp, attribute)
            for role, attribute in family.mlp_projections.items()
            if isinstance(getattr(mlp, attribute, None), nn.Module)
        },
        norms=norms,
        layer_type=layer_type,
        sliding_window=window if layer_type == "sliding_attention" else None,
        linear_projections={} if linear is None else _roles(attention, family.linear_projections, family),
    )


def _roles(module: nn.Module, attributes: Mapping[str, str], family: DecoderFamily) -> dict[str, nn.Module]:
    return {
        role: _part(module, attribute, family)
        for role, attribute in attributes.items()
        if role not in family.optional or isinstance(getattr(module, attribute, None), nn.Module)
    }


def _part(module: nn.Module, attribute: str, family: DecoderFamily) -> nn.Module:
    part = getattr(module, attribute, None)
    if not isinstance(part, nn.Module):
        raise UnsupportedModelError(
            f"{type(module).__name__} has no module {attribute!r}, which the decoder family {family.name!r} expects. "
            "Register a family with the right attribute names: pared_hooks.register_decoder_family."
        )
    return part


def _first(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    return next((part for name in names if isinstance(part := getattr(module, name, None), nn.Module)), None)


def _head(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    return head if isinstance(head, nn.Module) else None


def _path(root: nn.Module, part: nn.Module) -> str:
    return next(name for name, module in root.named_modules() if module is part)
