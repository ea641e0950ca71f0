"""Every family of decoders that the README names, and the arguments that their layers are called with."""

from __future__ import annotations

import mbq
import mbq_models as models
import pytest
import torch
from mbq.activations import Stream
from mbq.batches import capture, masks
from mbq.fold import folded_state
from mbq.layers import plan_layers
from mbq_models import IMAGE, VIDEO, explicit_batches, language_model, qwen2_vl_batches
from pared_hooks import DecoderView
from torch import nn
from torch.func import functional_call

IDS = torch.tensor([[5, 9, 33, 12, 7, 40]])
W3 = mbq.MBQConfig(group_size=32, grid=3, gqa="shared")

ONE = {"num_hidden_layers": 1}

FAMILIES = {
    "Llama": lambda: language_model(**ONE),
    "SmolLM 3": lambda: language_model("SmolLM3", **ONE),
    "Mistral (sliding)": lambda: language_model("Mistral", sliding_window=4, **ONE),
    "Ministral 3": lambda: language_model("Ministral3", head_dim=16, **ONE),
    "Qwen 2": lambda: language_model("Qwen2", **ONE),
    "Qwen 3": lambda: language_model("Qwen3", head_dim=16, **ONE),
    "Qwen 3.5 (linear attention)": models.qwen3_5,
    "Gemma 2": lambda: language_model("Gemma2", head_dim=16, **ONE),
    "Gemma 3 (1 + w, four norms)": models.gemma3,
    "Phi 3 (fused)": lambda: language_model("Phi3", **ONE),
    "Granite": lambda: language_model("Granite", **ONE),
    "OLMo 2 (norms after)": lambda: language_model("Olmo2", **ONE),
    "OLMo 3": lambda: language_model("Olmo3", **ONE),
    "Qwen2-VL, shared heads": lambda: models.qwen2_vl(num_key_value_heads=2, **ONE),
    "LLaVA-OneVision": lambda: models.llava_onevision(**ONE),
    "LLaVA-NeXT-Video": lambda: models.llava_next_video(**ONE),
    "Qwen2.5-VL": lambda: models.qwen2_5_vl(**ONE),
    "Qwen3-VL": lambda: models.qwen3_vl(**ONE),
    "InternVL": lambda: models.internvl(**ONE),
    "SmolVLM": lambda: models.smolvlm(**ONE),
    "VideoLLaMA 3": lambda: models.video_llama3(**ONE),
}


@pytest.fixture(scope="module", params=FAMILIES)
def calibrated(request):
    """A model of the family with what was found for it."""
    torch.manual_seed(0)
    model = FAMILIES[request.param]()
    return model, mbq.calibrate(model, explicit_batches(model, 1), W3)


@torch.no_grad()
def test_folding_leaves_the_output_in_full_precision(calibrated):
    model, result = calibrated
    assert any(group.ratio > 0 for group in result.groups)
    _, plans = plan_layers(model, W3)
    state = {
        f"{plan.name}.{key}": value
        for plan in plans
        for key, value in folded_state(plan, result.layer(plan).scales).items()
    }
    assert state
    plain = model(IDS).logits
    folded = functional_call(model, state, (IDS,)).logits
    torch.testing.assert_close(folded, plain, rtol=1e-4, atol=1e-4 * float(plain.abs().max()))


@torch.no_grad()
def test_every_linear_layer_of_the_decoder_is_packed_and_comes_back(calibrated):
    model, result = calibrated
    assert all(weight is not None for layer in result.weights for weight in layer.values())
    plain = model(IDS).logits
    handle = mbq.quantize(model, result)
    layers = DecoderView.of(model).layers
    assert not any(type(module) is nn.Linear for layer in layers for module in layer.module.modules())
    packed = sum(isinstance(module, mbq.QuantLinear) for module in model.modules())
    assert packed == handle.stats()["modules"] > 0
    assert model(IDS).logits.isfinite().all()
    handle.remove()
    assert model(IDS).logits.equal(plain)


