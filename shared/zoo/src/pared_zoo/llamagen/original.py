"""Checkpoints of LlamaGen's own code: they use the same names, only the shell around the weights differs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pared_zoo.llamagen.transformer import LlamaGenTransformer

#: (layers, width) -> heads of the published sizes; weights do not tell how many heads share them.
HEADS: dict[tuple[int, int], int] = {
    (12, 768): 12,
    (24, 1024): 16,
    (36, 1280): 20,
    (48, 1536): 24,
    (22, 2048): 32,
    (24, 3200): 32,
}
#: Names under which the weights lie in a checkpoint.
SHELLS = ("model", "module", "state_dict")
#: Tables that the model computes itself.
IGNORED = ("freqs_cis",)


def from_original(
    checkpoint: Path | str | dict[str, Any], *, num_attention_heads: int | None = None, grid_size: int = 16
) -> LlamaGenTransformer:
    """A transformer with the weights of an official checkpoint, in float32 and evaluation mode.

    Args:
        checkpoint: a file for ``torch.load``, or what it holds.
        num_attention_heads: default is that of the published model of this depth and width.
        grid_size: 16 for pictures of 256 pixels, 24 for 384.

    Raises:
        ValueError: for weights of another kind of model (the message names what is missing or left over), or a size
            that was not published without ``num_attention_heads``.
    """
    held: dict[str, Any]
    if isinstance(checkpoint, dict):
        held = checkpoint
    else:
        held = torch.load(checkpoint, map_location="cpu", weights_only=True)
    state = next((held[shell] for shell in SHELLS if isinstance(held.get(shell), dict)), held)
    state = {name: value for name, value in state.items() if name not in IGNORED}
    try:
        vocab_size, hidden_size = state["tok_embeddings.weight"].shape
        inner = state["layers.0.feed_forward.w1.weight"].shape[0]
    except KeyError as error:
        raise ValueError(f"checkpoint has no {error}; it is not one of LlamaGen's transformer") from None
    layers = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("layers."))
    heads = num_attention_heads or HEADS.get((layers, hidden_size))
    if heads is None:
        raise ValueError(f"num_attention_heads must be given for {layers} layers of width {hidden_size}")
    config: dict[str, Any] = {"condition": "class"}
    if "cls_embedding.uncond_embedding" in state:
        length, channels = state["cls_embedding.uncond_embedding"].shape
        config = {"condition": "caption", "caption_length": length, "caption_channels": channels}
    elif "cls_embedding.embedding_table.weight" in state:
        config["num_classes"] = len(state["cls_embedding.embedding_table.weight"]) - 1
    model = LlamaGenTransformer(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=layers,
        num_attention_heads=heads,
        grid_size=grid_size,
        multiple_of=inner,
        **config,
    )
    missing, unexpected = model.load_state_dict(state, strict=False)
    if missing or unexpected:
        raise ValueError(f"checkpoint lacks {sorted(missing)} and has {sorted(unexpected)} more than the model")
    return model.eval()


def to_original(model: LlamaGenTransformer) -> dict[str, dict[str, torch.Tensor]]:
    """The checkpoint that LlamaGen's own code reads: the weights under ``"model"``, not copied.

    Raises:
        ValueError: for a model with ``prefix_keys``, which that code does not have.
    """
    if model.config["prefix_keys"]:
        raise ValueError("a model with prefix_keys=True is no model of LlamaGen's code, whose prefix has no keys")
    return {"model": dict(model.state_dict())}
