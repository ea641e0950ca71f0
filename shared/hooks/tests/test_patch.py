"""Patch and Handle on plain torch modules: what a change does, and that taking it back leaves no trace."""

from __future__ import annotations

import copy
import inspect
import io
import itertools

import pytest
import torch
from pared_hooks import AlreadyAppliedError, ConflictError, Handle, ParedError, Patch
from torch import nn


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.middle = nn.Dropout(0.5)
        self.last = nn.Linear(4, 4)
        self.register_buffer("shift", torch.randn(4))
        self.scale = 1.0

    def forward(self, x: torch.Tensor, gain: float = 1.0) -> torch.Tensor:
        return self.last(self.middle(self.first(x))) * self.scale * gain + self.shift


def anatomy(module: nn.Module) -> list:
    """Everything about a module that a patch may touch."""
    return [
        (name, type(part), {key: _plain(value) for key, value in part.__dict__.items()})
        for name, part in module.named_modules()
    ] + [list(module.state_dict())]


def _plain(value):
    if isinstance(value, dict):
        return [(key, item if not isinstance(item, torch.Tensor) else id(item)) for key, item in value.items()]
    return value


@pytest.fixture
def block() -> Block:
    return Block().eval()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 4)


def double(forward, *args, **kwargs):
    return 2 * forward(*args, **kwargs)


def add_one(forward, *args, **kwargs):
    return forward(*args, **kwargs) + 1


def test_a_wrapper_gets_the_original_forward_and_all_arguments(block, x):
    seen = []

    def wrapper(forward, *args, **kwargs):
        seen.append((args, kwargs))
        return forward(*args, **kwargs)

    expected = block(x, gain=3.0)
    Patch("a").wrap_forward(block, wrapper)
    assert torch.equal(block(x, gain=3.0), expected)
    assert seen == [((x,), {"gain": 3.0})]


def test_the_newest_wrapper_is_outermost(block, x):
    plain = block(x)
    Patch("a").wrap_forward(block, add_one)
    Patch("b").wrap_forward(block, double)
    assert torch.equal(block(x), 2 * (plain + 1))


@pytest.mark.parametrize("gone", range(3))
def test_the_same_wrapper_of_two_patches_comes_off_where_it_was_put(block, x, gone):
    plain = block(x)
    patches = [Patch(name) for name in "abc"]
    for patch, wrapper in zip(patches, (add_one, double, add_one), strict=True):
        patch.wrap_forward(block, wrapper)
    patches[gone].remove()
    expected = (2 * plain + 1, plain + 1 + 1, 2 * (plain + 1))
    assert torch.equal(block(x), expected[gone])


def test_a_wrapped_forward_keeps_its_signature(block):
    before = inspect.signature(block.forward)
    Patch("a").wrap_forward(block, double)
    assert inspect.signature(block.forward) == before


def test_the_instance_forward_disappears_with_the_last_wrapper(block):
    first, second = Patch("a"), Patch("b")
    first.wrap_forward(block, double)
    second.wrap_forward(block, add_one)
    first.remove()
    assert "forward" in block.__dict__
    second.remove()
    assert "forward" not in block.__dict__


def test_a_forward_the_user_had_set_comes_back(block, x):
    mine = lambda x: x  # noqa: E731
    block.forward = mine
    patch = Patch("a")
    patch.wrap_forward(block, double)
    assert torch.equal(block(x), 2 * x)
    patch.remove()
    assert block.__dict__["forward"] is mine


def test_a_foreign_wrapper_put_on_top_survives_our_removal(block, x):
    plain = block(x)
    patch = Patch("a")
    patch.wrap_forward(block, double)
    inner = block.forward
    block.forward = lambda *args, **kwargs: inner(*args, **kwargs) + 5
    patch.remove()
    assert torch.equal(block(x), plain + 5)


