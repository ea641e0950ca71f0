from __future__ import annotations

import json

import pytest
from dfa_models import MODELS
from dfa_pipelines import pipeline
from ditfastattn2.cli import app
from typer.testing import CliRunner


@pytest.fixture
def pared():
    """Runs `pared ditfastattn2` with the given arguments."""
    # Messages hold long paths, which must not be broken.
    return lambda *arguments: CliRunner(env={"COLUMNS": "400"}).invoke(app, list(map(str, arguments)))


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle\n\na blue square\n")
    return path


def test_a_plan_is_made_shown_and_applied(pared, prompts, tmp_path):
    folder, plan = tmp_path / "model", tmp_path / "plan.json"
    pipeline().save_pretrained(folder)
    size = ("--height", 64, "--width", 64)
    made = pared(
        "calibrate", "--model", folder, "--prompts", prompts, "--steps", 5, "--delta", 3, "--out", plan, *size,
        "--methods", "cached,arrow:1/4",
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    assert "of attention removed" in made.stdout
    assert json.loads(plan.read_text())["num_steps"] == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "plan.json", "prompts.txt"]

    shown = pared("show", plan, "--picture", tmp_path / "plan.png")
    assert shown.exit_code == 0, shown.output
    assert "transformer_blocks.0.attn2" in shown.stdout
    assert (tmp_path / "plan.png").read_bytes()[:4] == b"\x89PNG"

    done = pared("apply", plan, "--model", folder, "--prompts", prompts, "--out", tmp_path / "out", "--compare")
    assert done.exit_code == 0, done.output
    assert "of attention removed" in done.stdout
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["000-full.png", "000.png", "001-full.png", "001.png"]


def test_a_plan_of_two_branches_gets_two_pictures(pared, plan_of, tmp_path):
    plan_of(MODELS["wan"](), branches=("cond", "uncond")).save(tmp_path / "plan.json")
    shown = pared("show", tmp_path / "plan.json", "--picture", tmp_path / "plan.svg")
    assert shown.exit_code == 0, shown.output
    assert {path.name for path in tmp_path.glob("*.svg")} == {"plan-cond.svg", "plan-uncond.svg"}


def test_wrong_arguments_are_named(pared, prompts, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    for arguments, message in (
        (("show", tmp_path / "none.json"), "none.json"),
        (("show", prompts), "not JSON"),
        (("calibrate", "--model", "x", "--prompts", prompts, "--steps", 4, "--delta", -1), "delta must be"),
        (("calibrate", "--model", "x", "--prompts", prompts, "--steps", 4, "--dtype", "int8"), "--dtype"),
    ):
        result = pared(*arguments)
        assert result.exit_code == 2
        assert message in " ".join(result.output.split())


def test_a_prompt_file_without_prompts_is_refused(pared, tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    folder = tmp_path / "model"
    pipeline().save_pretrained(folder)
    result = pared("calibrate", "--model", folder, "--prompts", tmp_path / "empty.txt", "--steps", 4)
    assert result.exit_code == 2
    assert "holds no prompt" in result.output
