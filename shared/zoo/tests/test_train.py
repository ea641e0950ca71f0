import csv
import json
from pathlib import Path

import pytest
import torch
from pared_zoo import shipped
from pared_zoo.recipes import RECIPES, recipe
from pared_zoo.train import run

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _line_recipe(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    monkeypatch.setitem(RECIPES, "line", ("line_recipe", "Line"))
    monkeypatch.setattr(recipe("line"), "interrupt_at", None)


def weights(exported: Path) -> torch.Tensor:
    return torch.load(exported / "line.pt", weights_only=True)["weight"]


def test_an_interrupted_run_resumes_to_the_same_weights_as_an_uninterrupted_one(tmp_path, monkeypatch):
    whole = weights(run("line", out=tmp_path / "whole"))
    monkeypatch.setattr(recipe("line"), "interrupt_at", 7)
    with pytest.raises(KeyboardInterrupt):
        run("line", out=tmp_path / "cut")
    monkeypatch.setattr(recipe("line"), "interrupt_at", None)
    resumed = weights(run("line", out=tmp_path / "cut", resume=True))
    assert torch.equal(whole, resumed)


def test_another_seed_gives_other_weights(tmp_path):
    assert not torch.equal(weights(run("line", out=tmp_path / "a")), weights(run("line", out=tmp_path / "b", seed=1)))


def test_the_export_holds_log_plot_facts_numbers_and_card(tmp_path):
    exported = run("line", out=tmp_path / "line", steps=30)
    with (exported / "loss.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[-1]["step"] == "30"
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    assert (exported / "loss.png").read_bytes().startswith(b"\x89PNG")
    distance = json.loads((exported / "metrics.json").read_text())["distance"]
    assert f"| distance | {distance:.4g} |" in (exported / "README.md").read_text()


def test_a_used_folder_is_refused_without_resume(tmp_path):
    run("line", out=tmp_path / "line")
    with pytest.raises(FileExistsError, match="resume=True"):
        run("line", out=tmp_path / "line")


def test_wrong_arguments_name_what_is_valid(tmp_path):
    with pytest.raises(ValueError, match="vae-world"):
        run("vae-wrold", out=tmp_path)
    with pytest.raises(ValueError, match="size='huge'"):
        run("line", out=tmp_path, size="huge")
    with pytest.raises(ValueError, match="steps=0"):
        run("line", out=tmp_path, steps=0)


def test_shipping_refuses_a_model_that_was_not_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "weights")
    exported = run("line", out=tmp_path / "line", evaluate=False)
    with pytest.raises(ValueError, match="metrics.json"):
        shipped.ship(exported, "line")
    assert not (tmp_path / "weights" / "line").exists()


def test_a_shipped_model_is_found_by_path_and_load(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "weights")
    exported = run("line", out=tmp_path / "line")
    shipped.ship(exported, "line")
    assert torch.equal(shipped.load("line")["weight"], weights(exported))
    assert shipped.card("line").count("# line") == 1


def test_a_model_without_weights_tells_how_to_train_it(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "weights")
    with pytest.raises(FileNotFoundError, match="pared zoo train line"):
        shipped.path("line")


def test_a_failing_export_leaves_the_older_one_and_no_rest(tmp_path):
    target = tmp_path / "export"
    with shipped.replace_folder(target) as folder:
        (folder / "a").write_text("old")

    def fail():
        with shipped.replace_folder(target) as folder:
            (folder / "a").write_text("new")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert (target / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["export"]


def test_recipe_batches_depend_on_seed_step_and_rank_only():
    kind = recipe("vae-world")
    batch = kind().batch(3, 0, 5)["pixels"]
    assert torch.equal(batch, kind().batch(3, 0, 5)["pixels"])
    assert not torch.equal(batch, kind().batch(4, 0, 5)["pixels"])
    assert not torch.equal(batch, kind().batch(3, 1, 5)["pixels"])
    assert not torch.equal(batch, kind(seed=1).batch(3, 0, 5)["pixels"])