def apply_everything(block: Block, owner: str, number: int) -> Patch:
    with Patch(owner) as patch:
        patch.claim(block, "shared", exclusive=False)
        patch.wrap_forward(block, double if number % 2 else add_one)
        patch.wrap_forward(block.last, add_one)
        patch.set_attribute(block, "scale", 1.5 + number)
        patch.set_attribute(block, "shift", torch.full((4,), float(number)))
        patch.set_attribute(block.first, "weight", nn.Parameter(torch.randn(4, 4)))
        patch.set_attribute(block, f"note{number}", number)
        patch.swap_module(block, "middle", nn.Sequential(nn.Linear(4, 4)))
        patch.add_module(block, f"extra{number}", nn.Linear(2, 2))
        patch.add_hook(block, "forward_pre", lambda module, args, kwargs: None, with_kwargs=True)
        patch.add_hook(block, "forward", lambda module, args, output: output * 1.25)
        patch.add_hook(block, "full_backward", lambda module, *grads: None)
        patch.add_hook(block, "state_dict", lambda *args: None)
        patch.add_hook(block, "load_state_dict_pre", lambda *args: None)
    return patch


@pytest.mark.parametrize("order", itertools.permutations(range(3)))
def test_three_patches_come_off_in_any_order_without_a_trace(block, x, order):
    before, plain = anatomy(block), block(x)
    patches = [apply_everything(block, f"method{i}", i) for i in range(3)]
    assert not torch.equal(block(x), plain)
    for index in order:
        patches[index].remove()
        block(x)
    assert anatomy(block) == before
    assert torch.equal(block(x), plain)


def test_the_last_patch_still_applied_wins_an_attribute(block):
    patches = [Patch(name) for name in "abc"]
    for number, patch in enumerate(patches):
        patch.set_attribute(block, "scale", 10.0 + number)
    patches[2].remove()
    assert block.scale == 11.0
    patches[0].remove()
    assert block.scale == 11.0
    patches[1].remove()
    assert block.scale == 1.0


def test_an_exception_inside_the_block_undoes_everything(block, x):
    before, plain = anatomy(block), block(x)
    patch = Patch("a")

    def apply() -> None:
        with patch:
            patch.wrap_forward(block, double)
            patch.swap_module(block, "last", nn.Identity())
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        apply()
    assert anatomy(block) == before
    assert torch.equal(block(x), plain)
    assert patch.removed


def test_a_change_that_fails_leaves_no_trace_even_outside_a_block(block):
    before = anatomy(block)
    with pytest.raises(ParedError, match="'nothing' is not valid: a child of Block"):
        Patch("a").swap_module(block, "nothing", nn.Identity())
    assert anatomy(block) == before


def test_an_exclusive_claim_on_a_claimed_site_names_both_owners(block):
    Patch("dato").claim(block, "denoiser.skip")
    with pytest.raises(ConflictError, match=r"deme and dato both need 'denoiser\.skip' of Block"):
        Patch("deme").claim(block, "denoiser.skip", exclusive=False)


def test_shared_claims_of_two_owners_stack(block):
    Patch("dato").claim(block, "denoiser.forward", exclusive=False)
    Patch("deme").claim(block, "denoiser.forward", exclusive=False)


def test_a_second_claim_of_the_same_owner_says_already_applied(block):
    Patch("dato").claim(block, "denoiser.skip")
    with pytest.raises(AlreadyAppliedError, match="dato is already applied"):
        Patch("dato").claim(block, "denoiser.skip")


def test_a_site_is_free_again_after_removal(block):
    patch = Patch("dato")
    patch.claim(block, "denoiser.skip")
    patch.remove()
    Patch("deme").claim(block, "denoiser.skip")
    assert "_pared" in block.__dict__


def test_a_removed_patch_refuses_new_changes(block):
    patch = Patch("a")
    patch.remove()
    with pytest.raises(ParedError, match="has been removed"):
        patch.wrap_forward(block, double)


