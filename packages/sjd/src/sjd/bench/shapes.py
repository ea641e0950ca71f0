"""Sizes of published models, made with random weights, and the images they draw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from sjd.adapters.base import Adapter, Prompt
from sjd.adapters.chameleon import Chameleon, lumina_grammar
from sjd.adapters.emu3 import Emu3
from sjd.adapters.llamagen import LlamaGen
from sjd.grammar import ImageGrammar

PROMPT = 64


@dataclass(frozen=True)
class Shape:
    """A model, the image it draws, and how: guidance `scale`, `top_k`, and `batch` images at once.

    `build` makes the model, on the default device and dtype; `prompts` makes conditional and unconditional ones.
    """

    name: str
    build: Callable[[], Adapter]
    prompts: Callable[[Any, int], list[Prompt]]
    grammar: ImageGrammar
    scale: float
    top_k: int
    dtype: torch.dtype = torch.bfloat16
    batch: int = 1

    def make(self, device: torch.device) -> Adapter:
        """The model with random weights, the same ones every time."""
        torch.manual_seed(0)
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with torch.device(device):
                adapter = self.build()
        finally:
            torch.set_default_dtype(dtype)
        adapter.model.eval()
        return adapter


def chameleon(**sizes: Any) -> Chameleon:
    """Chameleon, 7B unless told, with a small VQ model that is not used."""
    from transformers import ChameleonConfig, ChameleonForConditionalGeneration

    vq = {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "latent_channels": 32}
    config = ChameleonConfig(**sizes, vq_config=vq, vocabulary_map={"<image>": 8711})
    return Chameleon(ChameleonForConditionalGeneration(config))


def emu3(**sizes: Any) -> Emu3:
    """The decoder of Emu3, 8B unless told."""
    from transformers import Emu3ForCausalLM, Emu3TextConfig

    return Emu3(Emu3ForCausalLM(Emu3TextConfig(**sizes)))


def llamagen(**sizes: Any) -> LlamaGen:
    """LlamaGen for captions of 120 places."""
    from pared_zoo.llamagen import LlamaGenTransformer

    return LlamaGen(LlamaGenTransformer(condition="caption", **sizes))


def words(adapter: Adapter, batch: int) -> list[Prompt]:
    """A prompt of words, and its last token as unconditional one."""
    ids = torch.randint(10, 1000, (batch, PROMPT), device=adapter.device)
    embeds = adapter.embed(ids, "prompt")
    padding = torch.zeros(batch, dtype=torch.int64, device=adapter.device)
    return [Prompt(embeds, padding), Prompt(embeds[:, -1:], padding)]


def captions(adapter: LlamaGen, batch: int) -> list[Prompt]:
    """Features of a caption, and the null caption."""
    model = adapter.model
    shape = (batch, model.config["caption_length"], model.config["caption_channels"])
    condition = torch.randn(shape, device=adapter.device).to(model.dtype)
    return [adapter.condition(one, None) for one in (condition, model.null_condition(condition))]


LUMINA = Shape("Chameleon/Lumina-mGPT 7B shape", chameleon, words, lumina_grammar(48, 48), 3.0, 2000)
EMU3 = Shape(
    "Emu3 8B shape",
    emu3,
    words,
    ImageGrammar([(90, 90)], slice(151_854, 184_622), line_end=151_846, after=(151_847, 151_853, 151_850)),
    3.0,
    2048,
)
LLAMAGEN = Shape(
    "LlamaGen-XL shape, 512 pixels",
    partial(llamagen, hidden_size=1280, num_layers=36, num_attention_heads=20, grid_size=32),
    captions,
    ImageGrammar([(32, 32)], slice(0, 16_384)),
    7.5,
    1000,
)
