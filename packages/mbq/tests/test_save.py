"""Packed models on disk: round trips in fresh processes, and the formats of other libraries."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys

import mbq
import pytest
import torch
from mbq.export import AWQ_ORDER
from mbq_models import explicit_batches, language_model, llava_onevision, text_batches, tokenizer

IDS = torch.tensor([[5, 9, 33, 12, 7, 40]])
RTN = {"method": "rtn", "group_size": 32}

FRESH = """
import sys, torch, mbq
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoModelForCausalLM
folder, kind, dtype, out = sys.argv[1:]
auto = AutoModelForImageTextToText if kind == "vlm" else AutoModelForCausalLM
model = auto.from_pretrained(folder, dtype=getattr(torch, dtype))
ids = load_file(folder + "/ids.st")["ids"]
with torch.no_grad():
    save_file({"logits": model(ids).logits.float().contiguous()}, out + ".logits")
state = {name: value.clone().contiguous() for name, value in model.state_dict().items()}
save_file(state, out)
"""


def load_in_a_fresh_process(folder, kind, dtype, out):
    from safetensors.torch import load_file, save_file

    save_file({"ids": IDS}, folder / "ids.st")
    arguments = [sys.executable, "-c", FRESH, str(folder), kind, dtype, str(out)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return load_file(out), load_file(f"{out}.logits")["logits"]


def test_a_packed_vlm_loads_in_a_fresh_process_that_imported_mbq_alone(tmp_path):
    # Its scales are float16, which loading in bfloat16 must not round. A loaded model has float32 rotary frequencies.
    model = llava_onevision(num_hidden_layers=2)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    config = mbq.MBQConfig(group_size=32, grid=2)
    mbq.apply(model, config, explicit_batches(model, 1), restore="none")
    model.save_pretrained(tmp_path / "packed")
    state, theirs = load_in_a_fresh_process(tmp_path / "packed", "vlm", "bfloat16", tmp_path / "state")
    ours = model.state_dict()
    assert state.keys() == ours.keys()
    assert all(state[name].equal(ours[name]) and state[name].dtype == ours[name].dtype for name in ours)
    assert theirs.equal(model(IDS).logits.float())


WITHOUT = """
import sys, torch
from transformers import AutoModelForCausalLM
folder, ignore = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=ignore == "yes")
import mbq
try:
    mbq.calibrate(model, [torch.arange(3, 40)[None]], mbq.MBQConfig(group_size=32, method="awq"))
except mbq.AlreadyQuantizedError as error:
    print("refused:", error)
