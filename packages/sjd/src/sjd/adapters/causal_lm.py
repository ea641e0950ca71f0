"""Language models of transformers whose layers are all of full attention: text, one token at a time, or Jacobi."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin

from sjd.adapters.base import Adapter


class CausalLM(Adapter):
    """Any `AutoModelForCausalLM`. The model runs whole, since some scale or cap their logits."""

    name = "causal_lm"
    draws_images = False

    @staticmethod
    def fits(model: Any) -> bool:
        """Whether transformers generates text with this model from its embeddings."""
        return isinstance(model, GenerationMixin) and type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))

    @property
    def head_module(self) -> Any:
        """The layer that gives logits."""
        return self.model.get_output_embeddings()

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
        output = self.model(
            inputs_embeds=inputs_embeds,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=int(last),
        )
        return output.logits if columns is None else output.logits[..., columns]