def test_projections_of_linear_attention_share_a_scale_and_their_output_is_only_rounded():
    model = models.qwen3_5()
    result = mbq.calibrate(model, explicit_batches(model, 1), W3)
    first = [group for group in result.groups if group.layer == 0]
    names = [[name.removeprefix("model.layers.0.") for name in group.linears] for group in first]
    parts = ("qkv", "z", "b", "a")
    assert names == [
        [f"linear_attn.in_proj_{part}" for part in parts],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ]
    _, plans = plan_layers(model, W3)
    assert "linear_attn.out_proj" in plans[0].linears
    assert "self_attn.o_proj" in plans[1].linears


def with_picture():
    """A batch of Gemma 3: two rows, the second with four tokens of padding before it."""
    text = torch.randint(3, 60, (2, 8))
    ids = torch.cat([torch.full((2, 1), 62), torch.full((2, 4), IMAGE), torch.full((2, 1), 63), text], 1)
    ids = torch.cat([torch.zeros(2, 4, dtype=torch.int64), ids], 1)
    ids[0, :4] = 7
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    kinds = (ids == IMAGE).int()
    pixels = torch.randn(2, 3, 32, 32)
    entries = {"input_ids": ids, "attention_mask": mask, "token_type_ids": kinds, "mm_token_type_ids": kinds}
    return {**entries, "pixel_values": pixels, "labels": ids}


STREAMS = {
    "Qwen2-VL (three axes of positions)": (models.qwen2_vl, lambda: qwen2_vl_batches(1)[0]),
    "Qwen2-VL (as many rows as tokens)": (models.qwen2_vl, lambda: torch.randint(3, 60, (6, 6))),
    "Qwen3-VL (features added between layers)": (models.qwen3_vl, lambda: qwen2_vl_batches(1)[0]),
    "Gemma 3 (a mask for each type of layer)": (models.gemma3, lambda: torch.randint(3, 60, (2, 9))),
    "Gemma 3 with vision (both directions, padding)": (models.gemma3_vl, with_picture),
    "Qwen 3.5 (two kinds of layer)": (models.qwen3_5, lambda: torch.randint(3, 60, (2, 9))),
}


@pytest.mark.parametrize("name", STREAMS)
@torch.no_grad()
def test_samples_that_run_layer_by_layer_become_what_the_model_computes(name):
    make, draw = STREAMS[name]
    model, batch = make(), draw()
    view, plans = plan_layers(model, W3)
    stream = Stream(capture(view, batch), 2)
    for plan in plans:
        stream.run(plan, advance=True)
    seen = []
    hook = view.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    inputs = {"input_ids": batch} if isinstance(batch, torch.Tensor) else batch
    model(**{key: value for key, value in inputs.items() if key != "labels"})
    hook.remove()
    _, _, valid = masks(view, batch)
    assert len(stream.hidden) == len(valid)
    for hidden, whole, keep in zip(stream.hidden, seen[0], valid, strict=True):
        torch.testing.assert_close(hidden[0], whole[keep], rtol=1e-4, atol=1e-4)


def test_tokens_are_told_apart_by_labels_by_their_kind_and_by_the_ids_of_pictures_and_clips():
    view = DecoderView.of(models.qwen2_vl(num_hidden_layers=1))
    ids = torch.tensor([[0, IMAGE, 5, VIDEO, 8, 9]])
    labels = torch.tensor([[-100, -100, -100, -100, 8, 9]])
    attention = torch.tensor([[0, 1, 1, 1, 1, 1]])
    batch = {"input_ids": ids, "labels": labels, "attention_mask": attention}
    answer, vision, valid = masks(view, batch)
    assert valid.int().tolist() == attention.tolist()
    assert answer.int().tolist() == [[0, 0, 0, 0, 1, 1]]
    assert vision.int().tolist() == [[0, 1, 0, 1, 0, 0]]
    assert masks(view, batch, "predicting")[0].int().tolist() == [[0, 0, 0, 1, 1, 0]]
    kinds = torch.tensor([[1, 0, 1, 2, 0, 0]])
    assert masks(view, {**batch, "mm_token_type_ids": kinds})[1].int().tolist() == [[0, 0, 1, 1, 0, 0]]
    given = {**batch, "vision_mask": torch.ones(1, 6), "answer_mask": torch.ones(1, 6)}
    assert all(mask.equal(valid) for mask in masks(view, given))
    assert masks(view, ids)[0].all()
