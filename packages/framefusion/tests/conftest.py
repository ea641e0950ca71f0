"""Fixtures of the tests of framefusion: generators, and one tiny model of each family for all tests of a session."""

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
    """`tiny("qwen2-vl")`: the family and its model, made once; a test leaves the model as it found it."""
    import ff_models

    made = {}

    def get(name):
        if name not in made:
            family = ff_models.FAMILIES[name]
            made[name] = (family, family.model())
        return made[name]

    return get
