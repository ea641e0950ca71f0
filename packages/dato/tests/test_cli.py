from __future__ import annotations

import json

import pytest
from dato.cli import app
from typer.testing import CliRunner

TINY = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 16,
    "layers_per_block": 1,
    "block_out_channels": [16, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "cross_attention_dim": 8,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
}


@pytest.fixture
def pared():
    """Runs `pared dato` with the given arguments."""
    return lambda *arguments: CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture
def config(tmp_path):
    """The configuration file of a tiny UNet."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TINY))
    return path


def test_presets_lists_what_each_policy_does(pared):
    result = pared("presets")
    assert result.exit_code == 0
    assert "sd15-coco: 5 full, 21 depth-1, 25 skip" in result.stdout


def test_plan_prints_a_row_per_depth_and_the_speedups(pared, config):
    result = pared("plan", config, "--preset", "sd15-coco", "--size", 256)
    assert result.exit_code == 0, result.output
    rows = [line.split()[0] for line in result.stdout.splitlines() if line]
    assert rows[1:6] == ["full", "depth-1", "depth-2", "depth-3", "depth-4"]
    assert "cache alone" in result.stdout
    assert "cache and pruning" in result.stdout


def test_plan_takes_a_policy_file_and_another_number_of_calls(pared, config, tmp_path):
    policy = tmp_path / "policy.json"
    policy.write_text('{"depth": [-1, 0, 1, 0], "ratio": 0.2}')
    result = pared("plan", config, "--preset", policy, "--calls", 8)
    assert result.exit_code == 0, result.output
    assert "8 calls: " in result.stdout


def test_plan_refuses_a_model_of_another_class(pared, tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"_class_name": "AutoencoderKL"}')
    result = pared("plan", path)
    assert result.exit_code == 2
    assert "AutoencoderKL" in result.output


def test_plan_names_the_models_it_knows_when_the_file_is_missing(pared):
    result = pared("plan", "sd16")
    assert result.exit_code == 2
    assert all(name in result.output for name in ("sd15", "sd21", "sdxl"))


def test_search_refuses_a_file_without_prompts(pared, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n")
    result = pared("search", "sd-world", "--prompts", prompts)
    assert result.exit_code == 2
    assert "no prompt" in result.output
