"""Statistics, factors in closed form, rank allocation, and the files factors live in."""

from __future__ import annotations

import json

import pytest
import torch
from cskv import CSKVConfig, Factors, Statistics, allocate_ranks, calibrate, fit, load, load_official, save
from cskv import functional as F
from cskv.adapters import adapters_of
from cskv.capture import reading, run_batch
from cskv.factors import check_factors, fingerprint
from cskv.plan import plan_layers
from pared_hooks import ConfigError

CONFIG = CSKVConfig(k_rank=6, v_rank=12)


@pytest.fixture
def inputs_of():
    """Inputs of the attention of every layer of a model, (tokens, d) by layer."""

    def collect(model, *batches):
        view, adapters = adapters_of(model)
        found: dict[int, list[torch.Tensor]] = {}
        with reading(adapters, lambda adapter, x, cos, sin: found.setdefault(adapter.index, []).append(x)):
            for batch in batches:
                run_batch(view, batch)
        return {index: torch.cat([x.flatten(0, 1) for x in parts]) for index, parts in found.items()}

    return collect


# Statistics


def test_statistics_are_those_of_the_attention_inputs_in_float64(language_model, tokens, inputs_of):
    model, batches = language_model(), [tokens(2, 30), tokens(1, 20)]
    stats = calibrate(model, batches)
    assert stats.tokens == 80
    assert stats.batches == 2
    for index, x in inputs_of(model, *batches).items():
        assert stats.second_moments[index].dtype == torch.float64
        assert torch.allclose(stats.second_moment(index), x.double().T @ x.double() / 80)
        sequences = [x[:30], x[30:60], x[60:]]
        assert torch.allclose(stats.abs_means[index], sum(one.double().abs().mean(0) for one in sequences))


def test_padding_does_not_count(language_model, tokens):
    model, ids = language_model(), tokens(1, 12)
    padded = torch.cat((torch.zeros(1, 5, dtype=torch.int64), ids), 1)
    mask = (torch.arange(17) >= 5).long()[None]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    plain = calibrate(model, [ids])
    stats = calibrate(model, [{"input_ids": padded, "attention_mask": mask, "position_ids": positions}])
    assert stats.tokens == 12
    for index, moment in plain.second_moments.items():
        assert torch.allclose(stats.second_moments[index], moment, rtol=1e-4, atol=1e-3)


def test_calibration_leaves_the_model_as_it_was(language_model, tokens):
    model, ids = language_model(), tokens(1, 9)
    before = model(ids).logits
    calibrate(model, [tokens(1, 20)])
    assert torch.equal(model(ids).logits, before)
    assert all(not module._forward_pre_hooks and "_pared" not in vars(module) for module in model.modules())


def test_an_interrupted_calibration_continues_and_gives_the_same_sums(language_model, tokens, tmp_path):
    model, batches, path = language_model(), [tokens(1, 10) for _ in range(5)], tmp_path / "stats.safetensors"

    def interrupted():
        yield from batches[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, interrupted(), checkpoint=path, checkpoint_every=2)
    assert Statistics.load(path).batches == 2
    ran = []
    stats = calibrate(model, batches, checkpoint=path, track=lambda given: (ran.append(one) or one for one in given))
    whole = calibrate(model, batches)
    assert stats.tokens == whole.tokens == 50
    assert all(torch.allclose(stats.second_moments[i], whole.second_moments[i]) for i in whole.second_moments)


@pytest.mark.parametrize("batches", [[], [torch.zeros(3, dtype=torch.int64)], [torch.zeros(1, 3)], [{"ids": 1}]])
def test_batches_without_tokens_are_refused(language_model, batches):
    with pytest.raises(ConfigError, match=r"batches|token"):
        calibrate(language_model(), batches)


def test_a_file_of_something_else_is_no_statistics(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ConfigError, match="statistics"):
        Statistics.load(tmp_path / "x.safetensors")


# Factors


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "qwen3"])
def test_whitened_factors_lose_least_on_the_calibration_text(language_model, tokens, inputs_of, family):
    model, batches = language_model(family), [tokens(4, 60)]
    stats = calibrate(model, batches)
    losses = {}
    for init in ("whiten", "asvd", "svd"):
        factors = fit(model, CONFIG.replace(init=init), stats)
        losses[init] = []
        for plan in plan_layers(model, CONFIG)[1]:
            x, layer = inputs_of(model, *batches)[plan.index], factors[plan.index]
            for side, (weight, _) in zip("kv", plan.adapter.maps(), strict=True):
                a, b = layer.side(side)
                assert a.shape == (plan.rank(side), 64)
                losses[init].append(float((x @ (weight - b @ a).T).square().mean()))
    for one, other, third in zip(losses["whiten"], losses["asvd"], losses["svd"], strict=True):
        assert one <= min(other, third) * (1 + 1e-4)


