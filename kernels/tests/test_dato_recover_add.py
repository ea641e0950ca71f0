from __future__ import annotations

import pytest
import torch
from pared_kernels import dato_recover_add


def test_each_token_receives_the_row_its_map_names(generator):
    x, y = torch.randn(1, 4, 3, generator=generator), torch.randn(1, 2, 3, generator=generator)
    out = dato_recover_add(x, y, torch.tensor([[1, 0, 1, 1]]))
    assert out.equal(x + y[:, [1, 0, 1, 1]])


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 1, 3), (1, 1, 3)])
def test_gate_of_every_shape_scales_the_channels(shape, generator):
    x, y = torch.randn(2, 4, 3, generator=generator), torch.randn(2, 2, 3, generator=generator)
    gate = torch.randn(shape, generator=generator)
    gather_map = torch.randint(2, (2, 4), generator=generator)
    recovered = y[torch.arange(2)[:, None], gather_map]
    expected = x + (gate if gate.dim() == 3 else gate.expand(2, 3)[:, None]) * recovered
    torch.testing.assert_close(dato_recover_add(x, y, gather_map, gate), expected)


@pytest.mark.parametrize("gated", [True, False])
def test_gradients_are_those_of_finite_differences(gated, generator):
    x = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 2, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    gate = torch.randn(3, generator=generator, dtype=torch.float64, requires_grad=True) if gated else None
    assert torch.autograd.gradcheck(dato_recover_add, (x, y, torch.tensor([[0, 1, 1, 1], [1, 0, 0, 1]]), gate))


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"y": torch.zeros(2, 2, 5)}, ValueError, "y is"),
        ({"y": torch.zeros(2, 2, 3, dtype=torch.float16)}, TypeError, "y has"),
        ({"gather_map": torch.zeros(2, 3, dtype=torch.long)}, ValueError, "gather_map"),
        ({"gate": torch.zeros(2, 4, 3)}, ValueError, "gate"),
        ({"gate": torch.zeros(5)}, ValueError, "gate"),
    ],
)
def test_wrong_arguments_are_named(change, error, named):
    valid = {"x": torch.zeros(2, 4, 3), "y": torch.zeros(2, 2, 3), "gather_map": torch.zeros(2, 4, dtype=torch.long)}
    with pytest.raises(error, match=named):
        dato_recover_add(**(valid | change))
