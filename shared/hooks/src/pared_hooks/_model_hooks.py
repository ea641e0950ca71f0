"""Registering diffusers `ModelHook`s so that they come off in any order and leave nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from pared_hooks._record import Record
from pared_hooks.errors import ParedError


@dataclass(eq=False)
class Installed:
    hook: Any
    name: str
    forward: Callable[..., Any]
    root: nn.Module | None


def install(record: Record, hook: Any, name: str, root: nn.Module | None) -> Installed:
    from diffusers.hooks import HookRegistry

    module = record.target
    record.remember_forward()
    had_registry = "_diffusers_hook" in module.__dict__
    registry = HookRegistry.check_if_exists_or_initialize(module)
    if name in registry.hooks:
        raise ParedError(f"name = {name!r} is not valid: {type(module).__name__} already has a model hook of that name")
    registry.register_hook(hook, name)
    record.owns_registry = record.owns_registry or not had_registry
    installed = Installed(hook, name, module.__dict__["forward"], root)
    record.model_hooks.append(installed)
    _forget_cached_registries(registry, root)
    return installed


def uninstall(record: Record, installed: Installed) -> None:
    # `HookRegistry.remove_hook` loses the forward wrappers and the `new_forward` of hooks registered later.
    module, hook = record.target, installed.hook
    registry = module.__dict__["_diffusers_hook"]
    reference = hook.fn_ref
    below = reference.original_forward if reference.original_forward is not None else reference.forward
    record.model_hooks.remove(installed)
    if registry.hooks.get(installed.name) is hook:
        index = registry._hook_order.index(installed.name)
        del registry.hooks[installed.name], registry._hook_order[index], registry._fn_refs[index]
        hook.deinitalize_hook(module)
    record.relink(installed.forward, below)
    # A wrapper of somebody else's may still call the hook's forward, which from here on only passes through.
    reference.pre_forward = lambda module, *args, **kwargs: (args, kwargs)
    reference.post_forward = lambda module, output: output
    reference.forward = below
    _forget_cached_registries(registry, installed.root)
    if record.owns_registry and not registry.hooks:
        del module.__dict__["_diffusers_hook"]
        record.owns_registry = False
    record.tidy_forward()


def _forget_cached_registries(registry: Any, root: nn.Module | None) -> None:
    registry._child_registries_cache = None
    above = root.__dict__.get("_diffusers_hook") if root is not None else None
    if above is not None:
        above._child_registries_cache = None
