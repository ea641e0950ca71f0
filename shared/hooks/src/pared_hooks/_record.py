"""What a patched module remembers about itself, so that changes can be taken back in any order.

A patched object carries one `_pared` entry in its `__dict__`, a `Record`, and two entries that lean on it:
`__getstate__`, through which `copy.deepcopy` and `pickle` see the unpatched object, and `_apply`, through which
`.to()` also reaches modules that were swapped out. All three go with the last change.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

MISSING: Any = object()
_TENSORS = ("_parameters", "_buffers")
RECORD = "_pared"


@dataclass(eq=False)
class Claim:
    """A named site of a module that a method relies on."""

    owner: str
    site: str
    exclusive: bool
    patch: object


@dataclass(eq=False)
class Layer:
    """A value laid over an attribute, or a wrapper over a method; compared by identity, so that twins stay apart.

    `training` is the mode of the target when the next layer covered this one.
    """

    value: Any
    training: bool | None = None


class ForwardChain:
    """The wrappers around one `forward`; `run` is what is installed in place of `base`."""

    def __init__(self, base: Callable[..., Any]) -> None:
        self.base = base
        self.wrappers: list[Layer] = []
        self.top = base
        # Wrapped so that `inspect.signature(model.forward)`, which pipelines and `generate` read, stays the true one.
        self.run = functools.update_wrapper(functools.partial(_run_chain, self), base)

    def compose(self) -> None:
        self.top = self.base
        for wrapper in self.wrappers:
            self.top = functools.partial(wrapper.value, self.top)


def _run_chain(chain: ForwardChain, *args: Any, **kwargs: Any) -> Any:
    return chain.top(*args, **kwargs)


class Slot:
    """One attribute of an object, wherever `nn.Module` keeps it, with the values laid over its original one."""

    def __init__(self, target: Any, name: str) -> None:
        self.target = target
        self.name = name
        self.store, base = self._find()
        self.order = list(getattr(target, self.store)) if self.store.startswith("_") else []
        self.bottom = Layer(base)
        self.layers: list[Layer] = []

    @property
    def base(self) -> Any:
        """The original value; `MISSING` when the object itself had none."""
        return self.bottom.value

    def _find(self) -> tuple[str, Any]:
        if isinstance(self.target, nn.Module):
            for store in ("_modules", "_parameters", "_buffers"):
                if self.name in getattr(self.target, store):
                    return store, getattr(self.target, store)[self.name]
        if self.name in getattr(self.target, "__dict__", {}):
            return "dict", self.target.__dict__[self.name]
        if hasattr(self.target, self.name) and isinstance(getattr(type(self.target), self.name, None), property):
            return "property", getattr(self.target, self.name)
        return "absent", MISSING

    def push(self, layer: Layer) -> None:
        self._cover(self.layers[-1] if self.layers else self.bottom)
        self._write(layer.value)
        self.layers.append(layer)

    def pop(self, layer: Layer) -> None:
        was_top = self.layers[-1] is layer
        self.layers.remove(layer)
        if self.layers:
            if was_top:
                self._write(self.layers[-1].value)
                self._catch_up(self.layers[-1])
        else:
            self._restore()

    def below(self, layer: Layer) -> Any:
        """Value that `layer` covers; the original one for a layer that has been taken off."""
        index = self.layers.index(layer) if layer in self.layers else 0
        if index:
            return self.layers[index - 1].value
        if self.base is not MISSING:
            return self.base
        function = inspect.getattr_static(type(self.target), self.name)
        return function.__get__(self.target, type(self.target))

    def _cover(self, layer: Layer) -> None:
        if not isinstance(self.target, nn.Module):
            return
        layer.training = self.target.training
        # A cast puts new tensors into the place of buffers.
        live = getattr(self.target, self.store).get(self.name) if self.store in _TENSORS else None
        if isinstance(live, torch.Tensor):
            layer.value = live

    def _catch_up(self, layer: Layer) -> None:
        """Tell a module that was swapped out of the `train()` and `eval()` calls it missed."""
        if isinstance(layer.value, nn.Module) and self.target.training != layer.training:
            layer.value.train(self.target.training)

    def _write(self, value: Any) -> None:
        if not isinstance(self.target, nn.Module) or self.store == "property":
            setattr(self.target, self.name, value)
            return
        store = self._store_for(value)
        self._drop()
        values = self.target.__dict__ if store == "dict" else getattr(self.target, store)
        values[self.name] = value
        if store == self.store and store != "dict":
            _reorder(values, self.order)

    def _store_for(self, value: Any) -> str:
        if isinstance(value, nn.Module):
            return "_modules"
        if isinstance(value, nn.Parameter):
            return "_parameters"
        if value is None or (self.store == "_buffers" and isinstance(value, torch.Tensor)):
            return "dict" if self.store == "absent" else self.store
        return "dict"

    def _drop(self) -> None:
        self.target.__dict__.pop(self.name, None)
        for store in ("_modules", "_parameters", "_buffers"):
            # A parameter or buffer keeps its own store: only its value changes.
            if store == "_modules" or store != self.store:
                getattr(self.target, store).pop(self.name, None)

    def _restore(self) -> None:
        if self.store == "absent":
            if isinstance(self.target, nn.Module):
                self._drop()
            elif self.name in getattr(self.target, "__dict__", {}):
                delattr(self.target, self.name)
            return
        self._write(self.base)
        self._catch_up(self.bottom)

    def hidden(self) -> list[Layer]:
        """Layers with modules and tensors that `nn.Module._apply` of the target no longer reaches."""
        shown = self.layers[-1].value
        reached = set(map(id, shown.modules())) if isinstance(shown, nn.Module) else {id(shown)}
        kinds = (nn.Module, torch.Tensor) if self.store == "_buffers" else (nn.Module, nn.Parameter)
        covered = [self.bottom, *self.layers[:-1]]
        return [layer for layer in covered if isinstance(layer.value, kinds) and id(layer.value) not in reached]


def _reorder(values: dict[str, Any], order: list[str]) -> None:
    for key in [key for key in order if key in values]:
        values[key] = values.pop(key)


@dataclass(eq=False)
class Record:
    """All changes currently made to one object (`target`, a module or another object with a `__dict__`)."""

    target: Any
    claims: list[Claim] = field(default_factory=list)
    chains: list[ForwardChain] = field(default_factory=list)
    slots: dict[tuple[int, str], Slot] = field(default_factory=dict)
    hook_ids: list[int] = field(default_factory=list)
    full_backward: bool | None = None
    model_hooks: list[Any] = field(default_factory=list)
    owns_registry: bool = False
    original_forward: Any = MISSING
    has_getstate: bool = False
    has_apply: bool = False

    @staticmethod
    def find(target: Any) -> Record | None:
        return target.__dict__.get(RECORD)

    @staticmethod
    def of(target: Any) -> Record:
        """Return the record of `target`, starting one when it is the first change."""
        record = Record.find(target)
        if record is None:
            record = Record(target)
            target.__dict__[RECORD] = record
            if "__getstate__" not in target.__dict__:
                target.__dict__["__getstate__"] = functools.partial(_unpatched_state, target)
                record.has_getstate = True
            if isinstance(target, nn.Module) and "_apply" not in target.__dict__:
                target.__dict__["_apply"] = functools.partial(_apply_to_all, target)
                record.has_apply = True
        return record

    def release(self) -> None:
        """Take the record off the target when nothing is left in it."""
        if self.claims or self.chains or self.slots or self.hook_ids or self.model_hooks:
            return
        self.tidy_forward()
        attributes = self.target.__dict__
        if attributes.get(RECORD) is not self:
            return
        del attributes[RECORD]
        if self.has_getstate:
            attributes.pop("__getstate__", None)
        if self.has_apply:
            attributes.pop("_apply", None)

    def remember_forward(self) -> None:
        """Note the instance attribute `forward` as it is before the first wrapper or model hook."""
        if not self.chains and not self.model_hooks:
            self.original_forward = self.target.__dict__.get("forward", MISSING)

    def wrap_forward(self, wrapper: Layer) -> ForwardChain:
        self.remember_forward()
        current = self.target.__dict__.get("forward")
        if not self.chains or self.chains[-1].run is not current:
            self.chains.append(ForwardChain(self.target.forward))
            self.target.__dict__["forward"] = self.chains[-1].run
        chain = self.chains[-1]
        chain.wrappers.append(wrapper)
        chain.compose()
        return chain

    def unwrap_forward(self, chain: ForwardChain, wrapper: Layer) -> None:
        chain.wrappers.remove(wrapper)
        chain.compose()
        if not chain.wrappers:
            self.chains.remove(chain)
            self.relink(chain.run, chain.base)
        self.tidy_forward()

    def relink(self, old: Callable[..., Any], new: Callable[..., Any]) -> None:
        """Let whoever calls `old` as the forward beneath it call `new` instead."""
        new = _skip_empty(new)
        if self.target.__dict__.get("forward") is old:
            self.target.__dict__["forward"] = new
        for chain in self.chains:
            if chain.base is old:
                chain.base = new
                chain.compose()
        registry = self.target.__dict__.get("_diffusers_hook")
        for reference in registry._fn_refs if registry is not None else ():
            if reference.original_forward is old:
                reference.original_forward = new
            if reference.forward is old:
                reference.forward = new

    def tidy_forward(self) -> None:
        """Delete the instance attribute `forward` when it only repeats the method of the class."""
        attributes = self.target.__dict__
        current = attributes.get("forward")
        if current is None or self.original_forward is not MISSING or self.chains:
            return
        if _skip_empty(current) == types.MethodType(type(self.target).forward, self.target):
            del attributes["forward"]

    def push(self, target: Any, name: str, value: Any) -> tuple[Slot, Layer]:
        slot, layer = self._slot(target, name), Layer(value)
        slot.push(layer)
        self.slots[(id(target), name)] = slot
        return slot, layer

    def push_wrapper(self, target: Any, name: str, wrapper: Callable[..., Any]) -> tuple[Slot, Layer]:
        """Lay `wrapper` over a method; what it wraps is looked up at every call, so that layers come off in any order.

        The signature stays the true one, which pipelines read of `scheduler.step`.
        """
        slot, layer = self._slot(target, name), Layer(None)
        run = functools.partial(_run_wrapper, slot, layer, wrapper)
        layer.value = functools.update_wrapper(run, getattr(target, name))
        slot.push(layer)
        self.slots[(id(target), name)] = slot
        return slot, layer

    def _slot(self, target: Any, name: str) -> Slot:
        return self.slots.get((id(target), name)) or Slot(target, name)

    def pop(self, slot: Slot, layer: Layer) -> None:
        slot.pop(layer)
        if not slot.layers:
            del self.slots[(id(slot.target), slot.name)]


def _run_wrapper(slot: Slot, layer: Layer, wrapper: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return wrapper(slot.below(layer), *args, **kwargs) if layer in slot.layers else slot.below(layer)(*args, **kwargs)


def _skip_empty(forward: Any) -> Any:
    while isinstance(forward, functools.partial) and forward.func is _run_chain and not forward.args[0].wrappers:
        forward = forward.args[0].base
    return forward


def _unpatched_state(target: Any) -> dict[str, Any]:
    """`__getstate__` of a patched object: its `__dict__` as it would be after all handles were removed."""
    record = Record.find(target)
    inherited = getattr(type(target), "__getstate__")(target)  # noqa: B009 (the class's, not this one)
    state = dict(inherited if isinstance(inherited, dict) else target.__dict__)
    if record is None:
        return state
    state.pop(RECORD, None)
    if record.has_getstate:
        state.pop("__getstate__", None)
    if record.has_apply:
        state.pop("_apply", None)
    if record.chains or record.model_hooks:
        state.pop("forward", None)
        if record.original_forward is not MISSING:
            state["forward"] = record.original_forward
    if record.owns_registry:
        state.pop("_diffusers_hook", None)
    for name, value in list(state.items()):
        if "hook" in name and isinstance(value, dict) and any(key in value for key in record.hook_ids):
            state[name] = type(value)((key, hook) for key, hook in value.items() if key not in record.hook_ids)
    if record.hook_ids and not state["_backward_hooks"]:
        state["_is_full_backward_hook"] = record.full_backward
    for slot in record.slots.values():
        if slot.target is target:
            _unpatch_slot(state, slot)
    return state


def _unpatch_slot(state: dict[str, Any], slot: Slot) -> None:
    state.pop(slot.name, None)
    if isinstance(slot.target, nn.Module):
        for store in ("_modules", "_parameters", "_buffers"):
            state[store] = type(state[store])(state[store])
            if store != slot.store:
                state[store].pop(slot.name, None)
    if slot.store.startswith("_"):
        state[slot.store][slot.name] = slot.base
        _reorder(state[slot.store], slot.order)
    elif slot.store == "dict":
        state[slot.name] = slot.base


def _apply_to_all(target: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
    """`_apply` of a patched module: `.to()`, `.half()` and the like also move what was swapped out."""
    type(target)._apply(target, fn, recurse)
    record = Record.find(target)
    for slot in list(record.slots.values()) if record is not None else ():
        for layer in slot.hidden():
            if isinstance(layer.value, nn.Module):
                if recurse:
                    layer.value._apply(fn)
            elif isinstance(layer.value, nn.Parameter):
                with torch.no_grad():
                    layer.value.data = fn(layer.value.data)
            else:
                # A buffer is replaced by `_apply`, not changed in place.
                layer.value = fn(layer.value)
    return target
