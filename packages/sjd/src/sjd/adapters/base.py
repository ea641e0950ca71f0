"""What sjd must know of a model family: how tokens enter, how the trunk runs on a given cache, what logits mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pared_hooks import ConfigError, UnsupportedModelError
from torch import Tensor, nn
from transformers.cache_utils import Cache, get_layer_types_and_kwargs

from sjd.grammar import ImageGrammar

Phase = Literal["prompt", "image"]
ATTENTION = ("eager", "sdpa")


@dataclass(frozen=True)
class Inputs:
    """What a caller asked for: prompt `ids` (B, P) int64 and `mask` (B, P) bool, padded on the left.

    `extras` are further arguments of `generate`, such as image features; `image_grid` (height, width) in tokens.
    """

    ids: Tensor
    mask: Tensor
    extras: Mapping[str, Any] = field(default_factory=dict)
    image_grid: tuple[int, int] | None = None
    new_tokens: int = 0


@dataclass(frozen=True)
class Prompt:
    """A prompt in the form the trunk reads: `embeds` (R, P, D), `padding` (R,) tokens on the left, int64.

    `table` (planes, R, slots) holds the position ids of every slot where they are not slot - padding.
    """

    embeds: Tensor
    padding: Tensor
    table: Tensor | None = None

    @staticmethod
    def joined(prompts: list[Prompt]) -> Prompt:
        """One prompt of all rows; shorter ones are padded on the left."""
        if len(prompts) == 1:
            return prompts[0]
        assert all(prompt.table is None for prompt in prompts)
        longest = max(prompt.embeds.shape[1] for prompt in prompts)
        embeds, padding = [], []
        for prompt in prompts:
            missing = longest - prompt.embeds.shape[1]
            embeds.append(nn.functional.pad(prompt.embeds, (0, 0, missing, 0)))
            padding.append(prompt.padding + missing)
        return Prompt(torch.cat(embeds), torch.cat(padding))


class Adapter:
    """Base of all adapters. A family overrides what its classes do differently.

    Embedding, trunk and head are called on their own: so logits are there for every position of a window, for the
    columns that are needed, on a cache and with a mask of our own.
    """

    name = ""
    draws_images = True

    def __init__(self, model: Any) -> None:
        self.model = model

    @property
    def text_config(self) -> Any:
        """The configuration of the decoder."""
        return self.model.config.get_text_config(decoder=True)

    @property
    def device(self) -> torch.device:
        """Where prompts go; of a model whose weights accelerate keeps elsewhere, where it embeds them."""
        hook = getattr(self.model.get_input_embeddings(), "_hf_hook", None)
        place = getattr(hook, "execution_device", None)
        return self.model.device if place is None else torch.device(place)

    @property
    def decoder(self) -> nn.Module:
        """The module whose layers cache keys and values."""
        return self.model.base_model

    @property
    def vocabulary(self) -> int:
        """Columns of the whole head."""
        return self.head_module.weight.shape[0]

    @property
    def head_module(self) -> Any:
        """The layer that gives logits."""
        return self.model.lm_head

    @property
    def max_positions(self) -> int | None:
        """Positions the model was made for, or None."""
        return getattr(self.text_config, "max_position_embeddings", None)

    def layers(self) -> int:
        """Layers that cache keys and values."""
        return self.text_config.num_hidden_layers

    def check(self) -> None:
        """Raise `UnsupportedModelError` where the model's attention or cache is not plain and full."""
        config = self.text_config
        if getattr(self.model.config, "is_encoder_decoder", False):
            raise UnsupportedModelError(f"{type(self.model).__name__} is an encoder-decoder; sjd needs a decoder alone")
        kinds = {kind for kind in get_layer_types_and_kwargs(config)[0] if kind != "full_attention"}
        if kinds:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} has layers of {', '.join(sorted(kinds))}; sjd needs full attention, "
                "whose cache can forget rejected drafts"
            )
        if config._attn_implementation not in ATTENTION:
            raise UnsupportedModelError(
                f"attn_implementation = {config._attn_implementation!r} takes no mask with rows of different length; "
                f"valid: {', '.join(ATTENTION)} (model.set_attn_implementation)"
            )

    def embed(self, ids: Tensor, phase: Phase) -> Tensor:
        """Input embeddings (R, n, D) of tokens (R, n): of the prompt, or of what is generated."""
        return self.model.get_input_embeddings()(ids)

    def embed_prompt(self, inputs: Inputs) -> Tensor:
        """Input embeddings (B, P, D) of a prompt with all that belongs to it."""
        return self.embed(inputs.ids, "prompt")

    def prompt(self, inputs: Inputs) -> Prompt:
        """The prompt in the form the trunk reads."""
        return Prompt(self.embed_prompt(inputs), inputs.mask.shape[1] - inputs.mask.sum(1))

    def uncond(self, inputs: Inputs) -> Inputs:
        """The prompt of the unconditional rows where the caller gave none: the last token, as in transformers."""
        return Inputs(inputs.ids[:, -1:], torch.ones_like(inputs.mask[:, -1:]))

    def trunk(self, inputs_embeds: Tensor, mask: Tensor, position_ids: Tensor, cache: Cache) -> Tensor:
        """Hidden states (R, n, D) behind the last norm; `mask` (R, 1, n, slots) is additive and used as it is."""
        raise NotImplementedError

    def head(self, hidden_states: Tensor, columns: slice | None) -> Tensor:
        """Logits (R, n, columns) of all tokens, or of a slice of them."""
        head = self.head_module
        if columns is None:
            return head(hidden_states)
        # Whoever hooked or wrapped the layer, such as accelerate to bring its weights, wants to be asked.
        if type(head) is not nn.Linear or head._forward_hooks or head._forward_pre_hooks or "forward" in vars(head):
            return head(hidden_states)[..., columns]
        bias = None if head.bias is None else head.bias[columns]
        return nn.functional.linear(hidden_states, head.weight[columns], bias)

    def logits(
        self,
        inputs_embeds: Tensor,
        mask: Tensor,
        position_ids: Tensor,
        cache: Cache,
        columns: slice | None,
        last: bool = False,
    ) -> Tensor:
        """Logits (R, n, columns) of one pass, with `last` of its last token alone."""
        hidden_states = self.trunk(inputs_embeds, mask, position_ids, cache)
        return self.head(hidden_states[:, -1:] if last else hidden_states, columns)

    def positions(self, slots: Tensor, prompt: Prompt) -> Tensor:
        """Position ids of `slots` (R, n), which count from the left edge of the padded prompt."""
        if prompt.table is None:
            return (slots - prompt.padding[:, None]).clamp(min=0)
        return prompt.table.gather(2, slots.expand(prompt.table.shape[0], -1, -1))

    def grammar(self, inputs: Inputs) -> ImageGrammar | None:
        """Layout of what is generated, or None for text."""
        return None

    def decode_image(self, tokens: Tensor, grammar: ImageGrammar) -> Tensor:
        """Pictures (B, 3, height, width) in 0..1 of generated tokens (B, length).

        Raises `UnsupportedModelError` for models that come without a decoder.
        """
        raise UnsupportedModelError(f"{type(self.model).__name__} comes without a decoder for its image tokens")

    def codebook(self) -> Tensor:
        """Entries (V, channels) of the image tokens in the order of the grammar's slice, for `SJDConfig.relax`.

        Raises `UnsupportedModelError` where there is none.
        """
        raise UnsupportedModelError(f"{type(self.model).__name__} has no codebook that sjd knows; relax must be 0")

    def inputs_for(self, processor: Any, prompts: list[str]) -> dict[str, Any]:
        """Arguments of `generate` for these prompts, made by the model's processor.

        Raises `UnsupportedModelError` where no processor draws images.
        """
        raise UnsupportedModelError(f"{type(self.model).__name__}: sjd does not know how its processor asks for images")

    def resize(self, processor: Any, side: int) -> None:
        """Let the processor ask for squares of `side` tokens; ValueError where it asks for one size alone."""
        raise ValueError(f"size={side!r} must be 0: {type(processor).__name__} asks for one size")


