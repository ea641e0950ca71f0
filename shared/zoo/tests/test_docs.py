"""Every Python example of the README and the pages runs."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from pared_zoo.recipes import RECIPES
from pared_zoo.shipped import FOLDER
from pared_zoo.train import run

ROOM = Path(__file__).parents[1]


def play(page: str) -> dict[str, object]:
    """Run the examples of a page one after the other, as a reader who types them into one session."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOM / page).read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    names: dict[str, object] = {"__name__": "docs"}
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    return names


def test_examples_of_the_world_say_what_they_give():
    names = play("docs/world.md")
    assert names["clip"].still_spans == ((0, 3), (6, 8))
    pair = names["sample_scenes"](1, seed=5, distribution=names["pairs"])[0]
    assert names["caption"](pair) == "a small orange cross right of a large yellow square on a black background"
    assert next(names["stream"]) == pair


def test_the_recipe_of_the_training_page_trains(tmp_path, monkeypatch):
    names = play("docs/training.md")
    module = types.ModuleType("count_world", "``count-world``: a picture's number of objects.")
    module.CountWorld = names["CountWorld"]
    names["CountWorld"].__module__ = "count_world"
    monkeypatch.setitem(sys.modules, "count_world", module)
    monkeypatch.setitem(RECIPES, "count-world", ("count_world", "CountWorld"))
    exported = run("count-world", out=tmp_path / "run", steps=3)
    AcceleratorState._reset_state(reset_partial_state=True)
    card = (exported / "README.md").read_text()
    assert "``count-world``: a picture's number of objects." in card
    assert "Objective: Cross-entropy over the number of objects in a picture." in card
    assert (exported / "model.safetensors").exists()


@pytest.mark.slow
def test_examples_of_the_readme_say_what_they_give():
    names = play("README.md")
    assert names["caption"](names["scenes"][0]) == (
        "a small red square above a large dotted white diamond on a navy background"
    )
    assert names["clip_caption"](names["sample_clips"](1, seed=2, frames=16)[0]) == (
        "a small dotted red triangle stays still, then moves quickly up on a black background"
    )


@pytest.mark.slow
def test_examples_of_the_page_on_real_data_run(capsys):
    play("docs/real.md")
    assert "Paris" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(not (FOLDER / "mmdit-world").is_dir(), reason="mmdit-world is not trained here")
def test_the_example_of_the_page_on_joint_attention_paints():
    assert play("docs/mmdit.md")["image"].size == (96, 96)


@pytest.mark.slow
def test_the_examples_of_the_page_on_questions_about_clips_run():
    names = play("docs/vlm.md")
    assert names["answer"] in names["question"].choices
    assert names["metrics"]["clips"] == len(names["sheets"])
