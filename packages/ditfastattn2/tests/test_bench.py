"""The demo and the bench, on a pipeline with random weights where the trained one would take too long."""

from __future__ import annotations

import random
from contextlib import nullcontext

import pytest
import torch
from dfa_models import MODELS
from dfa_pipelines import pipeline
from ditfastattn2 import bench, demo
from ditfastattn2.bench import claims, controls, cpu, patterns, quality, speed, synthetic, transfer, widest, world
from ditfastattn2.bench.world import World
from pared_bench import BenchContext, DemoContext, Record


@pytest.fixture
def small(monkeypatch):
    """The world around a pipeline with random weights: two prompts, three steps."""
    pipe = pipeline()
    call = type(pipe).__call__

    def fixed(self, *args, max_sequence_length=None, **options):
        return call(self, *args, height=64, width=64, **options)

    monkeypatch.setattr(type(pipe), "__call__", fixed)
    monkeypatch.setattr(World, "load", classmethod(lambda cls, device, seed: cls(pipe, seed)))
    monkeypatch.setattr(world, "BLOCK", (16, 16))
    for module in (world, demo, quality, transfer):
        monkeypatch.setattr(module, "CALIBRATION_PROMPTS", 2)
    for module in (world, quality, patterns, claims):
        monkeypatch.setattr(module, "STEPS", 3)
    monkeypatch.setattr(World.sample, "__kwdefaults__", None, raising=False)
    monkeypatch.setattr(World.sample, "__defaults__", (3,))
    monkeypatch.setattr(World.calibrate, "__kwdefaults__", World.calibrate.__kwdefaults__ | {"steps": 3})
    monkeypatch.setattr(world, "REFERENCE_PICTURES", 20)
    original = World._latents
    monkeypatch.setattr(World, "_latents", lambda self, count: original(self, count)[:, :, :16, :16])
    return World(pipe, 0)


def test_the_demo_compares_three_ways_and_shows_pictures_plan_and_heads(small, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "PROMPTS", 2)
    monkeypatch.setattr(demo, "SHOWN", 2)
    result = demo.run(DemoContext(out=tmp_path), delta=3.0, prompt="a red circle")
    (table,) = result.tables
    assert [row[0] for row in table.rows][:2] == ["full", "by plan"]
    flops = [float(row[table.columns.index("attention FLOPs per image")].split()[0]) for row in table.rows]
    kept = 1 - result.metrics["by_plan.attention_removed"]
    assert flops[1] == pytest.approx(flops[0] * kept, rel=0.02)
    assert len(result.figures) == 3
    assert "a red circle" in result.figures[0].caption
    assert 0 < result.metrics["by_plan.attention_removed"] < 1


def test_wrong_options_of_the_bench_are_named(tmp_path):
    for options, named in (({"experiments": "quality,sped"}, "sped"), ({"prompts": 1}, "prompts=1")):
        with pytest.raises(ValueError, match=named):
            bench.run(BenchContext(out=tmp_path), **options)


def test_every_arm_of_the_quality_bench_gives_its_scores_and_what_it_removed(small, monkeypatch):
    for module in (quality, claims):
        monkeypatch.setattr(module, "DELTAS", (0.2, 0.6, 3.0))
    records = quality.run(BenchContext(), small, 2)
    metrics = {}
    for record in records:
        metrics.setdefault(record.variant, {})[record.metric] = record.value
    names = [
        "base",
        "delta 0.6",
        "delta 3",
        "whole layers",
        "one window",
        "one window, no text stripes",
        "all reused",
        "PAB",
        "same methods",
        "2 steps",
    ]
    for name in names:
        first, *rest = name.split(", ")
        found = [one for one in metrics if one.startswith(first) and all(part in one for part in rest)]
        assert found, f"{name} is not among {list(metrics)}"
        assert {"psnr", "frechet", "accuracy", "attention_removed", "seconds"} <= set(metrics[found[0]])
    assert metrics["base"]["psnr"] == 100
    for variant in ("base", "delta 3"):
        kept = 1 - metrics[variant]["attention_removed"]
        assert metrics[variant]["attention_flops"] == pytest.approx(metrics["base"]["attention_flops"] * kept)
    deltas = {name: abs(metrics[name]["attention_removed"] - 0.5) for name in ("delta 0.2", "delta 0.6", "delta 3")}
    assert f"{min(deltas, key=deltas.get)}, arrows alone" in metrics, "others are compared where half is removed"
    told = {record.variant for record in claims.claims(records)}
    assert {claim for _, _, claim in claims.AT_EQUAL_COST} < told
    assert len(told) == len(claims.AT_EQUAL_COST) + 6
    assert not any(hasattr(module, "_pared") for module in small.pipe.transformer.modules())


