"""Passes behind the prompt have one shape and one graph."""

from __future__ import annotations

import pytest
import sjd
import torch

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["emu3", "janus", "llama", "llamagen"])
def test_all_passes_run_one_graph_and_draw_the_same(name, tiny, monkeypatch):
    compiled, graphs = torch.compile, []

    def count(module, inputs):
        graphs.append(module)
        return module

    def without_code(function, *, mode, dynamic):
        assert mode == "reduce-overhead"
        return compiled(function, backend=count, fullgraph=True, dynamic=dynamic)

    monkeypatch.setattr(torch, "compile", without_code)
    family = tiny(name, torch.float32)
    found = []
    for mode in ("off", "reduce-overhead"):
        with sjd.applied(family.model, sjd.SJDConfig(window=5, compile=mode)):
            tokens = [
                family.generate(generator=torch.Generator().manual_seed(seed), guidance=2.0) for seed in (1, 2)
            ]  # fmt: skip
        found.append(torch.stack(tokens))
    assert found[0].equal(found[1])
    assert len(graphs) == 1