def test_on_remove_runs_once_even_when_remove_is_called_twice():
    calls = []
    patch = Patch("a")
    patch.on_remove(lambda: calls.append(1))
    patch.remove()
    patch.remove()
    assert calls == [1]


def test_one_failing_undo_does_not_keep_the_others_from_running(block):
    def fail() -> None:
        raise RuntimeError("cannot")

    before = anatomy(block)
    patch = Patch("a")
    patch.wrap_forward(block, double)
    patch.on_remove(fail)
    with pytest.raises(ExceptionGroup, match="could not be restored completely"):
        patch.remove()
    assert anatomy(block) == before


def test_a_swapped_out_module_follows_a_cast(block, x):
    reference = copy.deepcopy(block).double()
    patch = Patch("a")
    patch.swap_module(block, "last", nn.Linear(4, 4))
    patch.set_attribute(block, "shift", torch.zeros(4))
    patch.set_attribute(block.first, "weight", nn.Parameter(torch.randn(4, 4)))
    block.double()
    patch.remove()
    assert torch.equal(block(x.double()), reference(x.double()))
    assert {tensor.dtype for tensor in block.state_dict().values()} == {torch.float64}


def test_a_cast_also_reaches_what_another_patch_covers_later(block):
    below, above = Patch("a"), Patch("b")
    below.set_attribute(block, "shift", torch.ones(4))
    block.double()
    above.set_attribute(block, "shift", torch.zeros(4, dtype=torch.float64))
    above.remove()
    assert block.shift.dtype == torch.float64
    assert block.shift.eq(1).all()


def test_a_cast_reaches_a_covered_parameter_that_the_module_did_not_have(block):
    below, above = Patch("a"), Patch("b")
    below.set_attribute(block, "extra", nn.Parameter(torch.ones(4)))
    above.set_attribute(block, "extra", nn.Parameter(torch.zeros(4)))
    block.double()
    above.remove()
    assert block.extra.dtype == torch.float64


def test_a_swapped_out_module_follows_train_mode(block):
    original = block.middle
    below, above = Patch("a"), Patch("b")
    below.swap_module(block, "middle", nn.Dropout(0.1).eval())
    above.swap_module(block, "middle", nn.Identity())
    block.train()
    above.remove()
    assert block.middle.training
    below.remove()
    assert block.middle is original
    assert block.middle.training


def test_a_deep_copy_of_a_patched_module_is_unpatched(block, x):
    before, plain = [entry[:2] for entry in anatomy(block)[:-1]], block(x)
    apply_everything(block, "a", 1)
    clone = copy.deepcopy(block)
    assert torch.equal(clone(x), plain)
    assert [entry[:2] for entry in anatomy(clone)[:-1]] == before
    assert not {"_pared", "forward", "__getstate__", "_apply"} & set(clone.__dict__)
    assert clone.first.weight is not block.first.weight
    assert clone._is_full_backward_hook is None


def test_a_pickled_patched_module_is_unpatched(block, x):
    plain = block(x)
    apply_everything(block, "a", 1)
    buffer = io.BytesIO()
    torch.save(block, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), plain)


def test_copying_leaves_the_original_patched(block, x):
    apply_everything(block, "a", 1)
    patched = block(x)
    copy.deepcopy(block)
    assert torch.equal(block(x), patched)


def test_a_handle_is_a_context_manager_and_idempotent(block):
    patch = Patch("a")
    patch.wrap_forward(block, double)
    resets = []
    with Handle(patch, stats=lambda: {"calls": 3}, reset=lambda: resets.append(1)) as handle:
        assert handle.applied
        assert handle.stats() == {"calls": 3}
        handle.reset()
    handle.remove()
    assert resets == [1]
    assert not handle.applied
    assert "forward" not in block.__dict__


def test_set_attribute_refuses_a_submodule(block):
    with pytest.raises(ParedError, match="use swap_module"):
        Patch("a").set_attribute(block, "last", nn.Identity())


