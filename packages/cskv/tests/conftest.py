"""Fixtures of the cskv tests: fresh generators and tiny language models of the real classes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Kernels run in the interpreter; that is decided when they are first imported.
    os.environ["TRITON_INTERPRET"] = "1"

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def rng() -> torch.Generator:
    """A generator that starts at the same seed in every test."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def randn(rng):
    """Normal tensors from the test's generator: `randn(2, 3, dtype=torch.float64)`."""
    return lambda *shape, dtype=torch.float32: torch.randn(*shape, generator=rng, dtype=dtype)


@pytest.fixture
def language_model():
    """Builds a tiny model of a family: `language_model("qwen3")`."""
    import cskv_models

    return cskv_models.language_model


@pytest.fixture
def tokens(rng):
    """Token ids `tokens(batch, length)` from the test's generator."""
    return lambda batch, length: torch.randint(3, 97, (batch, length), generator=rng)
