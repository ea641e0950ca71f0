from __future__ import annotations

import threading

import pared_kernels
import pytest
import torch
from pared_kernels import best_match, dispatch, registry

OPERATOR = registry.operators()["dato_match"]
INDEX = torch.tensor([[0, 1]])


@pytest.fixture
def ran(monkeypatch):
    """The backends that ran, in order."""
    names: list[str] = []
    for backend in OPERATOR.backends:

        def run(*arguments, backend=backend):
            names.append(backend)
            return OPERATOR.reference(*arguments)

        monkeypatch.setitem(OPERATOR._implementations, backend, run)
    return names


def match(dtype=torch.float32):
    return best_match(torch.ones(1, 2, 3, dtype=dtype), INDEX, INDEX)


def test_auto_takes_the_cpu_path_on_the_cpu(ran):
    match()
    assert ran == ["cpu"]


def test_auto_takes_the_reference_where_an_operator_has_no_cpu_path():
    operator = registry.operators()["dato_recover_add"]
    assert dispatch.select(operator, (torch.ones(1, 2, 3),) * 2) == "reference"
    with pared_kernels.use("cpu"):
        assert dispatch.select(operator, (torch.ones(1, 2, 3),) * 2) == "reference"


def test_inner_block_wins_and_leaving_it_restores(ran):
    with pared_kernels.use("reference"):
        with pared_kernels.use("cpu"):
            match()
        match()
    match()
    assert ran == ["cpu", "reference", "cpu"]


def test_choice_by_name_wins_over_the_choice_for_all(ran):
    with pared_kernels.use("cpu", dato_match="reference"):
        match()
    with pared_kernels.use(dato_match="reference"):
        match()
    with pared_kernels.use(dato_recover_add="reference"):
        match()
    assert ran == ["reference", "reference", "cpu"]


def test_choice_holds_in_its_own_thread_only(ran):
    with pared_kernels.use("reference"):
        thread = threading.Thread(target=match)
        thread.start()
        thread.join()
    assert ran == ["cpu"]


def test_choice_is_read_when_a_compiled_graph_runs(ran):
    compiled = torch.compile(match, fullgraph=True, backend="eager")
    compiled()
    with pared_kernels.use("reference"):
        compiled()
    assert ran[-2:] == ["cpu", "reference"]


def test_choice_ends_with_an_exception(ran):
    with pytest.raises(RuntimeError, match="stop"), pared_kernels.use("reference"):
        raise RuntimeError("stop")
    match()
    assert ran == ["cpu"]


def test_a_chosen_backend_that_cannot_run_says_why(monkeypatch):
    if dispatch.has_triton():
        with pytest.raises(pared_kernels.BackendUnavailableError, match="float64"), pared_kernels.use("triton"):
            match(torch.float64)
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    with pytest.raises(pared_kernels.BackendUnavailableError, match="not installed"), pared_kernels.use("triton"):
        match()


def test_wrong_choices_are_refused_with_the_valid_ones():
    with pytest.raises(ValueError, match=r"'cuda'.*reference, triton, cpu, auto"), pared_kernels.use("cuda"):
        pass
    with pytest.raises(ValueError, match=r"'match'.*dato_match"), pared_kernels.use(match="cpu"):
        pass
