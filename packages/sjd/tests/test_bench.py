"""The bench, the demo and the commands, on a pipeline that has not been trained."""

from __future__ import annotations

import pytest
import torch
from sjd.bench import counting, full_size, passes, run, speed
from sjd.bench.world import PLAIN, Arm, Sampling, World

pytest.importorskip("pared_zoo.llamagen")

from pared_bench import BenchContext, DemoContext
from pared_zoo.world import sample_scenes


class Pipeline:
    """A LlamaGen transformer with random weights, and pictures that are tokens."""

    def __init__(self):
        from sjd_models import lively, llamagen, wrapped

        self.transformer = lively(wrapped(llamagen), 0, torch.float32)

    def encode_prompt(self, prompts):
        return torch.arange(len(prompts)) % 5, torch.ones(len(prompts), 1, dtype=torch.bool)

    def decode_tokens(self, tokens):
        return (tokens.view(-1, 1, 4, 4) / 20).repeat(1, 3, 8, 8)


@pytest.fixture
def world(monkeypatch):
    made = World(Pipeline(), ["a", "b", "c"], list(sample_scenes(3, 1)))
    monkeypatch.setattr(World, "load", classmethod(lambda cls, *arguments, **options: made))
    return made


@pytest.fixture
def context(tmp_path):
    return BenchContext("cpu", out=tmp_path)


def test_plain_decoding_takes_a_pass_for_every_token_and_windows_fewer(world):
    plain = world.draw(PLAIN, 3, 0)
    fast = world.draw(Arm("maximal", 8), 3, 0)
    assert plain.passes == [16] * 3
    assert sum(fast.passes) < sum(plain.passes)
    greedy = Sampling(greedy=True)
    assert world.draw(PLAIN, 3, 0, greedy).tokens.equal(world.draw(Arm("maximal", 8), 3, 0, greedy).tokens)


def test_jacobi_with_fresh_samples_hardly_gains(world):
    jacobi = world.draw(Arm("Jacobi", 8, jacobi=True), 3, 0)
    assert sum(jacobi.passes) >= sum(world.draw(Arm("maximal", 8), 3, 0).passes)


def test_entropy_is_that_of_what_was_drawn(world):
    tokens = world.draw(PLAIN, 3, 0).tokens
    cold, warm = (world.entropy(tokens, Sampling(temperature=t)) for t in (0.5, 2.0))
    assert 0 < cold < warm < torch.tensor(20.0).log()


def test_the_table_of_passes_has_every_arm_and_its_claims(world, context, monkeypatch):
    monkeypatch.setattr(passes, "WINDOWS", (16, 32, 64))
    monkeypatch.setattr(passes, "INITS", ("random", "above", "above_sample"))
    records = passes.run(context, world, 3)
    found = {(r.variant, r.settings["window"]) for r in records if r.metric == "passes per image"}
    assert {("plain", 0), ("maximal", 32), ("Jacobi", 16), ("gumbel, match", 64)} <= found
    assert {r.unit for r in records if r.metric == "entropy of what is drawn"} == {"nat"}
    assert sum(r.metric == "margin" for r in records) == 9


def test_speed_is_measured_in_turns_against_the_models_own_loop(world, context):
    records = speed.batch_of(context, world, 2, (1, 3), 1)
    assert {r.variant for r in records if "speed-up" in r.metric} == {
        "one token a pass, our loop",
        "maximal, 1",
        "maximal, 3",
        "independent, random, 15 (paper)",
    }
    widths = speed.width_of_a_pass(context, world, 1)
    assert sum(r.metric == "time" for r in widths) == 6


def test_a_pass_that_is_timed_stays_in_its_place(world):
    engine = speed._in_the_middle(world, 3)
    before = engine.window.committed.clone()
    for _ in range(3):
        assert engine._advance().tolist() == [0]
    assert engine.window.committed.equal(before)


