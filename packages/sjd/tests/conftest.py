"""Fixtures of the tests of sjd: a generator, and one tiny model of each family for all tests of a session."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> torch.Generator:
    """A generator whose seed differs from test to test and is the same in every run."""
    return torch.Generator().manual_seed(sum(map(ord, request.node.name)))


@pytest.fixture(scope="session")
def tiny():
    """`tiny("emu3")`: the family with its float64 model, made once; a test leaves the model as it found it."""
    import sjd_models

    made = {}

    def get(name, dtype=torch.float64):
        if (name, dtype) not in made:
            if name.startswith("llamagen"):
                pytest.importorskip("pared_zoo.llamagen")
            made[name, dtype] = sjd_models.family(name, dtype)
        return made[name, dtype]

    return get
