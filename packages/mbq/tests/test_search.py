"""The search against a second implementation, written straight from section 3 with loops over samples."""

from __future__ import annotations

import copy
import statistics

import mbq
import mbq.functional as F
import pytest
import torch
from mbq.layers import Site
from mbq_models import explicit_batches, language_model, qwen2_vl, qwen2_vl_batches, qwen3_vl

GRID = 4


def rounded(weight, config):
    if config.a_bits == 8:
        return F.fake_quantize_weight(weight, config.w_bits, -1, True)
    return F.fake_quantize_weight(weight, config.w_bits, config.group_size)


def record(module, calls, name):
    """Keep (hidden states, other arguments, output) of every call."""

    def hook(module, args, kwargs, output):
        rest = dict(kwargs)
        hidden = args[0] if args else rest.pop("hidden_states")
        calls.setdefault(name, []).append((hidden, rest, output[0] if isinstance(output, tuple) else output))

    return module.register_forward_hook(hook, with_kwargs=True)


def masks_of(batch):
    vision = batch["vision_mask"] if "vision_mask" in batch else batch["mm_token_type_ids"] != 0
    return batch["labels"] != -100, vision


def lambdas(model, batches):
    """Ratio of mean |gradient| at o_proj and down_proj outputs, one backward a sample, floored by the median."""
    layers = model.model.language_model.layers
    sums = {}
    for batch in batches:
        grads, hooks = {}, []

        def keep(key, into=grads):
            return lambda module, into_module, out: into.__setitem__(key, out[0])

        for i, layer in enumerate(layers):
            for kind, module in (("attn", layer.self_attn.o_proj), ("mlp", layer.mlp.down_proj)):
                hooks.append(module.register_full_backward_hook(keep((i, kind))))
        inputs = {k: v for k, v in batch.items() if k not in ("labels", "vision_mask")}
        logits = model(**inputs).logits
        answer, vision = masks_of(batch)
        loss = torch.nn.functional.cross_entropy(logits[0, :-1][answer[0, 1:]], batch["labels"][0, 1:][answer[0, 1:]])
        model.zero_grad()
        loss.backward()
        for hook in hooks:
            hook.remove()
        for key, grad in grads.items():
            for name, mask in (("vision", vision), ("answer", answer)):
                sums.setdefault((*key, name), []).append(float(grad[0][mask[0]].abs().mean()))
    model.zero_grad(set_to_none=True)
    found = {}
    for kind in ("attn", "mlp"):
        ratios = [
            statistics.fmean(sums[i, kind, "vision"]) / statistics.fmean(sums[i, kind, "answer"])
            for i in range(len(layers))
        ]
        found[kind] = [max(r, statistics.median(ratios)) for r in ratios]
    return found


def parts_of(layer):
    attention, mlp = layer.self_attn, layer.mlp
    return {"attn": attention, "o": attention.o_proj, "mlp": mlp, "down": mlp.down_proj}


def folded(layer, scales):
    """A copy of the layer with the scales folded in, as the table of section 3.5 says."""
    twin = copy.deepcopy(layer)
    attention, mlp = twin.self_attn, twin.mlp
    for name, scale in scales.items():
        norm, rows, linears = {
            "attn": (twin.input_layernorm, None, (attention.q_proj, attention.k_proj, attention.v_proj)),
            "o": (None, attention.v_proj, (attention.o_proj,)),
            "mlp": (twin.post_attention_layernorm, None, (mlp.gate_proj, mlp.up_proj)),
            "down": (None, mlp.up_proj, (mlp.down_proj,)),
        }[name]
        if norm is not None:
            norm.weight.data /= scale
        if rows is not None:
            rows.weight.data /= scale[:, None]
            if rows.bias is not None:
                rows.bias.data /= scale
        for linear in linears:
            linear.weight.data *= scale
    return twin


def quantised(layer, scales, config):
    """That copy, with every linear layer quantised, and its inputs if they are to be."""
    twin = folded(layer, scales)
    for module in twin.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = rounded(module.weight.data, config)
            if config.a_bits == 8:
                module.register_forward_pre_hook(lambda module, args: (F.fake_quantize_activation(args[0]),))
    return twin


