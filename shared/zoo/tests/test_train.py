"""The trainer, the files it leaves, and shipping what it made."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest
import torch
from accelerate.state import AcceleratorState
from pared_zoo import shipped
from pared_zoo.recipes import RECIPES, recipe
from pared_zoo.train import __main__, run
from pared_zoo.train.card import write_card
from pared_zoo.train.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from pared_zoo.train.optimizers import optimizers
from safetensors.torch import load_file


@pytest.fixture(autouse=True)
def _line_recipe(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    monkeypatch.setitem(RECIPES, "line", ("line_recipe", "Line"))
    monkeypatch.setattr(recipe("line"), "interrupt_at", None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    # Accelerate keeps what the first run of a process chose; another test is another process.
    AcceleratorState._reset_state(reset_partial_state=True)


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


class Matrices:
    """Give the line's matrix to Muon."""

    def __init__(self, monkeypatch, rate: float | None) -> None:
        schedule = dataclasses.replace(recipe("line").schedules["small"], muon_learning_rate=rate)
        monkeypatch.setattr(recipe("line"), "schedules", {"small": schedule})
        monkeypatch.setattr(recipe("line"), "muon_parameters", lambda self, module: [module.weight])


def test_what_a_recipe_gives_to_muon_is_stepped_by_it_and_resumes(tmp_path, monkeypatch):
    plain = weights(run("line", out=tmp_path / "plain"))
    Matrices(monkeypatch, 0.1)
    module = recipe("line")().build()
    adam, muon = optimizers(recipe("line")(), module)
    assert [p is module.bias for group in adam.param_groups for p in group["params"]] == [True]
    assert [p is module.weight for group in muon.param_groups for p in group["params"]] == [True]
    whole = weights(run("line", out=tmp_path / "whole"))
    assert not torch.equal(whole, plain)
    monkeypatch.setattr(recipe("line"), "interrupt_at", 7)
    with pytest.raises(KeyboardInterrupt):
        run("line", out=tmp_path / "cut")
    monkeypatch.setattr(recipe("line"), "interrupt_at", None)
    assert torch.equal(weights(run("line", out=tmp_path / "cut", resume=True)), whole)


def test_matrices_for_muon_need_a_rate(tmp_path, monkeypatch):
    Matrices(monkeypatch, None)
    with pytest.raises(ValueError, match="muon_learning_rate=None must be a rate for 1 matrices of 'line'"):
        run("line", out=tmp_path / "line")


def losses(folder: Path) -> dict[str, str]:
    with (folder / "loss.csv").open() as file:
        return {row["step"]: row["loss"] for row in csv.DictReader(file)}


def test_a_resumed_run_continues_the_loss_log(tmp_path, monkeypatch):
    whole = losses(run("line", out=tmp_path / "whole"))
    monkeypatch.setattr(recipe("line"), "interrupt_at", 7)
    with pytest.raises(KeyboardInterrupt):
        run("line", out=tmp_path / "cut")
    assert list(losses(tmp_path / "cut")) == [str(k) for k in range(1, 8)]
    monkeypatch.setattr(recipe("line"), "interrupt_at", None)
    assert losses(run("line", out=tmp_path / "cut", resume=True)) == whole


def test_resuming_where_nothing_was_begun_starts(tmp_path):
    assert (run("line", out=tmp_path / "new", resume=True) / "metrics.json").exists()


def test_a_checkpoint_replaces_the_older_one_and_half_written_ones_are_ignored(tmp_path):
    module = torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(module.parameters())
    save_checkpoint(tmp_path, 3, module, optimizer)
    (tmp_path / "checkpoint-00000009.tmp").mkdir()
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-00000003"
    save_checkpoint(tmp_path, 5, module, optimizer)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-00000005"]
    other = torch.nn.Linear(2, 1)
    assert load_checkpoint(tmp_path / "checkpoint-00000005", other, torch.optim.AdamW(other.parameters())) == 5
    assert torch.equal(other.weight, module.weight)


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


def test_training_leaves_the_plot_settings_of_the_process_alone(tmp_path):
    before = dict(matplotlib.rcParams)
    run("line", out=tmp_path / "line", steps=2)
    assert dict(matplotlib.rcParams) == before


def write_facts(folder: Path, steps: int, metrics: dict[str, float], starts: list[list[int]] | None = None) -> str:
    schedule = vars(recipe("line")().schedule)
    facts = {"name": "line", "size": "small", "seed": 4, "steps": steps, "parameters": 12345, "schedule": schedule}
    facts["starts"] = starts or [[0, steps]]
    (folder / "training.json").write_text(json.dumps(facts))
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return write_card(folder, recipe("line")()).read_text()