def test_the_fused_projection_is_cut_into_the_rows_of_keys_and_values(language_model, tokens, inputs_of):
    model, ids = language_model("phi3"), tokens(1, 7)
    adapter = adapters_of(model)[1][0]
    x = inputs_of(model, ids)[0]
    fused = adapter.module.qkv_proj(x)
    for begin, (weight, bias) in zip((64, 96), adapter.maps(), strict=True):
        assert bias is None
        assert torch.equal(weight, adapter.module.qkv_proj.weight[begin : begin + 32])
        assert torch.allclose(x @ weight.T, fused[:, begin : begin + 32], atol=1e-5)


def test_a_projection_of_another_class_is_read_by_what_it_computes(language_model, randn):
    class Scaled(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return 2 * self.inner(x)

    model = language_model("qwen2")
    plain = adapters_of(model)[1][0].maps()[0]
    model.model.layers[0].self_attn.k_proj = Scaled(model.model.layers[0].self_attn.k_proj)
    weight, bias = adapters_of(model)[1][0].maps()[0]
    assert torch.allclose(weight, 2 * plain[0], atol=1e-5)
    assert torch.allclose(bias, 2 * plain[1], atol=1e-6)


def test_full_density_needs_neither_factors_nor_statistics(language_model):
    factors = fit(language_model(), CSKVConfig(k_density=1, v_density=1))
    assert all(factors[index].a_k is None and factors[index].b_v is None for index in factors)


@pytest.mark.parametrize("init", ["whiten", "asvd"])
def test_fitting_without_statistics_names_calibrate(language_model, init):
    with pytest.raises(ConfigError, match="calibrate"):
        fit(language_model(), CONFIG.replace(init=init))


def test_statistics_that_cannot_serve_are_refused(language_model, tokens):
    model = language_model()
    stats = calibrate(model, [tokens(1, 40)])
    few = Statistics(stats.second_moments, stats.abs_means, tokens=5, batches=1)
    with pytest.raises(ConfigError, match=r"5 tokens.*rank 12"):
        fit(model, CONFIG, few)
    broken = Statistics({**stats.second_moments, 1: stats.second_moments[1] * torch.nan}, stats.abs_means, 40, 1)
    with pytest.raises(ConfigError, match="layer 1"):
        fit(model, CONFIG, broken)
    with pytest.raises(ConfigError, match="layer 1"):
        fit(model, CONFIG, Statistics({0: stats.second_moments[0]}, {0: stats.abs_means[0]}, 40, 1))
    other = calibrate(language_model(hidden_size=32), [tokens(1, 40)])
    with pytest.raises(ConfigError, match="32 channels"):
        fit(model, CONFIG, other)


# Ranks


def test_allocated_ranks_meet_the_budget_and_lose_less_than_equal_ones(language_model, tokens):
    model = language_model()
    with torch.no_grad():
        # Keys of one layer live in four directions only; the budget belongs elsewhere.
        weight = model.model.layers[0].self_attn.k_proj.weight
        weight.copy_(weight[:, :4] @ weight[:4])
    stats = calibrate(model, [tokens(4, 80)])
    ranks = allocate_ranks(model, stats, 0.25)
    assert sum(ranks.k_rank + ranks.v_rank) == 4 * 8
    assert all(rank % 2 == 0 and 2 <= rank <= 32 for rank in ranks.k_rank + ranks.v_rank)

    def error(k_rank, v_rank):
        total = 0.0
        for plan in plan_layers(model, CSKVConfig(k_rank=k_rank, v_rank=v_rank))[1]:
            root = F.moment_roots(stats.second_moment(plan.index))[0]
            for side, (weight, _) in zip("kv", plan.adapter.maps(), strict=True):
                energy = torch.linalg.svdvals(weight.double() @ root).square()
                total += float(energy[plan.rank(side) :].sum() / energy.sum())
        return total

    assert ranks.k_rank[0] == 4
    best = error(ranks.k_rank, ranks.v_rank)
    assert best < error(8, 8)
    # No exchange of one step between two sides is better.
    for one in range(4):
        for other in range(4):
            flat = list(ranks.k_rank + ranks.v_rank)
            flat[one], flat[other] = flat[one] + 2, flat[other] - 2
            if one != other and flat[other] >= 2 and flat[one] < 32:
                assert best <= error(tuple(flat[:2]), tuple(flat[2:])) + 1e-9


def test_ranks_of_another_number_of_layers_are_refused(language_model):
    with pytest.raises(ConfigError, match="k_rank"):
        plan_layers(language_model(), CSKVConfig(k_rank=(4, 4, 4)))


# Files


def test_factors_and_configuration_survive_a_round_trip(language_model, tokens, tmp_path):
    model = language_model()
    config = CSKVConfig(k_rank=(6, 4), v_density=1.0)
    factors = fit(model, config, calibrate(model, [tokens(1, 40)]))
    save(tmp_path / "factors", config, factors)
    assert sorted(path.name for path in (tmp_path / "factors").iterdir()) == ["cskv.json", "factors.safetensors"]
    config2, factors2 = load(tmp_path / "factors")
    assert config2 == config
    checked = check_factors(factors2, plan_layers(model, config2)[1])
    for index in factors:
        assert torch.equal(checked[index].a_k, factors[index].a_k)
        assert torch.equal(checked[index].b_k, factors[index].b_k)
        assert checked[index].a_v is None


def test_factors_of_another_model_are_refused_and_casts_are_not(language_model, tokens):
    model = language_model()
    plans = plan_layers(model, CONFIG)[1]
    factors = fit(model, CONFIG, calibrate(model, [tokens(1, 40)]))
    for dtype in (torch.bfloat16, torch.float16):
        check_factors(factors, plan_layers(language_model().to(dtype), CONFIG)[1])
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[3, 5] += 1
    with pytest.raises(ConfigError, match=r"fingerprint of layer 1"):
        check_factors(factors, plans)
    assert fingerprint(torch.ones(4, 6)) == fingerprint(torch.ones(4, 6).bfloat16())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda layers: layers[:1], "1 layers"),
        (lambda layers: [layers[0], layers[1][:3]], "layer 1"),
        (lambda layers: [layers[0], (layers[1][0][:4], *layers[1][1:])], r"A_K of layer 1 is \(4, 64\); \(6, 64\)"),
        (lambda layers: [(*layers[0][:3], layers[0][3].T), layers[1]], r"B_V of layer 0.*\(32, 12\)"),
        (lambda layers: [(layers[0][0] * torch.nan, *layers[0][1:]), layers[1]], "A_K of layer 0"),
    ],
)
def test_factors_that_do_not_fit_are_refused_with_layer_and_shape(language_model, randn, change, match):
    layers = [(randn(6, 64), randn(32, 6), randn(12, 64), randn(32, 12)) for _ in range(2)]
    plans = plan_layers(language_model(), CONFIG)[1]
    check_factors(layers, plans)
    with pytest.raises(ConfigError, match=match):
        check_factors(change(layers), plans)


