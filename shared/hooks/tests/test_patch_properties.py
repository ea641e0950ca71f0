"""Patch under any interleaving: whatever patches come, change and go, what remains is what those alone would do."""

from __future__ import annotations

import copy

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pared_hooks import Patch
from torch import nn


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.outer = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
        self.register_buffer("shift", torch.ones(3))
        self.gain = 1.0

    def forward(self, x):
        return self.finish(self.outer(self.inner(x)) * self.gain + self.shift)

    def finish(self, y):
        return y * 3


def wrap(patch, model, value):
    patch.wrap_forward(model.inner, lambda forward, x: forward(x) + value)


def wrap_outer(patch, model, value):
    patch.wrap_forward(model, lambda forward, x: forward(x) * value)


def triple(forward, x):
    return forward(x) * 3


def wrap_with_a_shared_function(patch, model, value):
    patch.wrap_forward(model.inner, triple)


def wrap_method(patch, model, value):
    patch.wrap_method(model, "finish", lambda method, y: method(y) - value)


def buffer(patch, model, value):
    patch.set_attribute(model, "shift", torch.full((3,), float(value)))


def attribute(patch, model, value):
    patch.set_attribute(model, "gain", float(value))


def swap(patch, model, value):
    torch.manual_seed(value)
    patch.swap_module(model.outer, "0", nn.Linear(3, 3))


def hook(patch, model, value):
    patch.add_hook(model, "forward_pre", lambda module, args: (args[0] + value,))


def parameter(patch, model, value):
    patch.set_attribute(model.inner, "bias", nn.Parameter(torch.full((3,), float(value))))


def no_bias(patch, model, value):
    patch.set_attribute(model.inner, "bias", None)


def model_hook(patch, model, value):
    from diffusers.hooks import ModelHook

    class Replace(ModelHook):
        def new_forward(self, module, *args, **kwargs):
            return self.fn_ref.original_forward(*args, **kwargs) - value

    patch.add_model_hook(model.inner, Replace(), f"{patch.owner}.{value}.{id(patch)}")


CHANGES = [
    wrap,
    wrap_outer,
    wrap_with_a_shared_function,
    wrap_method,
    attribute,
    swap,
    hook,
    parameter,
    no_bias,
    buffer,
    model_hook,
]
steps = st.lists(st.tuples(st.integers(0, 2), st.sampled_from(CHANGES), st.integers(1, 9)), max_size=8)


def apply(model, history):
    patches = {}
    for number, (owner, change, value) in enumerate(history):
        change(patches.setdefault((owner, number if change is model_hook else 0), Patch(f"m{owner}")), model, value)
    return patches


@settings(max_examples=60, deadline=None)
@given(history=steps, order=st.randoms(use_true_random=False))
def test_removal_in_any_order_restores_bit_for_bit(history, order):
    torch.manual_seed(0)
    model, x = Model().eval(), torch.randn(2, 3)
    plain, keys = model(x), list(model.state_dict())
    dicts = {name: dict(part.__dict__) for name, part in model.named_modules()}
    tensors = {name: id(value) for name, value in model.named_parameters()}
    patches = list(apply(model, history).values())
    order.shuffle(patches)
    for patch in patches:
        patch.remove()
        model(x)
    assert torch.equal(model(x), plain)
    assert list(model.state_dict()) == keys
    assert {name: id(value) for name, value in model.named_parameters()} == tensors
    assert {name: set(part.__dict__) for name, part in model.named_modules()} == {
        name: set(attributes) for name, attributes in dicts.items()
    }


@settings(max_examples=60, deadline=None)
@given(history=steps, gone=st.integers(0, 2))
def test_after_one_owner_left_the_model_is_as_if_it_had_never_come(history, gone):
    torch.manual_seed(0)
    model, x = Model().eval(), torch.randn(2, 3)
    reference = copy.deepcopy(model)
    for (owner, _), patch in apply(model, history).items():
        if owner == gone:
            patch.remove()
    apply(reference, [step if step[0] != gone else (gone, nothing, 0) for step in history])
    assert torch.equal(model(x), reference(x))


def nothing(patch, model, value):
    pass


@settings(max_examples=40, deadline=None)
@given(history=steps)
def test_a_deep_copy_of_any_patched_model_is_the_plain_model(history):
    torch.manual_seed(0)
    model, x = Model().eval(), torch.randn(2, 3)
    plain = model(x)
    apply(model, history)
    clone = copy.deepcopy(model)
    assert torch.equal(clone(x), plain)
    assert "_pared" not in {key for part in clone.modules() for key in part.__dict__}


@settings(max_examples=40, deadline=None)
@given(history=steps)
def test_a_cast_of_any_patched_model_is_a_cast_of_the_plain_one_after_removal(history):
    torch.manual_seed(0)
    model, x = Model().eval(), torch.randn(2, 3)
    expected = copy.deepcopy(model).double()(x.double())
    patches = apply(model, history)
    model.double()
    for patch in patches.values():
        patch.remove()
    assert torch.equal(model(x.double()), expected)
