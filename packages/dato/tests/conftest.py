"""Fixtures of the dato tests: fresh generators and tiny denoisers of the real classes."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def rng() -> torch.Generator:
    """A generator that starts at the same seed in every test."""
    return torch.Generator().manual_seed(0)