@pytest.mark.parametrize("text", ["{}", "[1]", "nonsense", '{"schema": "cskv.factors/9"}'])
def test_a_file_of_something_else_is_refused(tmp_path, text):
    (tmp_path / "cskv.json").write_text(text)
    with pytest.raises(ConfigError, match=r"cskv\.json"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nowhere")


def test_a_failed_save_leaves_the_older_files_whole(language_model, tmp_path, monkeypatch):
    model = language_model()
    config = CSKVConfig(k_rank=6, v_rank=12, init="svd")
    save(tmp_path, config, fit(model, config))
    before = (tmp_path / "factors.safetensors").read_bytes()
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError("no room")))
    with pytest.raises(OSError, match="no room"):
        save(tmp_path, config, fit(model, config.replace(k_rank=4)))
    assert (tmp_path / "factors.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cskv.json", "factors.safetensors"]
    json.loads((tmp_path / "cskv.json").read_text())


def test_checkpoints_of_the_published_code_are_read(randn, tmp_path, language_model):
    sides = {"k": 6, "v": 12}
    tensors = {side: [(randn(rank, 64), randn(32, rank)) for _ in range(2)] for side, rank in sides.items()}
    for side, layers in tensors.items():
        torch.save([({"weight": a}, {"weight": b}) for a, b in layers], tmp_path / f"{side}.pt")
    factors = load_official(tmp_path / "k.pt", tmp_path / "v.pt")
    assert isinstance(factors, Factors)
    checked = check_factors(factors, plan_layers(language_model(), CONFIG)[1])
    for index in range(2):
        assert torch.equal(checked[index].a_k, tensors["k"][index][0])
        assert torch.equal(checked[index].b_v, tensors["v"][index][1])


def test_a_checkpoint_of_another_form_is_refused(tmp_path, randn):
    torch.save({"weight": randn(2, 2)}, tmp_path / "k.pt")
    with pytest.raises(ConfigError, match=r"k\.pt"):
        load_official(tmp_path / "k.pt", tmp_path / "k.pt")
