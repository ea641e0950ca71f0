"""Fixtures of the tests of ditfastattn2: fresh generators, tiny models of the real classes, plans for them."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Kernels run in the interpreter; that is decided when they are first imported.
    os.environ["TRITON_INTERPRET"] = "1"

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A seed that differs from test to test and is the same in every run."""
    return sum(map(ord, request.node.name))


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def plan_of(seed):
    """Builds a plan for a tiny model: `plan_of(tiny, "ab-", steps=4)` draws letters, one letter alone repeats it."""
    from ditfastattn2 import DiTFastAttnV2Config, LayerPlan, Plan
    from ditfastattn2.adapters.base import sites_of
    from ditfastattn2.plan import digest_of
    from pared_hooks import DenoiserView

    def build(tiny, letters="-abcd", *, steps=4, branches=("cond",), first="-", **options):
        options.setdefault("block", (16, 16))
        options.setdefault("methods", ("cached", "arrow:1/4", "arrow:1/8"))
        letters = letters if len(letters) == 1 else letters[: 1 + len(options["methods"])]
        view = DenoiserView.of(tiny.model)
        layers = [LayerPlan(site.name, site.module.heads, site.text) for site in sites_of(view)]
        draw = random.Random(seed)

        def row(step):
            of = first if step == 0 else letters
            return " ".join("".join(draw.choice(of) for _ in range(layer.heads)) for layer in layers)

        return Plan(
            model=type(tiny.model).__name__,
            model_digest=digest_of(tiny.model),
            layers=tuple(layers),
            num_vision=tiny.vision,
            num_text=tiny.num_text,
            num_steps=steps,
            config=DiTFastAttnV2Config(**options),
            choices={branch: tuple(row(step) for step in range(steps)) for branch in branches},
        )

    return build
