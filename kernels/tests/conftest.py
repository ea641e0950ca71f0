"""Triton kernels run in the interpreter where there is no GPU; that is decided when they are first imported."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A seed that differs from test to test and is the same in every run."""
    return sum(map(ord, request.node.name))


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
