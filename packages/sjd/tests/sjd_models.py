"""Tiny models of the real classes, with random weights large enough for context to matter, and plain decoding of them.

Plain decoding runs the model's own forward on the whole sequence for every token: no cache, no window.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from sjd.functional import gumbel, process_rows
from sjd.grammar import ImageGrammar
from torch import nn

SIDE = 4
CODES = 20
WORDS = 6


def lively(model: nn.Module, seed: int, dtype: torch.dtype) -> nn.Module:
    """Weights of the size that makes hidden states order one: the logits then depend on every token in front."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
                if name.endswith("bias"):
                    parameter.sub_(1)
            else:
                fan_in = parameter[0].numel() if "embed" not in name else 1
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
    return model.to(dtype).eval()


TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def chameleon(side: int = SIDE) -> Any:
    from transformers import ChameleonConfig, ChameleonForConditionalGeneration

    names = {f"IMGIMG{''.join(chr(ord('A') + int(digit)) for digit in str(code))}Z": 4 + code for code in range(CODES)}
    vq = {"embed_dim": 8, "num_embeddings": CODES, "latent_channels": 32, "resolution": 2 * side, "base_channels": 32,
          "channel_multiplier": [1, 1], "num_res_blocks": 1}  # fmt: skip
    config = ChameleonConfig(
        **TEXT, vocab_size=64, vq_config=vq, vocabulary_map={**names, "<image>": 60, "<eoss>": 61}, pad_token_id=0
    )
    return ChameleonForConditionalGeneration(config)


def emu3(side: int = SIDE) -> Any:
    from transformers import Emu3Config, Emu3ForConditionalGeneration

    names = {f"<|visual token {code:06d}|>": 10 + code for code in range(CODES)}
    special = {"<image>": 50, "<|extra_200|>": 51, "<|extra_201|>": 52, "<|image end|>": 53}
    vq = {"codebook_size": CODES, "embed_dim": 8, "latent_channels": 8, "base_channels": 32, "hidden_size": 32,
          "channel_multiplier": [1, 1], "num_res_blocks": 1, "attn_resolutions": [],
          "temporal_downsample_factor": 1}  # fmt: skip
    text = {**TEXT, "vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return Emu3ForConditionalGeneration(Emu3Config(vq_config=vq, text_config=text, vocabulary_map={**names, **special}))


def janus(side: int = SIDE) -> Any:
    from transformers import JanusConfig, JanusForConditionalGeneration

    text = {**TEXT, "vocab_size": 40, "model_type": "llama", "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 4 * side,
              "patch_size": 4, "projection_dim": 32, "num_image_tokens": side**2}  # fmt: skip
    vq = {"embed_dim": 8, "num_embeddings": CODES, "latent_channels": 32, "base_channels": 32, "num_res_blocks": 1,
          "channel_multiplier": [1, 1], "projection_dim": 32, "image_token_embed_dim": 32}  # fmt: skip
    model = JanusForConditionalGeneration(JanusConfig(text_config=text, vision_config=vision, vq_config=vq))
    model.generation_config.update(bos_token_id=1, pad_token_id=0)
    model.generation_config.generation_kwargs = {"boi_token_id": 3}
    return model


def glm_image(side: int = SIDE) -> Any:
    from transformers import GlmImageConfig, GlmImageForConditionalGeneration

    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    text = {**TEXT, "vocab_size": 60, "vision_vocab_size": 40, "rope_parameters": rope, "pad_token_id": 0,
            "eos_token_id": 31}  # fmt: skip
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "patch_size": 4, "image_size": 32}
    vq = {"embed_dim": 8, "num_embeddings": CODES, "latent_channels": 32}
    config = GlmImageConfig(text_config=text, vision_config=vision, vq_config=vq, image_token_id=55,
                            image_start_token_id=30, image_end_token_id=31)  # fmt: skip
    return GlmImageForConditionalGeneration(config)


def llama(side: int = SIDE) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(**TEXT, vocab_size=CODES, pad_token_id=0, bos_token_id=None, eos_token_id=None)
    )  # fmt: skip