def calls_of(layer, inputs):
    """What the inspected modules of the layer are called with and return, and the layer's outputs."""
    calls = {}
    hooks = [record(module, calls, name) for name, module in parts_of(layer).items()]
    outputs = [layer(hidden, **rest) for hidden, rest in inputs]
    for hook in hooks:
        hook.remove()
    return calls, [out[0] if isinstance(out, tuple) else out for out in outputs]


@torch.no_grad()
def by_hand(model, batches, config, weights):
    """(exponent, losses) for each layer and group, in the order of the table in section 3.5."""
    layers = model.model.language_model.layers
    entered = {}
    hooks = [record(layer, entered, index) for index, layer in enumerate(layers)]
    for batch in batches:
        model(**{k: v for k, v in batch.items() if k not in ("labels", "vision_mask")}, use_cache=False)
    for hook in hooks:
        hook.remove()
    found = []
    # With `distort`, what the quantised layers before have made of the first layer's input.
    stream = [hidden for hidden, _, _ in entered[0]]
    for index, layer in enumerate(layers):
        attention, mlp, modules = layer.self_attn, layer.mlp, parts_of(layer)
        calls, _ = calls_of(layer, [(hidden, rest) for hidden, rest, _ in entered[index]])
        distorted = [(hidden, rest) for hidden, (_, rest, _) in zip(stream, entered[index], strict=True)]
        scales = {}
        groups = [("attn", "attn", [attention.q_proj, attention.k_proj, attention.v_proj])]
        if attention.v_proj.weight.shape == attention.o_proj.weight.shape:
            groups.append(("attn", "o", [attention.o_proj]))
        groups += [("mlp", "mlp", [mlp.gate_proj, mlp.up_proj]), ("mlp", "down", [mlp.down_proj])]
        for kind, name, linears in groups:
            seen = calls
            if config.distort:
                seen, _ = calls_of(quantised(layer, scales, config) if scales else layer, distorted)
            # In float64: a scale that differs in its last bit turns some roundings of the activations around.
            mean = torch.cat([hidden[0] for hidden, _, _ in seen[name]]).abs().double().mean(0).float()
            losses = []
            for t in range(GRID):
                scale = F.channel_scale(mean, t / GRID)
                kept = [linear.weight.data for linear in linears]
                sums = {"a": 0.0, "v": 0.0, "all": 0.0}
                counts = {"a": 0, "v": 0, "all": 0}
                for linear in linears:
                    w = rounded(linear.weight * scale, config)
                    linear.weight.data = w if config.a_bits == 8 else w / scale
                for (hidden, rest, _), (_, _, reference), batch in zip(seen[name], calls[name], batches, strict=True):
                    if config.a_bits == 8:
                        hidden = F.fake_quantize_activation(hidden / scale)
                    out = modules[name](hidden, **rest)
                    out = out[0] if isinstance(out, tuple) else out
                    error = (reference - out).double()
                    error = error.abs() if config.loss == "mae" else error**2
                    answer, vision = masks_of(batch)
                    for key, mask in (("a", answer), ("v", vision), ("all", torch.ones_like(answer))):
                        sums[key] += float(error[mask].sum())
                        counts[key] += error[mask].numel()
                for linear, weight in zip(linears, kept, strict=True):
                    linear.weight.data = weight
                if config.method == "awq":
                    losses.append(sums["all"] / counts["all"])
                elif config.loss == "mae":
                    weighted = sums["a"] + weights[kind][index] * sums["v"]
                    losses.append(weighted / (counts["a"] + counts["v"]))
                else:
                    losses.append(sums["a"] / counts["a"] + weights[kind][index] * sums["v"] / counts["v"])
            best = losses.index(min(losses)) / GRID
            scales[name] = F.channel_scale(mean, best)
            found.append((best, losses))
        if config.distort:
            _, stream = calls_of(quantised(layer, scales, config), distorted)
    return found


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize(
    "options",
    [
        {"w_bits": 3, "group_size": 32},
        {"w_bits": 3, "group_size": 32, "loss": "mse"},
        {"w_bits": 3, "group_size": 32, "loss": "mse", "method": "awq"},
        {"w_bits": 3, "group_size": 32, "method": "awq"},
        {"w_bits": 4, "a_bits": 8},
        {"w_bits": 4, "a_bits": 8, "loss": "mse"},
        {"w_bits": 4, "a_bits": 8, "method": "awq"},
        {"w_bits": 3, "group_size": 32, "distort": True},
        {"w_bits": 4, "a_bits": 8, "distort": True},
    ],
    ids=["W3 mae", "W3 mse", "W3 awq", "W3 awq mae", "W4A8 mae", "W4A8 mse", "W4A8 awq", "W3 distort", "W4A8 distort"],
)
def test_scales_losses_and_weights_are_those_of_a_second_implementation(kv_heads, options):
    model = qwen2_vl(num_key_value_heads=kv_heads, num_hidden_layers=2)
    batches = qwen2_vl_batches(2)
    config = mbq.MBQConfig(grid=GRID, scale_dtype="float32", batch_size=1, **options)
    result = mbq.calibrate(model, batches, config)
    weights = lambdas(model, batches)
    expected = by_hand(model, batches, config, weights)
    assert len(result.groups) == len(expected) == (8 if kv_heads == 4 else 6)
    for group, (ratio, losses) in zip(result.groups, expected, strict=True):
        assert group.ratio == ratio, group.linears
        assert group.losses == pytest.approx(losses, rel=1e-6)
    if config.method == "mbq":
        for index, found in enumerate(result.weights):
            assert found == pytest.approx({kind: weights[kind][index] for kind in weights}, rel=1e-6)
    else:
        assert result.weights == [{"attn": None, "mlp": None}] * 2