"""


@pytest.mark.parametrize("ignore", ["no", "yes"])
def test_loading_without_mbq_is_an_error_and_what_it_can_be_forced_to_give_is_refused(ignore, tmp_path):
    model = language_model(num_hidden_layers=1)
    mbq.apply(model, mbq.MBQConfig(**RTN), [], restore="none")
    model.save_pretrained(tmp_path)
    arguments = [sys.executable, "-c", WITHOUT, str(tmp_path), ignore]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert "Unknown quantization type, got pared-mbq" in done.stderr
    if ignore == "no":
        assert done.returncode != 0
        assert "ignore_mismatched_sizes" in done.stderr.splitlines()[-1]
    else:
        assert done.returncode == 0, done.stderr[-2000:]
        assert "refused: the configuration of LlamaForCausalLM says that it is quantised" in done.stdout


@pytest.mark.parametrize("format", ["pared-mbq", "compressed-tensors", "gptq"])
def test_a_card_beside_the_weights_says_how_to_load_them(format, tmp_path):
    model = language_model(num_hidden_layers=1)
    mbq.apply(model, mbq.MBQConfig(w_bits=4, **RTN), [], restore="none")
    (tmp_path / "README.md").write_text("---\ntags: [mbq, quantized]\n---\nan older card\n")
    mbq.export(model, tmp_path, format)
    text = (tmp_path / "README.md").read_text()
    assert "7 linear layers" in text
    assert "weights of 4 bits, groups of 32" in text
    assert ("import mbq" in text) == (format == "pared-mbq")
    (tmp_path / "README.md").write_text("written by somebody")
    mbq.export(model, tmp_path, format)
    assert (tmp_path / "README.md").read_text() == "written by somebody"


def test_stored_scales_are_not_rounded_to_the_dtype_that_is_asked_for(tmp_path):
    model = llava_onevision(num_hidden_layers=1)
    mbq.apply(model, mbq.MBQConfig(**RTN), [], restore="none")
    model.save_pretrained(tmp_path)
    loaded = mbq.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.lm_head.weight.dtype == torch.bfloat16
    scales = {name: value for name, value in model.state_dict().items() if name.endswith("weight_scale")}
    found = loaded.state_dict()
    assert all(found[name].equal(value) and value.dtype == torch.float16 for name, value in scales.items())


def test_saving_a_loaded_model_again_writes_the_same_bytes(tmp_path):
    model = language_model(num_hidden_layers=1)
    mbq.apply(model, mbq.MBQConfig(w_bits=4, **RTN), [], restore="none")
    model.save_pretrained(tmp_path / "one")
    again = mbq.from_pretrained(tmp_path / "one")
    again.save_pretrained(tmp_path / "two")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]
    assert again(IDS).logits.equal(model(IDS).logits)
    first, second = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("one", "two"))
    assert first["quantization_config"] == second["quantization_config"]
    assert first["quantization_config"]["quant_method"] == "pared-mbq"


def test_a_loaded_model_packs_what_its_configuration_lists_and_is_not_quantised_again(tmp_path):
    model = language_model(num_hidden_layers=1, tie_word_embeddings=True)
    mbq.apply(model, mbq.MBQConfig(skip_modules=("lm_head", "k_proj"), **RTN), [], restore="none")
    model.save_pretrained(tmp_path)
    loaded = mbq.from_pretrained(tmp_path)
    packed = [name for name, module in loaded.named_modules() if isinstance(module, mbq.QuantLinear)]
    assert packed == loaded.config.quantization_config.modules
    assert len(packed) == 6
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded(IDS).logits.equal(model(IDS).logits)
    with pytest.raises(mbq.AlreadyQuantizedError, match="already"):
        mbq.calibrate(loaded, [], mbq.MBQConfig(**RTN))


def test_weights_that_are_not_packed_are_not_taken_for_packed_ones(tmp_path):
    model = language_model(num_hidden_layers=1)
    model.save_pretrained(tmp_path)
    wanted = mbq.PackedConfig(mbq.MBQConfig(**RTN).to_dict(), ["model.layers.0.mlp.up_proj"])
    with pytest.raises(ValueError, match="pre-quantized"):
        type(model).from_pretrained(tmp_path, quantization_config=wanted)


def test_the_method_can_be_registered_again():
    runpy.run_path(mbq.hf.__file__)


def test_a_loaded_model_can_be_dequantised(tmp_path):
    model = language_model(num_hidden_layers=1)
    mbq.apply(model, mbq.MBQConfig(**RTN), [], restore="none")
    model.save_pretrained(tmp_path)
    logits = model(IDS).logits
    dense = mbq.from_pretrained(tmp_path).dequantize()
    assert not any(isinstance(module, mbq.QuantLinear) for module in dense.modules())
    torch.testing.assert_close(dense(IDS).logits, logits, rtol=1e-4, atol=1e-4)


def test_a_fake_quantised_model_is_saved_dense_with_a_note_and_without_a_label(tmp_path):
    model = language_model(num_hidden_layers=1)
    mbq.apply(model, mbq.MBQConfig(**RTN), [], mode="fake", restore="none")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["mbq_fake"]["w_bits"] == 3
    dense = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(dense(IDS).logits, model(IDS).logits)


def test_from_pretrained_refuses_a_folder_that_is_not_packed(tmp_path):
    language_model(num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pared-mbq"):
        mbq.from_pretrained(tmp_path)


FORMATS = {
    "W3": {"group_size": 32, "method": "rtn"},
    "W4": {"w_bits": 4, "group_size": 32, "method": "rtn"},
    "W4 symmetric": {"w_bits": 4, "group_size": 32, "method": "rtn", "symmetric": True},
    "W4A8": {"w_bits": 4, "a_bits": 8, "method": "rtn"},
}


@pytest.mark.parametrize("name", FORMATS)
def test_compressed_tensors_loads_its_export_and_computes_the_same(name, tmp_path):
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    model = language_model(num_hidden_layers=1)
    mbq.apply(model, mbq.MBQConfig(**FORMATS[name]), [], restore="none")
    mbq.export(model, tmp_path, "compressed-tensors")
    # Their placeholders for packed zero points have the shape of unpacked ones, so that these load only dequantised.
    dequantized = (
        {}
        if "symmetric" in name or name == "W4A8"
        else {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    )
    theirs, report = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True, **dequantized
    )
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    with torch.no_grad():
        ours, found = model(IDS).logits, theirs(IDS).logits
    # They multiply codes and scales in float16, and round activations with steps of 1/127.5 of a token's range.
    tolerance = 5e-2 if name == "W4A8" else 2e-3
    torch.testing.assert_close(found, ours, rtol=tolerance, atol=tolerance * float(ours.abs().max()))


def unpack_gptq(tensors, bits, first):
    """Codes (K, N) and zero points (G, N), bit by bit."""

    def stream(words, count):
        bitstring = "".join(format(int(word) & 0xFFFFFFFF, "032b")[::-1] for word in words)
        return [int(bitstring[bits * i : bits * (i + 1)][::-1], 2) for i in range(count)]

    size, out = tensors["g_idx"].numel(), tensors["scales"].shape[1]
    codes = torch.tensor([stream(column, size) for column in tensors["qweight"].T.tolist()]).T
    zeros = torch.tensor([stream(row, out) for row in tensors["qzeros"].tolist()]) + (1 if first else 0)
    scales = tensors["scales"].float()
    group = tensors["g_idx"].long()
    return ((codes - zeros[group]) * scales[group]).T


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_gptq_export_unpacks_to_the_same_weight(bits, symmetric, tmp_path):
    from safetensors.torch import load_file

    # In bfloat16 the layers have another layout here than on disk.
    model = language_model(num_hidden_layers=1).to(torch.bfloat16)
    # A row of positive weights has a zero point of zero.
    model.model.layers[0].mlp.gate_proj.weight.data[5].abs_()
    mbq.apply(model, mbq.MBQConfig(w_bits=bits, symmetric=symmetric, **RTN), [], restore="none")
    mbq.export(model, tmp_path, "gptq")
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["bits"], config["group_size"]) == ("gptq", bits, 32)
    state = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.gate_proj"
    tensors = {key: state[f"{name}.{key}"] for key in ("qweight", "qzeros", "scales", "g_idx")}
    weight = unpack_gptq(tensors, bits, config["checkpoint_format"] == "gptq")
    torch.testing.assert_close(weight, model.get_submodule(name).dequantized())


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("symmetric", [False, True])
def test_gptqmodel_loads_a_gptq_export_and_computes_the_same(bits, symmetric, tmp_path):
    gptqmodel = pytest.importorskip("gptqmodel", reason="pip install gptqmodel")
    model = language_model(num_hidden_layers=1)
    mbq.apply(model, mbq.MBQConfig(w_bits=bits, symmetric=symmetric, **RTN), [], restore="none")
    mbq.export(model, tmp_path, "gptq")
    tokenizer().save_pretrained(tmp_path)
    loaded = gptqmodel.GPTQModel.load(
        str(tmp_path), backend=gptqmodel.BACKEND.TORCH, device="cpu", dtype=torch.float16
    ).model
    assert not isinstance(loaded.model.layers[0].mlp.down_proj, torch.nn.Linear)
    with torch.no_grad():
        ours, theirs = model(IDS).logits, loaded(IDS).logits.float()
    # They compute in 16 bits.
    torch.testing.assert_close(theirs, ours, rtol=2e-2, atol=2e-2 * float(ours.abs().max()))


def test_an_awq_export_unpacks_to_the_same_weight(tmp_path):
    from safetensors.torch import load_file

    model = language_model(num_hidden_layers=1)
    mbq.apply(model, mbq.MBQConfig(w_bits=4, **RTN), [], restore="none")
    mbq.export(model, tmp_path, "awq")
    state = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"

    def codes(words):
        found = torch.zeros(words.shape[0], words.shape[1] * 8, dtype=torch.int64)
        for place, column in enumerate(AWQ_ORDER):
            found[:, column::8] = (words.long() >> (4 * place)) & 15
        return found

    scales = state[f"{name}.scales"].float().repeat_interleave(32, 0)
    zeros = codes(state[f"{name}.qzeros"]).repeat_interleave(32, 0)
    weight = ((codes(state[f"{name}.qweight"]) - zeros) * scales).T
    torch.testing.assert_close(weight, model.get_submodule(name).dequantized())


@pytest.mark.parametrize(
    ("options", "format"),
    [({"a_bits": 8, "w_bits": 4}, "gptq"), ({"w_bits": 3}, "awq"), ({"w_bits": 4, "symmetric": True}, "awq")],
)
def test_what_a_format_cannot_hold_is_refused(options, format, tmp_path):
    model = language_model(num_hidden_layers=1)
    group = {} if options.get("a_bits") == 8 else {"group_size": 32}
    mbq.apply(model, mbq.MBQConfig(method="rtn", **group, **options), [], restore="none")
    with pytest.raises(ValueError, match="format"):
        mbq.export(model, tmp_path, format)


def test_a_model_that_is_not_packed_is_not_exported(tmp_path):
    with pytest.raises(ValueError, match="packed"):
        mbq.export(language_model(num_hidden_layers=1), tmp_path)


def test_text_alone_can_be_the_calibration(tmp_path):
    model = language_model(num_hidden_layers=1)
    handle = mbq.apply(model, mbq.MBQConfig(group_size=32, grid=2, method="awq"), text_batches(1))
    mbq.export(model, tmp_path, "pared-mbq")
    assert mbq.from_pretrained(tmp_path)(IDS).logits.equal(model(IDS).logits)
    handle.remove()
    assert not hasattr(model.config, "quantization_config")