def test_set_attribute_refuses_the_forward(block):
    with pytest.raises(ParedError, match="use wrap_forward"):
        Patch("a").set_attribute(block, "forward", double)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda patch, block: patch.wrap_forward(block, 3), "wrapper = 3"),
        (lambda patch, block: patch.wrap_forward("block", double), "module = 'block'"),
        (lambda patch, block: patch.wrap_method(block, "forwards", double), "name = 'forwards'"),
        (lambda patch, block: patch.wrap_method(block, "scale", double), "name = 'scale'"),
        (lambda patch, block: patch.add_hook(block, "forward", None), "hook = None"),
        (lambda patch, block: patch.claim(None, "site"), "module = None"),
        (lambda patch, block: patch.swap_module(block, "last", double), "new = "),
    ],
)
def test_a_wrong_argument_is_named_and_leaves_no_trace(block, change, named):
    before = anatomy(block)
    with pytest.raises(ParedError, match=named):
        change(Patch("a"), block)
    assert anatomy(block) == before


def test_an_unknown_hook_kind_lists_the_valid_ones(block):
    with pytest.raises(ParedError, match="one of forward_pre, forward"):
        Patch("a").add_hook(block, "before", double)


def test_a_method_of_a_plain_object_is_replaced_and_comes_back():
    class Scheduler:
        def step(self):
            return 1

    scheduler = Scheduler()
    first, second = Patch("a"), Patch("b")
    first.set_attribute(scheduler, "step", lambda: 2)
    second.set_attribute(scheduler, "step", lambda: 3)
    assert copy.deepcopy(scheduler).step() == 1
    first.remove()
    assert scheduler.step() == 3
    second.remove()
    assert scheduler.step() == 1
    assert scheduler.__dict__ == {}


class Sampler:
    """A stand-in for a scheduler: `step` is a method that several methods want to see."""

    def step(self, sample, eta=0.0):
        return sample + eta


@pytest.mark.parametrize("order", itertools.permutations(range(3)))
def test_wrappers_of_a_method_stack_and_come_off_in_any_order(order):
    sampler, wrappers = Sampler(), (add_one, double, add_one)
    signature = inspect.signature(sampler.step)
    patches = [Patch(name) for name in "abc"]
    for patch, wrapper in zip(patches, wrappers, strict=True):
        patch.wrap_method(sampler, "step", wrapper)
    assert inspect.signature(sampler.step) == signature
    assert sampler.step(3, eta=1) == 11
    assert copy.deepcopy(sampler).step(3, eta=1) == 4
    left = [0, 1, 2]
    for index in order:
        patches[index].remove()
        left.remove(index)
        expected = 4
        for position in left:
            expected = wrappers[position](lambda value=expected: value)
        assert sampler.step(3, eta=1) == expected
    assert sampler.__dict__ == {}


def test_a_wrapped_method_that_somebody_kept_is_the_plain_one_after_removal():
    sampler, patch = Sampler(), Patch("a")
    patch.wrap_method(sampler, "step", double)
    kept = sampler.step
    patch.remove()
    assert kept(3) == 3


def test_a_wrapper_of_a_method_sees_an_attribute_that_was_laid_below_come_and_go():
    sampler, below, above = Sampler(), Patch("a"), Patch("b")
    below.set_attribute(sampler, "step", lambda sample: 100)
    above.wrap_method(sampler, "step", double)
    assert sampler.step(3) == 200
    below.remove()
    assert sampler.step(3) == 6


def test_a_method_of_a_module_is_wrapped_like_its_forward(block, x):
    plain = block(x)
    patch = Patch("a")
    patch.wrap_method(block, "forward", double)
    patch.wrap_method(block, "extra_repr", lambda method: f"patched {method()}")
    assert torch.equal(block(x), 2 * plain)
    assert block.extra_repr() == "patched "
    patch.remove()
    assert not {"forward", "extra_repr"} & set(block.__dict__)
