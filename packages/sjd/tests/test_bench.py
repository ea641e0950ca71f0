"""The bench, the demo and the commands, on a pipeline that has not been trained."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import sjd
import torch
from sjd.bench import assisted, counting, full_size, passes, quality, run, shapes, speed
from sjd.bench.world import PLAIN, Arm, Sampling, World
from sjd.grammar import ImageGrammar

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
    found = {
        (r.variant, r.settings["window"], r.settings["init"]): r.value
        for r in records
        if r.metric == "passes per image"
        and r.settings["experiment"] not in ("passes by sampling", "passes by temperature")
    }
    for window in (16, 32, 64):
        assert {(rule, window, "auto") for rule in (*passes.RULES, "greedy Jacobi")} <= set(found)
        assert {("independent", window, "random"), ("maximal", window, "above_sample")} <= set(found)
    assert max(found.values()) == found["plain", 0, None] == 16
    assert {r.unit for r in records if r.metric == "entropy of what is drawn"} == {"nat"}
    assert all(0 <= r.value <= 1 for r in records if r.metric == "acceptance")
    assert sum(r.metric == "margin" for r in records) == 5 * (2 + len(passes.TEMPERATURES))


def test_the_claims_need_no_more_than_a_part_of_the_table(world, context):
    records = passes.run(context, world, 2, passes.essential())
    assert sum(r.metric == "margin" for r in records) == 15
    assert set(passes.essential()) <= set(passes.arms())


def test_pictures_are_judged_against_plain_sampling_scene_by_scene(world, context, monkeypatch):
    monkeypatch.setattr(quality, "features", lambda pictures: torch.as_tensor(pictures).float().mean((1, 2)) / 255)
    arms = (PLAIN, Arm("maximal, 6", 6))
    records = quality.run(context, world, 6, arms)
    assert [r.variant for r in records if r.metric == "Frechet distance"] == ["plain", "maximal, 6"]
    assert {r.metric for r in records if r.unit == "standard errors"} == {
        "Frechet distance against plain",
        "attribute accuracy against plain",
    }


def test_a_difference_is_found_where_there_is_one_and_only_there(rng):
    def judged(shift, offset):
        noise = 0.1 * torch.randn(200, generator=rng)
        return quality.Judged(torch.randn(200, 4, generator=rng) + shift, hard + noise + offset)

    hard = torch.rand(200, generator=rng)  # scenes differ much more than arms do
    reference = torch.randn(200, 4, generator=rng) - 1  # all of them are far from it
    plain, same, worse = judged(0, 0), judged(0, 0), judged(0.5, -0.05)
    assert all(abs(one) < 3 for one in quality.differences(same, plain, reference).values())
    found = quality.differences(worse, plain, reference)
    assert found["Frechet distance"] > 3
    assert found["attribute accuracy"] < -3


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


@pytest.mark.parametrize("name", ["llama", "emu3"])
def test_assistance_by_ngrams_is_counted_beside_generate_and_sjd(name, context, tiny, monkeypatch):
    monkeypatch.setattr(assisted, "WINDOWS", (5,))
    family = tiny(name, torch.float32)
    ids, mask = family.prompt(1)
    length = family.grammar.length
    ours = {"image_grid": (4, 4)} if name == "emu3" else {}
    task = assisted.Task(name, family.model, [{"input_ids": ids, "attention_mask": mask}] * 2, length, ours)
    for greedy in (True, False):
        records = assisted.compare(context, task, greedy, 1)
        found = {r.variant: r.value for r in records if r.metric == "passes"}
        assert found["generate"] == length
        assert 0 < found["n-gram assistance"] <= length
        assert 0 < found["maximal, 5"] < length
        assert {r.variant for r in records if r.metric == "speed-up over generate"} == {
            "n-gram assistance",
            "maximal, 5",
        }


def test_models_that_are_missing_are_named_and_the_others_measured(context, monkeypatch):
    def missing(device):
        raise FileNotFoundError("pared zoo train emu3-world")

    for name in ("emu3_world", "smollm2"):
        monkeypatch.setattr(assisted, name, missing)
    records = assisted.run(context, 1)
    assert [r.value for r in records] == [None, None]
    assert all("pared zoo train" in r.note for r in records)


def test_full_size_says_why_it_is_missing_without_a_gpu(context):
    (record,) = full_size.run(context, lambda: pytest.fail("nothing is drawn for it"), 2)
    assert record.value is None
    assert "GPU" in record.note


SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 4}  # fmt: skip
WIDTHS = {"hidden_size": 64, "num_layers": 2, "num_attention_heads": 2, "grid_size": 6}
SHAPES = (
    replace(shapes.LUMINA, build=partial(shapes.chameleon, **SMALL, vocab_size=9216), grammar=sjd.lumina_grammar(8, 8)),
    replace(
        shapes.EMU3,
        build=partial(shapes.emu3, **SMALL, vocab_size=1200, pad_token_id=0, bos_token_id=1, eos_token_id=2),
        grammar=ImageGrammar([(6, 6)], slice(100, 1100), line_end=51, after=(52, 53, 2)),
    ),
    replace(
        shapes.LLAMAGEN,
        build=partial(
            shapes.llamagen, hidden_size=64, num_layers=2, num_attention_heads=2, grid_size=6, vocab_size=900
        ),
        grammar=ImageGrammar([(6, 6)], slice(0, 900)),
        batch=2,
    ),
)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_full_size_code_runs_on_a_small_shape_with_a_replayed_trace(shape, context, monkeypatch):
    monkeypatch.setattr(full_size, "WINDOWS", (0, 3, 15))
    traces = {("maximal", 3): [[1, 3, 2], [4]], ("maximal", 31): [[9]]}
    records = full_size.measure(context, replace(shape, dtype=torch.float32), traces, rounds=1)
    rates = {
        (r.settings["acceptance"], r.variant): r.settings["tokens per pass"]
        for r in records
        if r.metric == "time of an image" and "acceptance" in r.settings
    }
    # What was counted at one window is not told of another.
    assert rates == {("published", "independent, 15"): 2.3, ("replayed from ar-world", "maximal, 3"): 3.0}
    assert all(r.settings["weights"] == "random" for r in records)
    assert {r.metric for r in records if r.variant == "3 drafts"} >= {"time", "forward", "head", "step"}


def test_traces_are_what_passes_committed(world, monkeypatch):
    monkeypatch.setattr(full_size, "WINDOWS", (0, 4))
    traces = full_size.traces_of(world, 3, 0)
    assert set(traces) == {("independent", 4), ("maximal", 4)}
    assert all(sum(image) == 16 for images in traces.values() for image in images)


def test_the_count_model_saturates_without_coupling_and_grows_with_it():
    """The whole table, in a world of as many nats a cell as what was expected of it was measured in."""
    model = counting.CountModel.of_world().heated(1.4)
    table, entropies = {}, []
    for name in counting.COLUMNS:
        for window, (ratios, entropy) in counting.row(model, name, 24, 0).items():
            table[name, window] = sum(ratios) / len(ratios)
            entropies.append(entropy)
    assert all(1.2 < entropy < 1.5 for entropy in entropies)
    for name in ("independent, random", "independent, left", "independent, above"):
        assert table[name, 4] < table[name, 16]
        assert abs(table[name, 32] / table[name, 16] - 1) < 0.08
        assert table["maximal, above", 32] > 1.4 * table[name, 32]
    for name in ("maximal, above", "gumbel, left", "gumbel, match, above"):
        for window in (4, 8, 16):
            assert table[name, 2 * window] > 1.15 * table[name, window]
    for window in counting.WINDOWS:
        assert table["independent, above", window] > 0.98 * table["independent, random", window]
        assert table["gumbel, match, above", window] < table["maximal, above", window]


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

    monkeypatch.setattr(of_model, "_zoo", lambda *arguments: (family.model, draw, draw))
    lines = list(of_model.measure_model("ar-world", [3, 7], "", 1, "maximal", 1.0, 0, "cpu"))
    assert len(lines) == 4
    assert float(lines[2].split()[1]) <= SIDE**2


def test_a_folder_of_transformers_is_measured_from_the_command_line(tmp_path, tiny, monkeypatch):
    from sjd.cli import app
    from transformers import AutoProcessor
    from typer.testing import CliRunner

    family = tiny("emu3", torch.float32)
    family.model.save_pretrained(tmp_path)

    class Processor:
        image_area, downsample_ratio = 90**2 * 64, 8

        def __call__(self, text, **options):
            ids, mask = family.prompt(1)
            side = round(self.image_area**0.5) // 8
            return {"input_ids": ids, "attention_mask": mask, "image_sizes": [[side, side]]}

    monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda name: Processor())
    shown = CliRunner().invoke(app, ["bench", str(tmp_path), "--windows", "3,6", "--images", "1", "--size", "4"])
    assert shown.exit_code == 0, shown.output
    rows = [line.split() for line in shown.stdout.splitlines() if line.strip()]
    assert [row[0] for row in rows] == ["window", "none", "3", "6"]
    # A picture of 4 x 4 with line ends and three ends behind it.
    assert all(6 <= float(row[1]) < 23 for row in rows[2:])
    # What the processor asks for is too much for the model, which is told before anything is drawn.
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("something is drawn"))
    large = CliRunner().invoke(app, ["bench", str(tmp_path), "--windows", "3"])
    assert large.exit_code == 2
    assert "max_position_embeddings" in large.output
    one_size = tmp_path / "chameleon"
    tiny("chameleon", torch.float32).model.save_pretrained(one_size)
    several = CliRunner().invoke(app, ["bench", str(one_size), "--size", "4"])
    assert several.exit_code == 2
    assert "size" in several.output
    for wrong in ((str(tmp_path / "none"),), ("ar-world", "--size", "4")):
        assert CliRunner().invoke(app, ["bench", *wrong]).exit_code == 2, wrong