def test_full_size_says_why_it_is_missing_without_a_gpu(context):
    (record,) = full_size.run(context, {})
    assert record.value is None
    assert "GPU" in record.note


def test_full_size_code_runs_on_a_small_shape_with_a_replayed_trace(context, monkeypatch):
    monkeypatch.setattr(full_size, "WINDOWS", (0, 3))
    records = full_size.measure(context, full_size.SMALL, {"maximal": [[1, 3, 2], [4]]}, rounds=1)
    rates = {
        r.settings["acceptance"]: r.settings["tokens per pass"]
        for r in records
        if r.metric == "time of an image" and r.variant == "maximal, 3"
    }
    assert rates == {"published": full_size.PUBLISHED["maximal"], "replayed from ar-world": 3.0}
    assert all(r.settings["weights"] == "random" for r in records)


def test_the_count_model_saturates_without_coupling_and_grows_with_it():
    model = counting.CountModel.of_world(300)

    def mean(refresh, init, window, verify="speculative"):
        config = Arm("", window, refresh, init, verify).config
        counts, _ = counting.passes(model, config, 24, 1)
        return sum(counts) / len(counts)

    narrow, wide = (mean("independent", "above", window) for window in (16, 32))
    assert narrow < 200
    assert abs(wide / narrow - 1) < 0.08
    coupled = mean("maximal", "above", 32)
    assert coupled < 0.8 * wide
    assert mean("gumbel", "above", 32, "match") < 0.8 * wide
    assert mean("maximal", "above", 16) <= mean("maximal", "random", 16)


def test_wrong_experiments_and_counts_are_named(context):
    with pytest.raises(ValueError, match="experiments='sped'"):
        run(context, experiments="sped")
    with pytest.raises(ValueError, match="images=1"):
        run(context, images=1)


def test_the_demo_shows_the_film_the_pair_and_the_map(world, tmp_path):
    from sjd import demo

    result = demo.run(DemoContext("cpu", out=tmp_path), window=6)
    assert result.metrics["same_tokens"] == 1
    assert result.metrics["passes"] < result.metrics["plain.passes"] == 16
    assert len(result.figures) == 3
    assert result.tables[0].rows[0][0] == "plain decoding"
    assert "a dog" in demo.run(DemoContext("cpu", out=tmp_path), prompt="a dog", window=6).figures[0].caption
    with pytest.raises(ValueError, match="guidance"):
        demo.run(DemoContext("cpu", out=tmp_path), guidance=0.0)
    with pytest.raises(ValueError, match="window"):
        demo.run(DemoContext("cpu", out=tmp_path), window=0)


def test_commands_print_tables(monkeypatch):
    from sjd import exactness
    from sjd.cli import app
    from typer.testing import CliRunner

    few = [
        exactness.Deviation("maximal, left", 2, 4, 2, 1e-16, True),
        exactness.Deviation("control", 2, 4, 2, 0.1, False),
    ]
    monkeypatch.setattr(exactness, "deviations", lambda seed: iter(few))
    shown = CliRunner().invoke(app, ["exactness"])
    assert shown.exit_code == 0
    assert "1.0e-16" in shown.output
    assert CliRunner().invoke(app, ["bench", "ar-world", "--windows", "a"]).exit_code == 2
    assert CliRunner().invoke(app, ["bench", "ar-world", "--windows", "0"]).exit_code == 2


def test_a_model_of_ones_own_is_measured_by_window(tiny, monkeypatch):
    from sjd.bench import of_model
    from sjd_models import SIDE

    family = tiny("llamagen", torch.float32)

    def draw(seed):
        torch.manual_seed(seed)
        return family.generate(rows=1)

    monkeypatch.setattr(of_model, "_zoo", lambda *arguments: (family.model, draw))
    lines = list(of_model.measure_model("ar-world", [3, 7], "", 1, "maximal", 1.0, 0, "cpu"))
    assert len(lines) == 4
    assert float(lines[2].split()[1]) <= SIDE**2