def test_the_widest_arrow_is_swept_beside_reuse_of_everything(small, monkeypatch):
    monkeypatch.setattr(widest, "DELTAS", (0.2, 0.6, 3.0))
    monkeypatch.setattr(widest, "INTERVALS", (2, 3))
    monkeypatch.setattr(widest, "MOST_PROMPTS", 2)
    records = widest.run(BenchContext(), small, 3)
    removed = {one.variant: one.value for one in records if one.metric == "attention_removed"}
    assert [name.startswith("1/8 and reuse") for name in removed] == [False] + [True] * 3 + [False] * 2
    assert removed[widest.reuse_of(2)] == pytest.approx(1 / 3), "one of three steps"
    assert {one.settings["experiment"] for one in records} == {widest.EXPERIMENT}
    assert {one.samples for one in records} == {2}


def test_a_plan_of_whole_layers_gives_all_heads_of_a_layer_one_method(small):
    plan = small.calibrate(small.config(2.0, min_cache_steps=1), kind=controls.LayerWise)
    parts = [part for row in plan.choices["cond"] for part in row.split(" ")]
    assert all(len(set(part)) == 1 for part in parts)
    assert any(part[0] != "-" for part in parts)


def test_random_heads_have_the_same_methods_at_each_step(small):
    plan = small.calibrate(small.config(20.0, min_cache_steps=1))
    shuffled = controls.shuffled(plan, 3)
    assert shuffled != plan
    for before, after in zip(plan.choices["cond"], shuffled.choices["cond"], strict=True):
        assert sorted(before) == sorted(after)