def test_groups_name_their_layers_and_the_operation_before_them():
    model = qwen2_vl(num_hidden_layers=1)
    groups = mbq.calibrate(model, qwen2_vl_batches(1), mbq.MBQConfig(group_size=32, grid=2)).groups
    prefix = "model.language_model.layers.0."
    found = [(group.prev, *group.linears) for group in groups]
    assert [[name.removeprefix(prefix) for name in names] for names in found] == [
        ["input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.v_proj", "self_attn.o_proj"],
        ["post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj"],
        ["mlp.up_proj", "mlp.down_proj"],
    ]
    assert [group.kind for group in groups] == ["attn", "attn", "mlp", "mlp"]
    assert [len(group.scale) for group in groups] == [64, 64, 64, 128]
    assert all(len(group.losses) == 2 for group in groups)


def test_query_heads_that_read_one_value_share_its_scale():
    site = Site("attn", "v_proj", "rows", ("o_proj",), "o_proj", heads=(2, 2))
    mean = site.average(torch.arange(8.0))
    assert mean.tolist() == [1, 2, 1, 2, 5, 6, 5, 6]
    assert site.shared(mean).tolist() == [1, 2, 5, 6]


def test_equal_losses_take_the_smaller_exponent():
    model = language_model(num_hidden_layers=1)
    for parameter in model.parameters():
        parameter.data.zero_()
    result = mbq.calibrate(model, explicit_batches(model, 1), mbq.MBQConfig(group_size=32, grid=3, method="awq"))
    assert {group.ratio for group in result.groups} == {0.0}


def test_samples_of_equal_length_run_together_wherever_they_stand():
    from mbq.batches import Sample, micro_batches

    def sample(tokens):
        none = torch.zeros(1, tokens, dtype=torch.bool)
        return Sample(torch.zeros(1, tokens, 2), none, none, {})

    assert list(micro_batches([sample(tokens) for tokens in (3, 4, 3, 3)], 2)) == [[0, 2], [3], [1]]


@pytest.mark.parametrize("distort", [False, True])
def test_micro_batches_do_not_change_the_result(distort):
    model = qwen2_vl(num_hidden_layers=2)
    batches = qwen2_vl_batches(3)
    results = [
        mbq.calibrate(model, batches, mbq.MBQConfig(group_size=32, grid=3, distort=distort, batch_size=size))
        for size in (1, 3)
    ]
    for one, three in zip(results[0].groups, results[1].groups, strict=True):
        assert one.ratio == three.ratio
        torch.testing.assert_close(one.scale, three.scale)
        assert one.losses == pytest.approx(three.losses, rel=1e-5)


