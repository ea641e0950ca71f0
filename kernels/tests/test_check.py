from __future__ import annotations

import pytest
import torch
from pared_kernels import check, dispatch, registry

PAIRS = [(operator.name, backend) for operator in registry.operators().values() for backend in operator.backends]


@pytest.mark.parametrize(("name", "backend"), PAIRS)
def test_backend_agrees_with_the_float64_reference(name, backend, seed):
    if backend == "triton" and not dispatch.has_triton():
        pytest.skip("triton is not installed")
    outcomes = check.run([name], backend, device="cpu" if not torch.cuda.is_available() else None, seed=seed)
    assert [outcome for outcome in outcomes if outcome.status == "failed"] == []
    assert any(outcome.status == "passed" for outcome in outcomes)


def test_a_wrong_backend_is_found(monkeypatch):
    operator = registry.operators()["dato_match"]
    wrong = lambda metric, query_idx, key_idx: operator.reference(metric, query_idx, key_idx.flip(1))  # noqa: E731
    monkeypatch.setitem(operator._implementations, "cpu", wrong)
    assert "failed" in {outcome.status for outcome in check.run(["dato_match"], "cpu", device="cpu")}


def test_a_crashing_backend_is_a_failure_with_its_reason(monkeypatch):
    def crash(*arguments):
        raise RuntimeError("out of registers")

    monkeypatch.setitem(registry.operators()["dato_match"]._implementations, "cpu", crash)
    outcomes = check.run(["dato_match"], "cpu", device="cpu")
    assert {outcome.status for outcome in outcomes} == {"failed"}
    assert "out of registers" in outcomes[0].reason


def test_unknown_operator_and_backend_are_refused():
    with pytest.raises(ValueError, match="dato_match"):
        check.run(["dato_mach"])
    with pytest.raises(ValueError, match="triton"):
        check.run(backend="cuda")