@torch.no_grad()
def test_bands_without_stripes_are_bands_over_all_tokens(plan_of):
    from ditfastattn2 import functional as f
    from torch.nn.functional import scaled_dot_product_attention

    tiny = MODELS["sd3"]()
    plan = controls.uniform(plan_of(tiny), (1, 4))

    class Banded(torch.overrides.TorchFunctionMode):
        calls = 0

        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is not scaled_dot_product_attention:
                return function(*args, **(kwargs or {}))
            self.calls += 1
            q, k, v = args[:3]
            if self.calls <= len(plan.layers):
                return function(q, k, v)
            blocks = f.arrow_block_map(q.shape[2], 0, q.shape[2] // 4 // 2, False, plan.config.block)
            place = torch.arange(q.shape[2])
            mask = blocks[(place // plan.config.block[0])[:, None], (place // plan.config.block[1])[None, :]]
            return function(q, k, v, attn_mask=mask)

    with Banded():
        expected = tiny.denoise()
    with controls.pure_window(tiny.model, plan):
        torch.testing.assert_close(tiny.denoise(), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_attention_is_counted_by_its_pairs_and_broadcasting_removes_some_of_it(small):
    flops = []
    for interval in (None, 2):
        way = nullcontext() if interval is None else controls.broadcast(small.pipe, interval)
        with controls.AttentionCounter() as counter, way:
            small.pipe("a red circle", num_inference_steps=20, output_type="latent")
        flops.append(counter.flops)
    # Two layers with the text of two encoders and one without, four heads of 16 channels, both guidance branches.
    denoiser = 20 * 4 * 2 * 4 * 16 * (2 * (64 + 8 + 256) ** 2 + 64**2)
    assert denoiser < flops[0] < 1.05 * denoiser
    assert 0.35 < 1 - flops[1] / flops[0] < 0.5


def test_uniform_plans_keep_nearly_what_they_are_asked_to(plan_of):
    plan = plan_of(MODELS["flux"](), steps=20, block=(16, 16))
    for kept in (0.3, 0.6):
        interval = controls.interval_of_density(plan, kept)
        assert controls.every_nth(plan, interval).kept() == pytest.approx(kept, abs=0.1)
    plan = plan.retarget(V=4096)
    window = controls.window_of_density(plan, 0.5)
    assert controls.uniform(plan, window).kept() == pytest.approx(0.5, abs=0.02)


@torch.no_grad()
def test_heads_are_looked_at_as_they_are(small):
    looked = patterns.observe(small, 2)
    heads = sum(site.heads for name, site in small.pipe.transformer.named_modules() if name.endswith(("attn", "attn2")))
    assert len(looked) == heads
    for one in looked:
        assert len(one.band) == 4, "two prompts, two branches"
        assert all(0 < share <= 1 for share in one.band)
        assert one.map.shape == (32, 32)
        assert -1 <= one.similarity <= 1
    with_text = [one for one in looked if one.layer.endswith("attn")]
    assert all(0 < one.to_text < 1 and 0 < one.text_spread <= 1 for one in with_text)


@pytest.mark.parametrize("removed", [0.25, 0.43, 0.56, 0.68])
def test_synthetic_plans_remove_what_they_are_asked_to(removed):
    tiny = MODELS["flux"]()
    plan = synthetic.plan_for(tiny.model, num_vision=16384, num_text=512, steps=200, removed=removed)
    assert 1 - plan.kept() == pytest.approx(removed, abs=0.05)


def test_synthetic_layers_remove_what_they_are_asked_to():
    from ditfastattn2.functional import plan_density

    for removed in (0.0, 0.43, 0.9):
        windows = synthetic.windows_for(38, num_vision=16384, num_text=333, text_first=False, removed=removed)
        assert 1 - plan_density(windows, 16384, 333, False, (128, 64)) == pytest.approx(removed, abs=0.04)


def test_the_cpu_bench_times_both_ways(monkeypatch):
    monkeypatch.setattr(cpu, "VISION", 512)
    monkeypatch.setattr(cpu, "REMOVED", (0.5,))
    records = cpu.run(BenchContext(), rounds=2)
    assert {record.variant for record in records} == {"torch", "visited keys"}


def test_the_speed_bench_times_steps_by_synthetic_plans():
    tiny = MODELS["sd3"]()
    call = tiny.arguments(tiny.sample, torch.ones(2), tiny.text)
    setting = speed.Setting("tiny", lambda device: (tiny.model, call), 64, 6, (0.5, "cached"))
    records = speed.steps(setting, torch.device("cpu"), rounds=1)
    variants = {record.variant for record in records}
    assert variants == {"base", "50% removed", "all cached"}
    removed = {record.variant: record.value for record in records if record.metric == "attention_removed"}
    assert removed["all cached"] == pytest.approx(0.9)


def test_the_break_even_density_lies_where_both_take_as_long():
    assert speed._break_even([(1.0, 1.5), (0.5, 0.75), (0.2, 0.3)]) == pytest.approx(2 / 3)
    assert speed._break_even([(1.0, 0.9), (0.5, 0.5)]) == 1.0
    assert speed._break_even([(1.0, 2.0), (0.1, 1.1)]) is None


def test_claims_are_margins_of_what_was_measured():
    def record(variant, metric, value, experiment="quality"):
        return Record("ditfastattn2", variant, metric, value, "", {"experiment": experiment})

    draw = random.Random(0)
    records = []
    for delta, psnr in zip(quality.DELTAS, (40, 38, 35, 30, 27, 25), strict=True):
        records += [
            record(f"delta {delta:g}", "psnr", psnr),
            record(f"delta {delta:g}", "attention_removed", delta / 4),
        ]
    records += [
        record("delta 0.6, arrows alone", "psnr", 32.5),
        record("delta 0.6, arrows alone", "attention_removed", 0.05),
        record("whole layers", "psnr", 28.5),
        record("whole layers", "attention_removed", 0.15),
        record("one window 3/64 for all", "psnr", 26),
        record("one window 3/64 for all", "attention_removed", 0.2),
        record("one window 3/64 for all", "accuracy", 0.9),
        record("one window 3/64, no text stripes", "psnr", 22),
        record("one window 3/64, no text stripes", "accuracy", 0.85),
        record("11 steps of 20", "psnr", 29),
        record("plan of these prompts", "psnr", 30, "transfer"),
        record("plan of other prompts", "psnr", 29.8, "transfer"),
        record("all heads", "local_share", 0.3, "patterns"),
        record("all heads", "band_mass_deviation", 0.02, "patterns"),
        record("all heads", "band_mass_deviation_of_heads", 0.22, "patterns"),
        record("blocks.0 head 1", "band_mass_deviation", 0.5, "patterns"),
    ]
    draw.shuffle(records)
    margins = {one.variant: one.value for one in claims.claims(records)}
    assert margins["heads are 1 dB closer than whole layers"] == pytest.approx(0.5)
    # Where plans remove 0.2, half way between delta 0.6 and 1, they are at 28.5 dB.
    assert margins["heads are closer than one window for all"] == pytest.approx(2.5)
    assert margins["heads are closer than fewer steps"] == pytest.approx(1)
    assert margins["windows without text stripes lose 3 dB"] == pytest.approx(1)
    assert margins["windows without text stripes lose 10 points of accuracy"] == pytest.approx(-0.05)
    # At 32.5 dB, half way between delta 0.2 and 0.6, the plans remove 0.1.
    assert margins["reuse removes 1.3 times more at the distance of arrows alone"] == pytest.approx(0.7)
    assert margins["distance grows with delta (rank correlation)"] == pytest.approx(0.05)
    assert margins["a plan of other prompts is within 0.5 dB"] == pytest.approx(0.3)
    assert margins["a quarter of the heads look near"] == pytest.approx(0.05)
    assert margins["how near a head looks differs more between heads than between prompts"] == pytest.approx(0.2)
