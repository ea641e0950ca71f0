"""`Patch`: a set of changes to a model that is made as a whole and can be taken back in any order."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import TracebackType
from typing import Any

from torch import nn

from pared_hooks import _attention, _model_hooks
from pared_hooks._record import Claim, Layer, Record, Slot
from pared_hooks.errors import AlreadyAppliedError, ConflictError, ParedError

_TORCH_HOOKS = {
    "forward_pre": "register_forward_pre_hook",
    "forward": "register_forward_hook",
    "full_backward_pre": "register_full_backward_pre_hook",
    "full_backward": "register_full_backward_hook",
    "state_dict_pre": "register_state_dict_pre_hook",
    "state_dict": "register_state_dict_post_hook",
    "load_state_dict_pre": "register_load_state_dict_pre_hook",
    "load_state_dict": "register_load_state_dict_post_hook",
}


class Patch:
    """A reversible set of changes made by one method, the `owner`.

    Inside `with patch:` the changes are all or nothing: an exception undoes those made since entering. After that the
    patch stays until `remove()`, which restores the model bit for bit whatever other patches came and went meanwhile.
    """

    def __init__(self, owner: str) -> None:
        if not isinstance(owner, str) or not owner:
            raise ParedError(f"owner = {owner!r} is not valid: the name of the method that patches")
        self.owner = owner
        self.removed = False
        self._undo: list[Callable[[], None]] = []
        self._savepoints: list[int] = []

    def __enter__(self) -> Patch:
        self._check_open()
        self._savepoints.append(len(self._undo))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        savepoint = self._savepoints.pop()
        if error is not None:
            self._unwind(savepoint)
            self.removed = not self._undo

    def claim(self, module: nn.Module, site: str, exclusive: bool = True) -> None:
        """Reserve a named site of a module, such as "denoiser.skip", or share it with `exclusive=False`.

        Raises `AlreadyAppliedError` when another patch of the same owner holds the site, and `ConflictError` naming
        both owners when another method does and one of the two wants it alone.
        """
        self._check_open()
        _require_module("module", module)
        record = Record.find(module)
        for claim in record.claims if record is not None else ():
            if claim.site != site or claim.patch is self:
                continue
            where = f"{site!r} of {type(module).__name__}"
            if claim.owner == self.owner:
                raise AlreadyAppliedError(f"{self.owner} is already applied to {where}; remove its handle first")
            if exclusive or claim.exclusive:
                raise ConflictError(
                    f"{self.owner} and {claim.owner} both need {where} and cannot share it; remove one of the two"
                )
        record = Record.of(module)
        claim = Claim(self.owner, site, exclusive, self)
        record.claims.append(claim)
        self._on_undo(record, lambda: record.claims.remove(claim))

    def wrap_forward(self, module: nn.Module, wrapper: Callable[..., Any]) -> None:
        """Call `wrapper(original_forward, *args, **kwargs)` in place of `module.forward`; the newest is outermost."""
        self._check_open()
        _require_module("module", module)
        _require_callable("wrapper", wrapper)
        record, layer = Record.of(module), Layer(wrapper)
        chain = record.wrap_forward(layer)
        self._on_undo(record, lambda: record.unwrap_forward(chain, layer))

    def wrap_method(self, target: Any, name: str, wrapper: Callable[..., Any]) -> None:
        """Call `wrapper(original_method, *args, **kwargs)` in place of `target.name`; the newest is outermost.

        `target` is a module or any other object with a `__dict__`, such as a scheduler (`step`) or a VAE (`decode`).
        Raises `ParedError` when it has no such method.
        """
        self._check_open()
        if name == "forward" and isinstance(target, nn.Module):
            self.wrap_forward(target, wrapper)
            return
        _require_callable("wrapper", wrapper)
        known = hasattr(type(target), name) or name in getattr(target, "__dict__", {})
        if not known or not callable(getattr(target, name)):
            raise ParedError(f"name = {name!r} is not valid: a method of {type(target).__name__}")
        self._lay(target, name, wrapper, push=Record.push_wrapper)

    def set_attribute(self, target: Any, name: str, value: Any, *, keeper: nn.Module | None = None) -> None:
        """Set an attribute, parameter or buffer; of several patches that set the same one, the last still applied wins.

        `keeper` is the module that remembers the change for a `target` that cannot carry notes itself: a config,
        whose attributes are all written out by `save_pretrained`. Raises `ParedError` for such a target without it.
        """
        self._check_open()
        if isinstance(target, nn.Module) and (name in target._modules or isinstance(value, nn.Module)):
            raise ParedError(f"{name!r} of {type(target).__name__} is a submodule: use swap_module or add_module")
        if isinstance(target, nn.Module) and name == "forward":
            raise ParedError(f"{name!r} of {type(target).__name__} is not set but wrapped: use wrap_forward")
        self._lay(target, name, value, keeper)

    def swap_module(self, parent: nn.Module, name: str, new: nn.Module) -> None:
        """Put `new` in the place of the direct child `name`; the old child follows `.to()` while it is out."""
        self._check_open()
        if parent._modules.get(name) is None:
            children = ", ".join(parent._modules) or "none"
            raise ParedError(f"name = {name!r} is not valid: a child of {type(parent).__name__} ({children})")
        _require_module("new", new)
        self._lay(parent, name, new)

    def add_module(self, parent: nn.Module, name: str, new: nn.Module) -> None:
        """Register `new` as a child under a name that `parent` does not have yet."""
        self._check_open()
        if hasattr(parent, name) or not name or "." in name:
            raise ParedError(f"name = {name!r} is not valid: a name that {type(parent).__name__} does not have yet")
        _require_module("new", new)
        self._lay(parent, name, new)

    def set_processor(self, attention: nn.Module, processor: Any) -> None:
        """Set the attention processor of a diffusers attention module."""
        self._check_open()
        if not hasattr(attention, "set_processor") or not hasattr(attention, "processor"):
            raise ParedError(f"attention: {type(attention).__name__} has no attention processor")
        if not callable(processor):
            raise ParedError(f"processor = {processor!r} is not valid: an attention processor is callable")
        self._lay(attention, "processor", processor)

    def add_hook(
        self,
        module: nn.Module,
        kind: str,
        hook: Callable[..., Any],
        *,
        with_kwargs: bool = False,
        prepend: bool = False,
    ) -> None:
        """Register a torch hook: "forward_pre", "forward", "full_backward", "state_dict" and their siblings.

        `with_kwargs` (forward hooks) also hands the hook the keyword arguments; `prepend` runs it before the others.
        """
        self._check_open()
        _require_module("module", module)
        _require_callable("hook", hook)
        if kind not in _TORCH_HOOKS:
            raise ParedError(f"kind = {kind!r} is not valid: one of {', '.join(_TORCH_HOOKS)}")
        options: dict[str, bool] = {}
        if kind.startswith("forward"):
            options = {"with_kwargs": with_kwargs, "prepend": prepend}
        elif with_kwargs or (prepend and "dict" in kind):
            raise ParedError(f"with_kwargs and prepend are not available for {kind!r} hooks")
        elif prepend:
            options = {"prepend": True}
        record = Record.of(module)
        if not record.hook_ids:
            record.full_backward = module._is_full_backward_hook
        handle = getattr(module, _TORCH_HOOKS[kind])(hook, **options)
        record.hook_ids.append(handle.id)

        def undo() -> None:
            handle.remove()
            record.hook_ids.remove(handle.id)
            if not module._backward_hooks:
                module._is_full_backward_hook = record.full_backward

        self._on_undo(record, undo)

    def add_model_hook(self, module: nn.Module, hook: Any, name: str, *, root: nn.Module | None = None) -> None:
        """Register a `diffusers.hooks.ModelHook`; unlike diffusers' own removal, ours works in any order.

        `root` is the denoiser that `module` belongs to; give it for a stateful hook, so that `root.cache_context`
        finds it. Raises `ParedError` when the module already has a hook of this name.
        """
        self._check_open()
        _require_module("module", module)
        record = Record.of(module)
        try:
            installed = _model_hooks.install(record, hook, name, root)
        except BaseException:
            record.release()
            raise
        self._on_undo(record, functools.partial(_model_hooks.uninstall, record, installed))

    def set_attention(
        self, model: nn.Module, name: str, attention: Callable[..., Any], mask: Callable[..., Any]
    ) -> str:
        """Register a transformers attention function with its mask function and let `model` use them.

        Returns the name they are registered under: `name`, with a number added when it is taken. `mask` builds the
        attention mask as `transformers.masking_utils.sdpa_mask` does. Raises `UnsupportedModelError` when the model,
        or one of its parts, does not take attention from the interface.
        """
        self._check_open()
        registered = _attention.register(model, name, attention, mask)
        self._undo.append(functools.partial(_attention.unregister, registered))
        for config, value in _attention.switch(model, registered):
            self._lay(config, "_attn_implementation_internal", value, model)
        return registered.name

    def on_remove(self, function: Callable[[], None]) -> None:
        """Call `function` when the patch is removed, after everything that was changed later has been restored."""
        self._check_open()
        self._undo.append(function)

    def remove(self) -> None:
        """Undo everything, newest first; a second call does nothing."""
        if self.removed:
            return
        self.removed = True
        self._unwind(0)

    def _lay(
        self,
        target: Any,
        name: str,
        value: Any,
        keeper: nn.Module | None = None,
        push: Callable[[Record, Any, str, Any], tuple[Slot, Layer]] = Record.push,
    ) -> None:
        if keeper is None and (hasattr(target, "to_dict") or not hasattr(target, "__dict__")):
            raise ParedError(f"{type(target).__name__} cannot remember the change itself: pass keeper=<its model>")
        record = Record.of(keeper if keeper is not None else target)
        try:
            slot, layer = push(record, target, name, value)
        except BaseException:
            record.release()
            raise
        self._on_undo(record, lambda: record.pop(slot, layer))

    def _on_undo(self, record: Record, undo: Callable[[], None]) -> None:
        def undo_and_release() -> None:
            undo()
            record.release()

        self._undo.append(undo_and_release)

    def _unwind(self, savepoint: int) -> None:
        errors: list[Exception] = []
        while len(self._undo) > savepoint:
            try:
                self._undo.pop()()
            except Exception as error:
                errors.append(error)
        if errors:
            raise ExceptionGroup(f"{self.owner}: the model could not be restored completely", errors)

    def _check_open(self) -> None:
        if self.removed:
            raise ParedError(f"this patch of {self.owner} has been removed; make a new one")

    def __repr__(self) -> str:
        return f"<Patch of {self.owner}: {'removed' if self.removed else f'{len(self._undo)} changes'}>"


def _require_module(name: str, value: object) -> None:
    if not isinstance(value, nn.Module):
        raise ParedError(f"{name} = {value!r} is not valid: an nn.Module")


def _require_callable(name: str, value: object) -> None:
    if not callable(value):
        raise ParedError(f"{name} = {value!r} is not valid: something to call")
