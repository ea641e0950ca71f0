"""The command line on a tiny model in a folder, from calibration to judgement."""

from __future__ import annotations

import pytest
from cskv import load
from cskv.cli import app
from typer.testing import CliRunner

WORDS = [f"w{number}" for number in range(90)]


@pytest.fixture
def cskv():
    """Runs `cskv` with the given arguments."""
    return lambda *arguments: CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture
def folder(language_model, tmp_path):
    """A tiny model with a tokenizer of ninety words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number + 3 for number, word in enumerate(WORDS)} | {"<pad>": 0, "<s>": 1, "<unk>": 2}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    language_model().save_pretrained(tmp_path / "model")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def text(tmp_path):
    """A text file of a few hundred words."""
    path = tmp_path / "text.txt"
    path.write_text(" ".join(WORDS[(7 * place * place + place) % 90] for place in range(600)))
    return path


def test_calibrate_fit_finetune_and_eval_follow_each_other(cskv, folder, text, tmp_path):
    out = tmp_path / "factors"
    common = ("--out", out, "--length", 64)
    result = cskv("calibrate", folder, "--data", text, "--steps", 4, "--key-ratio", 0.5, *common)
    assert result.exit_code == 0, result.output
    assert load(out)[0].k_density == 0.5
    assert sorted(path.name for path in out.iterdir()) == ["cskv.json", "factors.safetensors", "statistics.safetensors"]

    result = cskv("fit", folder, "--out", out, "--allocate", 0.25)
    assert result.exit_code == 0, result.output
    config = load(out)[0]
    assert sum(config.k_rank + config.v_rank) == 4 * 8

    result = cskv("fit", folder, "--out", out, "--key-ratio", 0.5, "--value-ratio", 0.5)
    assert result.exit_code == 0, result.output
    before = load(out)[1]
    result = cskv("finetune", folder, "--data", text, "--steps", 3, "--texts", 2, "--bits", 4, *common)
    assert result.exit_code == 0, result.output
    config, after = load(out)
    assert config.k_bits == config.v_bits == 4
    assert not bool((after[0].a_k == before[0].a_k).all())

    result = cskv("eval", folder, "--data", text, "--texts", 2, "--prefix", 16, *common)
    assert result.exit_code == 0, result.output
    rows = dict(line.rsplit(None, 1) for line in result.stdout.splitlines() if line.strip())
    assert int(rows["tokens scored"]) == 2 * 48
    assert float(rows["cskv"]) > 1
    assert float(rows["full cache"]) > 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("calibrate", "{model}", "--data", "{text}", "--key-ratio", "1.5"), "k_density"),
        (("calibrate", "{model}", "--data", "{text}", "--steps", "4000"), "4000"),
        (("calibrate", "{model}", "--data", "nowhere.txt"), "nowhere.txt"),
        (("calibrate", "{model}", "--data", "{text}", "--dtype", "int8"), "int8"),
        (("fit", "{model}", "--out", "nowhere"), "calibrate"),
        (("finetune", "{model}", "--out", "nowhere"), "nowhere"),
        (("eval", "{model}", "--out", "nowhere"), "nowhere"),
    ],
)
def test_wrong_arguments_end_with_a_message_and_no_traceback(cskv, folder, text, arguments, says):
    result = cskv(*(one.format(model=folder, text=text) for one in arguments))
    assert result.exit_code == 2
    assert says in result.output.replace("\n", "")
