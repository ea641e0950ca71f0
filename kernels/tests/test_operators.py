"""What holds for every operator: schema, fake tensors, compilation, gradients."""

from __future__ import annotations

import pytest
import torch
from pared_kernels import check, registry

OPERATORS = registry.operators()
NAMES = tuple(OPERATORS)


def arguments_of(name: str):
    """The arguments of one case of middling size, in float32 where there is one."""
    cases = list(OPERATORS[name].part("cases").cases(0))
    later = [case.arguments for case in cases[len(cases) // 3 :]]
    tensors = (torch.float32 in [x.dtype for x in given if isinstance(x, torch.Tensor)] for given in later)
    return check.fresh(next((given for given, fits in zip(later, tensors, strict=True) if fits), later[0]))


@pytest.mark.parametrize("name", NAMES)
def test_opcheck_finds_nothing(name):
    torch.library.opcheck(OPERATORS[name].op, arguments_of(name))


@pytest.mark.parametrize("name", NAMES)
def test_compiles_into_one_graph_and_gives_the_same(name):
    operator, arguments = OPERATORS[name], arguments_of(name)
    expected = check.results(operator, operator, check.fresh(arguments))
    # The function below is one code object for all operators, and recompiling one is limited.
    torch._dynamo.reset()
    compiled = torch.compile(lambda *given: operator.op(*given), fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(check.results(operator, compiled, arguments), expected, strict=True):
        assert ours.equal(theirs)


@pytest.mark.parametrize("name", NAMES)
def test_fake_outputs_have_the_layout_of_real_ones(name):
    operator, arguments = OPERATORS[name], arguments_of(name)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = check.as_tuple(operator(*(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in arguments)))
    for expected, real in zip(fake, check.as_tuple(operator(*arguments)), strict=True):
        assert (expected.shape, expected.stride(), expected.dtype) == (real.shape, real.stride(), real.dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_auto_takes_the_kernel_on_a_gpu_and_agrees(name):
    outcomes = check.run([name], "triton", device="cuda")
    assert {outcome.status for outcome in outcomes} <= {"passed", "skipped"}, outcomes
    assert any(outcome.status == "passed" for outcome in outcomes)