def check_padding(mask: Tensor, name: str = "attention_mask") -> Tensor:
    """Return the mask (B, P) bool; raises `ConfigError` naming it unless padding is on the left alone."""
    if bool((mask[:, 1:] < mask[:, :-1]).any()):
        raise ConfigError(f"{name} pads on the right or inside; valid: padding on the left", name)
    return mask


def feature(extras: Mapping[str, Any], name: str = "image") -> Any:
    """Features that `generate` has computed for the images of the prompt, or None."""
    return (extras.get("mm_encoder_outputs") or {}).get(name)


def contiguous(ids: list[int]) -> slice | None:
    """The slice of these sorted tokens, or None where they leave gaps."""
    return slice(ids[0], ids[-1] + 1) if ids and ids[-1] - ids[0] == len(ids) - 1 else None


def allowed_tokens(ids: list[int], vocabulary: int) -> slice | Tensor:
    """These tokens as a slice where they are contiguous, else as a mask (vocabulary,)."""
    found = contiguous(sorted(ids))
    if found is not None:
        return found
    mask = torch.zeros(vocabulary, dtype=torch.bool)
    mask[ids] = True
    return mask


def one_size(sizes: Any) -> tuple[int, int]:
    """The size (height, width) that all rows share; raises `ConfigError` where they differ."""
    found = {(int(height), int(width)) for height, width in sizes}
    if len(found) != 1:
        raise ConfigError(
            f"image_sizes = {sorted(found)} is not valid: one size for all rows of a batch", "image_sizes"
        )
    return found.pop()


Match = Callable[[Any], bool]
Factory = Callable[[Any], Adapter]
_registered: dict[str, tuple[Match, Factory]] = {}


def register_adapter(name: str, match: Match, factory: Factory) -> None:
    """Let sjd know a further model family: `factory(model)` makes the adapter of models for which `match(model)` holds.

    The newest registration is asked first, before the built-in ones. Raises `ConfigError` for a name that is taken.
    """
    if not name or name in _registered or name in BUILT_IN:
        raise ConfigError(f"adapter {name!r} is not valid: a name that is not taken", "name")
    _registered[name] = (match, factory)


BUILT_IN = ("chameleon", "emu3", "janus", "glm_image", "llamagen", "causal_lm")


def is_instance(model: Any, *names: str) -> bool:
    """Whether one of these is the name of a class of the model; importing the class is not needed."""
    return any(kind.__name__ in names for kind in type(model).__mro__)


def registered(model: Any) -> Adapter | None:
    """The adapter that a caller registered for this model."""
    for match, factory in reversed(_registered.values()):
        if match(model):
            return factory(model)
    return None