def test_padding_does_not_change_the_result():
    model = qwen2_vl(num_hidden_layers=2)
    batches = qwen2_vl_batches(2)
    padded = []
    for batch in batches:
        pads = {"input_ids": 5, "attention_mask": 0, "labels": -100, "mm_token_type_ids": 0}
        sides = {key: torch.full((1, 7), value, dtype=batch[key].dtype) for key, value in pads.items()}
        padded.append({**batch, **{key: torch.cat([side, batch[key]], 1) for key, side in sides.items()}})
    config = mbq.MBQConfig(group_size=32, grid=3)
    plain, left = (mbq.calibrate(model, some, config) for some in (batches, padded))
    for one, two in zip(plain.groups, left.groups, strict=True):
        assert one.ratio == two.ratio
        torch.testing.assert_close(one.scale, two.scale, rtol=1e-5, atol=1e-5)
    for one, two in zip(plain.weights, left.weights, strict=True):
        assert one == pytest.approx(two, rel=1e-4)


def test_rows_of_a_padded_batch_count_as_samples_of_their_own():
    model = language_model(num_hidden_layers=2)
    torch.manual_seed(1)
    long, short, other = (torch.randint(3, 60, (1, length)) for length in (9, 6, 6))
    both = torch.cat([long, torch.nn.functional.pad(short, (3, 0), value=1)])
    mask = torch.ones_like(both)
    mask[1, :3] = 0
    config = mbq.MBQConfig(group_size=32, grid=3, method="awq")
    # A sample that was never padded has no mask, one that was has one.
    together = mbq.calibrate(model, [{"input_ids": both, "attention_mask": mask, "labels": both}, other], config)
    apart = mbq.calibrate(model, [long, short, other], config)
    for one, two in zip(together.groups, apart.groups, strict=True):
        torch.testing.assert_close(one.scale, two.scale, rtol=1e-4, atol=1e-5)
        assert one.losses == pytest.approx(two.losses, rel=1e-3)


def test_what_a_decoder_adds_between_layers_reaches_the_next_layer():
    from mbq.batches import capture
    from pared_hooks import DecoderView

    model, batch = qwen3_vl(), qwen2_vl_batches(1)[0]
    sample = capture(DecoderView.of(model), batch)[0]
    assert set(sample.additions) == {1, 2}
    assert not sample.additions[1][~sample.vision].any()
    seen = []
    hook = model.model.language_model.layers[1].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        model(**{k: v for k, v in batch.items() if k != "labels"})
        hook.remove()
        first = model.model.language_model.layers[0]
        out = first(sample.hidden, **sample.arguments["full_attention"])
    torch.testing.assert_close(out + sample.additions[1], seen[0])


def test_a_distorted_stream_carries_the_error_of_the_layers_before():
    model = language_model(num_hidden_layers=3)
    batches = explicit_batches(model, 2)
    plain, distorted = (
        mbq.calibrate(model, batches, mbq.MBQConfig(w_bits=2, group_size=32, grid=2, distort=flag))
        for flag in (False, True)
    )
    first = [group.losses for group in plain.groups if group.layer == 0 and group.site == 0]
    assert [group.losses for group in distorted.groups if group.layer == 0 and group.site == 0] == first
    later = [
        distorted.groups[i].losses[0] > plain.groups[i].losses[0] for i, g in enumerate(plain.groups) if g.layer == 2
    ]
    assert all(later)


def test_gptq_leaves_less_error_than_rounding_on_its_own_data():
    model = language_model(num_hidden_layers=1)
    batches = explicit_batches(model, 3, vision=12, text=60)
    reference = [model(inputs_embeds=batch["inputs_embeds"]).logits for batch in batches]
    errors = {}
    for method in ("rtn", "gptq"):
        with mbq.apply(model, mbq.MBQConfig(group_size=32, method=method), batches, mode="fake"):
            out = [model(inputs_embeds=batch["inputs_embeds"]).logits for batch in batches]
        errors[method] = sum(float((a - b).square().sum()) for a, b in zip(out, reference, strict=True))
    assert errors["gptq"] < 0.8 * errors["rtn"]