def llamagen(side: int = SIDE, condition: str = "class") -> Any:
    from pared_zoo.llamagen import LlamaGenTransformer

    return LlamaGenTransformer(
        vocab_size=CODES, hidden_size=32, num_layers=2, num_attention_heads=2, grid_size=side, multiple_of=16,
        condition=condition, num_classes=5, caption_channels=12, caption_length=WORDS,
        prefix_keys=condition == "caption",
    )  # fmt: skip


def llamagen_caption(side: int = SIDE) -> Any:
    return llamagen(side, "caption")


def wrapped(original):
    """Silence what the tiny configurations warn about."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return original()


@dataclass
class Family:
    """A tiny model, how to ask it for tokens, and plain decoding of it."""

    name: str
    model: Any
    rows: int = 2
    side: int = SIDE

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """Height and width of each image, in the order in which they are drawn."""
        if self.name == "glm_image":
            return (self.side // 2, self.side // 2), (self.side - 1, self.side)
        return ((self.side, self.side),)

    @property
    def grammar(self) -> ImageGrammar:
        codes = {"chameleon": slice(4, 4 + CODES), "emu3": slice(10, 10 + CODES)}.get(self.name, slice(0, CODES))
        if self.name == "emu3":
            return ImageGrammar(self.grids, codes, line_end=51, after=(52, 53, 2))
        if self.name == "glm_image":
            return ImageGrammar(self.grids, codes, after=(31,))
        if self.name == "llama":
            return ImageGrammar.free(24 if self.side == SIDE else self.side**2)
        return ImageGrammar(self.grids, codes)

    def prompt(self, rows: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompts of different length, padded on the left: ids and mask (rows, 5)."""
        rows = self.rows if rows is None else rows
        ids = torch.randint(4, 10, (rows, 5), generator=torch.Generator().manual_seed(5))
        mask = torch.ones_like(ids)
        if self.name == "janus":
            ids[:, 0], ids[:, -1] = 1, 3
        if self.name == "glm_image":
            ids[:, -1] = 30
        for row in range(1, rows):
            mask[row, : row % 3] = 0
        ids = ids.masked_fill(mask == 0, 0)
        if self.name == "janus":
            ids[torch.arange(rows), mask.argmax(1)] = 1
        return ids, mask

    def condition(self, rows: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Classes, or captions of different length, one of them without a word, padded on the left with nonsense."""
        if self.name == "llamagen":
            return torch.arange(rows) % 5, None
        features = torch.randn(rows, WORDS, 12, generator=torch.Generator().manual_seed(6))
        padding = torch.tensor([3, 0, WORDS, 1, 5, 2, 4])[torch.arange(rows) % 7]
        return features.to(next(self.model.parameters()).dtype), torch.arange(WORDS) >= padding[:, None]

    def generate(self, generate=None, rows: int | None = None, guidance: float | None = None, **options: Any) -> Any:
        """Generated tokens alone (rows, length), by the model's `generate`."""
        call = self.model.generate if generate is None else generate
        rows = self.rows if rows is None else rows
        if self.name.startswith("llamagen"):
            options.pop("custom_generate", None)
            options.pop("sjd_config", None)
            return call(*self.condition(rows), guidance_scale=1.0 if guidance is None else guidance, **options)
        ids, mask = self.prompt(rows)
        options.setdefault("do_sample", True)
        options.setdefault("top_k", 0)
        if self.name == "janus":
            scale = 1.0 if guidance is None else guidance
            return call(ids, mask, generation_mode="image", guidance_scale=scale, **options)
        if guidance is not None:
            options["guidance_scale"] = guidance
        if self.name == "emu3":
            options["image_sizes"] = torch.tensor([self.grids[0]] * rows)
        if self.name == "glm_image":
            options["image_grid_thw"] = torch.tensor([[1, *grid] for grid in reversed(self.grids)] * rows)
            options["images_per_sample"] = torch.tensor([2] * rows)
        out = call(input_ids=ids, attention_mask=mask, max_new_tokens=self.grammar.length, **options)
        return out[:, ids.shape[1] :]

    def logits(self, tokens: torch.Tensor, unconditional: bool = False) -> torch.Tensor:
        """Logits (rows, V) behind the prompt and `tokens` (rows, n), by one forward over all of it."""
        return self.every_logits(tokens, unconditional)[:, -1]

    def every_logits(self, tokens: torch.Tensor, unconditional: bool = False) -> torch.Tensor:
        """Logits (rows, n + 1, V) behind the prompt and behind each of `tokens` (rows, n)."""
        rows, count = tokens.shape
        model = self.model
        if self.name.startswith("llamagen"):
            condition, words = self.condition(rows)
            condition = model.null_condition(condition) if unconditional else condition
            return model(tokens, condition, words)
        ids, mask = self.prompt(rows)
        if unconditional and self.name == "janus":
            ids = ids.masked_fill((ids != 1) & (ids != 3), 0)
        elif unconditional:
            ids, mask = ids[:, -1:], mask[:, -1:]
        mask = torch.cat((mask, torch.ones(rows, count, dtype=mask.dtype)), 1)
        if self.name == "janus":
            embeds = torch.cat(
                (model.get_input_embeddings()(ids), model.prepare_embeddings_for_image_generation(tokens)), 1
            )
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            hidden = model.model.language_model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions)
            return model.model.generation_head(hidden.last_hidden_state[:, -count - 1 :])
        every = torch.cat((ids, tokens), 1)
        if self.name == "glm_image":
            return self._glm_logits(ids, every, mask)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        if self.name == "chameleon":
            hidden = model.model(every, attention_mask=mask, position_ids=positions).last_hidden_state
            return model.lm_head(hidden[:, -count - 1 :])
        return model(every, attention_mask=mask, position_ids=positions).logits[:, -count - 1 :]

    def _glm_logits(self, ids, every, mask):
        """Positions written out: text counts up, then each grid has rows and columns from its start, then the end."""
        columns = []
        for row in range(len(ids)):
            padding = int((mask[row] == 0).sum())
            words = ids.shape[1] - padding
            places = [(1, 1, 1)] * padding + [(i, i, i) for i in range(words)]
            start = words
            for height, width in self.grids:
                places += [(start, start + r, start + c) for r in range(height) for c in range(width)]
                start += max(height, width)
            places.append((start, start, start))
            columns.append(torch.tensor(places[: every.shape[1]]))
        positions = torch.stack(columns).permute(2, 0, 1)
        out = self.model(every, attention_mask=mask, position_ids=positions)
        return out.logits[:, ids.shape[1] - 1 :]

    def decode(self, choose, rows: int | None = None, guidance: float | None = None, **processing: Any) -> torch.Tensor:
        """Plain decoding (rows, length); `choose(position, probs)` picks from processed distributions (rows, V)."""
        grammar = self.grammar
        tokens = torch.empty(self.rows if rows is None else rows, 0, dtype=torch.int64)
        for position in range(grammar.length):
            forced = grammar.forced(position)
            if forced >= 0:
                chosen = torch.full((len(tokens),), forced)
            else:
                logits = self.logits(tokens)
                combined = None if guidance is None else (guidance, self.logits(tokens, unconditional=True))
                chosen = choose(
                    position, process_rows(logits, guidance=combined, allowed=grammar.allowed, **processing)
                )
            tokens = torch.cat((tokens, chosen[:, None]), 1)
        return tokens

    def with_noise(self, seed: int, rows: int | None = None, guidance: float | None = None, **processing: Any):
        """Plain sampling with the noise that `verify="match"` uses."""

        def choose(position, probs):
            where = torch.full((len(probs), 1), position)
            noise = gumbel(seed, torch.arange(len(probs)), where, probs.shape[1], dtype=probs.dtype)
            return (probs.log() + noise[:, 0]).argmax(-1)

        return self.decode(choose, rows, guidance, **processing)


BUILDERS = {
    "chameleon": chameleon,
    "emu3": emu3,
    "janus": janus,
    "glm_image": glm_image,
    "llamagen": llamagen,
    "llamagen_caption": llamagen_caption,
    "llama": llama,
}


def family(name: str, dtype: torch.dtype = torch.float64, seed: int = 0, side: int = SIDE) -> Family:
    model = lively(wrapped(lambda: BUILDERS[name](side)), seed, dtype)
    return Family(name, model, side=side)
