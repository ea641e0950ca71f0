from __future__ import annotations

import pytest
import torch
from pared_kernels import dato_norm_gather


def test_equals_the_layer_norm_of_all_tokens_at_the_kept_ones(generator):
    x = torch.randn(2, 9, 12, generator=generator)
    norm = torch.nn.LayerNorm(12)
    torch.nn.init.normal_(norm.weight, generator=generator)
    index = torch.tensor([[0, 3, 8], [1, 2, 7]])
    expected = norm(x)[torch.arange(2)[:, None], index]
    torch.testing.assert_close(dato_norm_gather(x, index, norm.weight, norm.bias, norm.eps), expected)


@pytest.mark.parametrize("affine", [True, False])
def test_gradients_are_those_of_finite_differences(affine, generator):
    x = torch.randn(2, 4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    parameters = torch.randn(2, 5, generator=generator, dtype=torch.float64).unbind()
    weight, bias = (p.requires_grad_() if affine else None for p in parameters)
    # Token 2 is taken twice: its gradients add up.
    index = torch.tensor([[0, 2, 2], [1, 3, 0]])
    inputs = (x, index, weight, bias)
    assert torch.autograd.gradcheck(lambda *given: dato_norm_gather(*given, 1e-5), inputs)


def test_compiles_with_gradients(generator):
    x = torch.randn(1, 6, 8, generator=generator, requires_grad=True)
    index = torch.tensor([[1, 4]])
    compiled = torch.compile(lambda x: dato_norm_gather(x, index).square().sum(), fullgraph=True, backend="aot_eager")
    (ours,) = torch.autograd.grad(compiled(x), x)
    normal = torch.nn.functional.layer_norm(x[:, index[0]], (8,))
    (theirs,) = torch.autograd.grad(normal.square().sum(), x)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"x": torch.zeros(4, 3)}, ValueError, "x has"),
        ({"index": torch.zeros(3, 1, dtype=torch.long)}, ValueError, "index"),
        ({"weight": torch.zeros(4)}, ValueError, "weight"),
        ({"bias": torch.zeros(3, dtype=torch.float16)}, TypeError, "bias"),
        ({"eps": 0.0}, ValueError, "eps"),
    ],
)
def test_wrong_arguments_are_named(change, error, named):
    valid = {"x": torch.zeros(2, 4, 3), "index": torch.zeros(2, 1, dtype=torch.long)}
    with pytest.raises(error, match=named):
        dato_norm_gather(**(valid | change))
