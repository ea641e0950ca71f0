"""Fixtures of the tests of framefusion."""

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
