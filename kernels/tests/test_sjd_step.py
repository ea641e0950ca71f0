from __future__ import annotations

import pytest
import torch
from pared_kernels import dispatch, sjd_step
from pared_kernels.ops.sjd_step.cases import made

BACKENDS = ("reference", "triton")


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param == "triton" and not dispatch.has_triton():
        pytest.skip("triton is not installed")
    with dispatch.use(sjd_step=request.param):
        yield request.param


def call(arguments, **options):
    logits, drafts, previous, source, u_accept, u_sample, threshold, forced, valid, limit = arguments
    options = {"threshold": threshold, "forced": forced, "valid": valid, "limit": limit} | options
    return sjd_step(logits, drafts, previous, source, u_accept, u_sample, **options)


def test_accepting_everything_keeps_the_drafts_and_adds_one(backend, generator):
    arguments = list(made(2, 4, 37, torch.float32, generator))
    arguments[4].zero_()
    tokens, committed, p = call(arguments, threshold=None, forced=None, valid=None, limit=None)
    assert tokens[:, :4].equal(arguments[1])
    assert committed.tolist() == [5, 5]
    torch.testing.assert_close(p.sum(-1), torch.ones(2, 5))


def test_a_rejected_certain_draft_is_replaced_by_another_token(backend, generator):
    logits = torch.randn(2, 4, 50, generator=generator)
    drafts = torch.randint(0, 50, (2, 3), generator=generator)
    none = torch.empty(2, 0, 50)
    uniforms = torch.full((2, 3), 1 - 2**-24), torch.rand(2, 4, generator=generator)
    tokens, committed, _ = sjd_step(logits, drafts, none, torch.full((2, 3), -1), *uniforms)
    assert committed.tolist() == [1, 1]
    assert (tokens[:, :3] != drafts).all()


def test_forced_columns_are_certain_and_accepted(backend, generator):
    logits = torch.randn(1, 3, 50, generator=generator)
    forced = torch.tensor([[7, 7, -1]])
    uniforms = torch.full((1, 2), 0.999), torch.rand(1, 3, generator=generator)
    tokens, committed, p = sjd_step(logits, forced[:, :2], torch.empty(1, 0, 50), torch.full((1, 2), -1), *uniforms,
                                    forced=forced)  # fmt: skip
    assert tokens[0, :2].tolist() == [7, 7]
    assert committed.item() == 3
    assert p[0, 0, 7] == 1
    assert p[0, 0].sum() == 1


@pytest.mark.parametrize("maximal", [True, False])
def test_the_output_law_is_that_of_p(backend, maximal, generator):
    """Drafts drawn from q, then one step: the first token has the law p, whatever q was."""
    rows, columns = 2000, 6
    p, q = (torch.rand(columns, generator=generator) + 0.05 for _ in range(2))
    p, q = p / p.sum(), q / q.sum()
    drafts = q.expand(rows, -1).multinomial(1, generator=generator)
    uniforms = torch.rand(rows, 1, generator=generator), torch.rand(rows, 2, generator=generator)
    with dispatch.use(sjd_step="reference") if backend == "triton" else dispatch.use():
        # The interpreter would take a program a row: the law is checked once, and equality elsewhere.
        tokens, *_ = sjd_step(p.log().expand(rows, 2, -1), drafts, q.expand(rows, 1, -1), torch.zeros(rows, 1).long(),
                              *uniforms, maximal=maximal)  # fmt: skip
    share = torch.bincount(tokens[:, 0], minlength=columns) / rows
    assert (share - p).abs().max() < 5 * (0.25 / rows) ** 0.5


def test_the_residual_falls_back_to_p_where_rounding_leaves_nothing(backend):
    logits = torch.tensor([[[0.0, 0.0], [0.0, 0.0]]])
    previous = torch.full((1, 1, 2), 0.75)  # above p everywhere, as no true distribution is
    tokens, committed, _ = sjd_step(
        logits, torch.tensor([[0]]), previous, torch.tensor([[0]]), torch.tensor([[0.9]]), torch.tensor([[0.6, 0.1]])
    )
    assert committed.item() == 1
    assert tokens[0].tolist() == [1, 0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_without_a_distribution_show_in_p_and_draw_a_column_that_exists(backend, value, generator):
    arguments = list(made(2, 3, 37, torch.float32, generator))
    arguments[0][0, 1] = value
    arguments[7].fill_(-1)
    tokens, _, p = call(arguments, threshold=None)
    assert p[0, 1].isnan().all()
    assert p[1].isfinite().all()
    assert ((tokens >= 0) & (tokens < 37)).all()


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"drafts": torch.zeros(1, 3).long()}, ValueError, "drafts"),
        ({"previous": torch.zeros(1, 2, 5)}, ValueError, "previous"),
        ({"previous": torch.zeros(1, 2, 4).double()}, TypeError, "previous"),
        ({"u_sample": torch.zeros(1, 2)}, ValueError, "u_sample"),
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"forced": torch.zeros(1, 2).long()}, ValueError, "forced"),
        ({"limit": torch.zeros(2).long()}, ValueError, "limit"),
    ],
)
def test_wrong_arguments_are_named(change, error, named):
    valid = {
        "logits": torch.zeros(1, 3, 4),
        "drafts": torch.zeros(1, 2).long(),
        "previous": torch.zeros(1, 2, 4),
        "source": torch.zeros(1, 2).long(),
        "u_accept": torch.zeros(1, 2),
        "u_sample": torch.zeros(1, 3),
    }
    with pytest.raises(error, match=named):
        sjd_step(**(valid | change))