def test_clipping_never_raises_the_squared_error_of_a_layer(generator):
    from mbq.fold import quantize
    from mbq.search import best_clip

    config = mbq.MBQConfig(w_bits=2, group_size=32)
    weight, x = torch.randn(6, 64, generator=generator) ** 3, torch.randn(50, 64, generator=generator)
    grouped = x.view(50, 2, 32).transpose(0, 1)
    clip = best_clip(weight, grouped.transpose(1, 2) @ grouped, config)
    assert clip.lt(1).any()
    assert clip.ge(0.5).all()

    def group_errors(share):
        error = (weight - F.dequantize_weight(quantize(weight, config, share))).view(6, 2, 32)
        return torch.einsum("ngi,tgi->ngt", error, x.view(50, 2, 32)).square().sum(-1)

    assert (group_errors(clip) <= group_errors(None) * 1.0001).all()


def test_errors_can_be_weighed_by_the_gradient_of_each_token():
    model = language_model(num_hidden_layers=1)
    (batch,) = explicit_batches(model, 1)
    projection, seen = model.model.layers[0].self_attn.o_proj, {}

    def keep(module, args, output):
        seen["x"] = args[0].detach()
        output.register_hook(lambda grad: seen.__setitem__("grad", grad))

    hook = projection.register_forward_hook(keep)
    logits = model(inputs_embeds=batch["inputs_embeds"]).logits
    hook.remove()
    answer = batch["labels"][0, 1:] != -100
    torch.nn.functional.cross_entropy(logits[0, :-1][answer], batch["labels"][0, 1:][answer]).backward()
    model.zero_grad(set_to_none=True)
    config = mbq.MBQConfig(group_size=32, grid=1, method="token", scale_dtype="float32")
    group = mbq.calibrate(model, [batch], config).groups[1]
    with torch.no_grad():
        error = (seen["x"] @ (projection.weight - rounded(projection.weight, config)).T).abs()
    expected = (error * seen["grad"].abs().mean(-1, keepdim=True)).mean()
    assert group.losses == pytest.approx([float(expected)], rel=1e-5)


def test_smoothquant_balances_the_largest_inputs_and_weights_of_each_channel():
    model = language_model(num_hidden_layers=1)
    batches, seen = explicit_batches(model, 2), []
    attention = model.model.layers[0].self_attn
    hook = attention.q_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    for batch in batches:
        model(inputs_embeds=batch["inputs_embeds"])
    hook.remove()
    result = mbq.calibrate(model, batches, mbq.MBQConfig(w_bits=4, a_bits=8, method="smoothquant"))
    linears = (attention.q_proj, attention.k_proj, attention.v_proj)
    weight = torch.cat([linear.weight.detach() for linear in linears]).abs().amax(0)
    largest = torch.cat(seen).abs().amax((0, 1))
    torch.testing.assert_close(result.groups[0].scale, (largest / weight).sqrt())
    # It smooths what norms hand on, and nothing else.
    assert result.groups[1].scale.equal(torch.ones(64))


def test_without_vision_tokens_it_is_awq_with_an_absolute_error():
    model = language_model(num_hidden_layers=2)
    batches = [torch.randint(3, 60, (1, 10)) for _ in range(2)]
    with pytest.warns(UserWarning, match="vision"):
        ours = mbq.calibrate(model, batches, mbq.MBQConfig(group_size=32, grid=4))
    theirs = mbq.calibrate(model, batches, mbq.MBQConfig(group_size=32, grid=4, method="awq"))
    assert all(a.scale.equal(b.scale) and a.losses == b.losses for a, b in zip(ours.groups, theirs.groups, strict=True))


def test_a_given_weight_of_vision_takes_the_place_of_the_measured_one():
    # In the last layer no answer reads what is at a vision token any more: the first of two is looked at.
    model = language_model(num_hidden_layers=2)
    batches, options = explicit_batches(model, 2), {"group_size": 32, "grid": 3}
    alone = mbq.calibrate(model, batches, mbq.MBQConfig(**options, vision_weight=0.0))
    assert alone.weights == [{"attn": 0.0, "mlp": 0.0}] * 2
    assert alone.sensitivity == {}
    measured = mbq.calibrate(model, batches, mbq.MBQConfig(**options, ratio_floor=None))
    found = measured.weights[0]
    again = mbq.calibrate(model, batches, mbq.MBQConfig(**options, vision_weight=found["attn"]))
    assert again.groups[0].losses == measured.groups[0].losses != alone.groups[0].losses