def test_a_card_says_what_was_trained_and_measured(tmp_path):
    card = write_facts(tmp_path, 12, {"prompts": 20000, "accuracy_mean": 0.87654})
    assert "A recipe that trains in a second" in card
    assert "Objective: A line fitted to noisy points." in card
    assert "12,345 trained parameters, seed 4: 12 steps of 8 samples (96 in all), peak learning rate 0.1" in card
    assert "`pared zoo train line --size small --seed 4`" in card
    assert "| prompts | 20,000 |" in card
    assert "| accuracy mean | 0.8765 |" in card
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "metrics.json", "training.json"]


def test_the_command_of_a_card_repeats_a_run_of_another_length(tmp_path):
    assert "`pared zoo train line --size small --seed 4 --steps 7`" in write_facts(tmp_path, 7, {"distance": 0.5})


def test_a_card_says_that_the_length_was_changed_on_the_way(tmp_path):
    card = write_facts(tmp_path, 12, {"distance": 0.5}, [[0, 8], [1500, 12]])
    assert "from step 0 on it was planned for 8 steps, from step 1,500 on it was planned for 12 steps" in card
    assert "on the way" not in write_facts(tmp_path, 12, {"distance": 0.5})


def test_a_run_resumed_with_another_length_records_both(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe("line"), "interrupt_at", 7)
    with pytest.raises(KeyboardInterrupt):
        run("line", out=tmp_path / "line")
    monkeypatch.setattr(recipe("line"), "interrupt_at", None)
    exported = run("line", out=tmp_path / "line", resume=True, steps=15)
    assert json.loads((exported / "training.json").read_text())["starts"] == [[0, 12], [7, 15]]


def test_a_run_cannot_be_resumed_with_another_seed(tmp_path):
    run("line", out=tmp_path / "line")
    with pytest.raises(ValueError, match=r"seed=1.*begun with 0"):
        run("line", out=tmp_path / "line", resume=True, seed=1)


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
    with pytest.raises(ValueError, match=r"no metrics\.json"):
        shipped.ship(exported, "line")
    assert not (tmp_path / "weights" / "line").exists()


def test_shipping_refuses_weights_that_are_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "weights")
    monkeypatch.setattr(shipped, "MAX_BYTES", 10)
    exported = run("line", out=tmp_path / "line")
    (exported / "model.safetensors").write_bytes(bytes(11))
    with pytest.raises(ValueError, match="11 bytes of weights; at most 10"):
        shipped.ship(exported, "line")
    assert not (tmp_path / "weights").exists()


def test_shipped_configurations_load_in_float32_and_do_not_tell_where_parts_were_loaded_from(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "weights")
    exported = run("line", out=tmp_path / "line")
    (exported / "vae").mkdir()
    (exported / "vae" / "config.json").write_text(
        '{"_name_or_path": "/home/me/vae", "channels": 4, "dtype": "float16"}'
    )
    config = shipped.ship(exported, "line") / "vae" / "config.json"
    assert json.loads(config.read_text()) == {"channels": 4, "dtype": "float32"}


def test_the_module_trains_and_ships_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "weights")
    monkeypatch.setattr(
        sys, "argv", ["train", "line", "--out", str(tmp_path / "line"), "--steps", "3", "--seed", "5", "--ship"]
    )
    __main__.main()
    facts = json.loads((shipped.path("line") / "training.json").read_text())
    assert (facts["steps"], facts["seed"]) == (3, 5)


@pytest.mark.slow
def test_two_processes_end_with_the_same_weights_and_write_one_export(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run(
        [*launcher, Path(__file__).with_name("two_processes.py"), tmp_path],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=240,
    )
    # The first process holds the averaged weights in the end; its own are those of the checkpoint.
    first = load_file(tmp_path / "run" / "checkpoint-00000012" / "model.safetensors")
    second = load_file(tmp_path / "end-1.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in ("weight", "bias"))
    assert not torch.equal(first["weight"], recipe("line")().build().weight)
    drawn = [load_file(tmp_path / f"first-batch-{rank}.safetensors")["x"] for rank in (0, 1)]
    assert [len(x) for x in drawn] == [4, 4]
    assert not torch.equal(*drawn)
    assert [p.name for p in tmp_path.glob("saved-by-*")] == ["saved-by-0"]
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"checkpoint-00000012", "export", "loss.csv"}
    assert {p.name for p in (tmp_path / "run" / "export").iterdir()} == {
        "README.md", "line.pt", "loss.csv", "loss.png", "metrics.json", "training.json"
    }  # fmt: skip


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
