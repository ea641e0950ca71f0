"""The command line on a tiny model in a folder, and the data that it reads."""

from __future__ import annotations

import json

import mbq
import pytest
import torch
from mbq.cli import RESULT, app
from mbq.data import labelled, load_batches
from mbq_models import WORDS, language_model, tokenizer
from typer.testing import CliRunner


def invoke(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture
def folder(tmp_path):
    language_model(num_hidden_layers=2).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(" ".join(WORDS[(7 * place * place + place) % 50] for place in range(200)))
    return path


def test_quantize_report_and_export_follow_each_other(folder, text, tmp_path):
    out = tmp_path / "packed"
    options = (
        "--bits",
        "w3",
        "--group-size",
        32,
        "--calib",
        text,
        "--length",
        32,
        "--samples",
        2,
        "--dtype",
        "float32",
    )
    with pytest.warns(UserWarning, match="vision"):
        result = invoke("quantize", folder, "--out", out, *options)
    assert result.exit_code == 0, result.output
    assert "14 linear layers" in result.output
    model = mbq.from_pretrained(out)
    assert model(torch.tensor([[5, 6, 7]])).logits.isfinite().all()
    assert (out / "tokenizer.json").is_file()
    stored = mbq.MBQResult.load(out / RESULT)
    assert stored.done == 2

    result = invoke("report", out)
    assert result.exit_code == 0, result.output
    assert len(result.output.splitlines()) == 1 + 8
    assert "gate up" in result.output

    result = invoke("export", out, "--out", tmp_path / "other", "--format", "gptq")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "other/config.json").read_text())["quantization_config"]["quant_method"] == "gptq"
    assert (tmp_path / "other/tokenizer.json").is_file()


def test_quantize_takes_up_what_calibrate_wrote(folder, text, tmp_path):
    out, options = tmp_path / "packed", ("--group-size", 32, "--calib", text, "--length", 32, "--samples", 1)
    result = invoke("calibrate", folder, "--out", out, "--method", "awq", *options)
    assert result.exit_code == 0, result.output
    assert "8 scales of 2 layers" in result.output
    assert not (out / "config.json").exists()
    stored = mbq.MBQResult.load(out / RESULT)
    stored.groups[0].scale.fill_(7.0)
    stored.save(out / RESULT)
    result = invoke("quantize", folder, "--out", out, "--method", "awq", *options)
    assert result.exit_code == 0, result.output
    assert mbq.MBQResult.load(out / RESULT).groups[0].scale.eq(7).all()
    assert mbq.from_pretrained(out).config.quantization_config.config.method == "awq"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--bits", "q3"), "q3"),
        (("--bits", "w9"), "w_bits"),
        (("--bits", "w3", "--group-size", 16), "group_size"),
        (("--bits", "w3"), "calib"),
        (("--method", "best"), "method"),
        (("--calib", "nowhere", "--group-size", 32), "nowhere"),
    ],
)
def test_wrong_options_are_named(options, named, folder, tmp_path):
    result = invoke("quantize", folder, "--out", tmp_path / "packed", *options)
    assert result.exit_code == 2
    assert named in result.output
    assert not (tmp_path / "packed").exists()


def test_answers_of_conversations_get_labels():
    batch = labelled(tokenizer(), "w1 w2", "w7 w8")
    assert tokenizer().decode(batch["input_ids"][0]) == "user w1 w2 assistant w7 w8"
    assert batch["labels"][0].tolist() == [-100] * 4 + [12, 13]


def test_data_comes_from_text_and_conversations_of_a_folder(tmp_path, text):
    lines = [{"question": "w1", "answer": "w2"}, {"question": "w3", "answer": "w4 w5"}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    batches = load_batches(tmp_path, tokenizer(), samples=4, length=16)
    assert len(batches) == 4
    assert [type(batch) for batch in batches] == [dict, dict, torch.Tensor, torch.Tensor]


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("{", "not JSON"),
        ('{"question": "w1"}', "answer"),
        ('{"question": "w1", "answer": "w2", "image": "../secret.png"}', "secret.png"),
    ],
)
def test_a_line_that_is_no_conversation_is_named(line, named, tmp_path):
    (tmp_path / "a.jsonl").write_text(f'{{"question": "w1", "answer": "w2"}}\n{line}\n')
    with pytest.raises(mbq.CalibrationError, match=f"line 2.*{named}"):
        load_batches(tmp_path / "a.jsonl", tokenizer(), samples=4, length=16)
    with pytest.raises(mbq.CalibrationError, match="holds no"):
        load_batches(tmp_path / "missing", tokenizer(), samples=4, length=16)
