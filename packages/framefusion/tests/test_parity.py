"""The published algorithm written out beside the model: 28 layers, four queries, the whole span (acceptance 4)."""

from __future__ import annotations

import ff_written_out
import pytest
import torch
from ff_models import FAMILIES
from framefusion import FrameFusionConfig, applied

PARITY = {"importance_queries": 4, "prune_scope": "span", "budget_layers": 28, "min_keep": 0}


@pytest.fixture(scope="module")
def deep():
    family = FAMILIES["qwen2-vl"]
    return family, family.model(num_hidden_layers=28)


@torch.no_grad()
def published(model, inputs, patch, cost, threshold, floor):
    """Logits and keys held by each layer, layer by layer in eager attention, stages by the loops of ff_written_out."""
    text = model.model.language_model
    seen = {}

    def note(module, args, kwargs):
        seen.setdefault("start", (args[0], kwargs["position_embeddings"]))

    hook = text.layers[0].register_forward_pre_hook(note, with_kwargs=True)
    model(**inputs)
    hook.remove()
    hidden, (cos, sin) = seen["start"]
    stream = [0 if one >= 0 else -1 for one in patch]
    controller = ff_written_out.Controller(cost, threshold, floor, patch, stream, 28, scope="span")
    rows, kept = controller.step(hidden[0].tolist())
    held = []
    for layer in text.layers:
        hidden = torch.tensor([rows])
        held.append(len(kept))
        mask = torch.full((len(kept), len(kept)), torch.finfo(torch.float32).min).triu(1)[None, None]
        given = {"position_embeddings": (cos[:, kept], sin[:, kept]), "attention_mask": mask}
        out, weights = layer.self_attn(hidden_states=layer.input_layernorm(hidden), **given)
        importance = weights[0, :, -4:].float().mean((0, 1)).tolist()
        wanted = importance if controller.merging_done else None
        rows, kept = controller.step((hidden + out)[0].tolist(), wanted)
        hidden = torch.tensor([rows])
        rows = (hidden + layer.mlp(layer.post_attention_layernorm(hidden)))[0].tolist()
    return model.lm_head(text.norm(torch.tensor([rows])))[:, -1], held


@pytest.mark.parametrize(("threshold", "floor"), [(0.995, 0.1), (0.9, 0.1), (0.998, 0.02)])
def test_the_published_settings_give_the_published_algorithm(threshold, floor, deep, rng):
    family, model = deep
    inputs = family.batch(family.prompt(rng, ("text", 5), ("video", 4), ("text", 7)))
    patch = [-1] * 6 + list(range(16)) * 4 + [-1] * 8
    model.set_attn_implementation("eager")
    expected, held = published(model, inputs, patch, 0.3, threshold, floor)
    config = FrameFusionConfig(cost=0.3, similarity_threshold=threshold, merge_floor=floor, **PARITY)
    with applied(model, config), torch.no_grad():
        out = model(**inputs, use_cache=True)
    assert [layer.keys.shape[2] for layer in out.past_key_values.layers] == held
    torch.testing.assert_close(out.logits[:, -1], expected, atol=1e-4, rtol=1e-4)
    assert held[-1] < inputs["input_ids"].shape[1]
