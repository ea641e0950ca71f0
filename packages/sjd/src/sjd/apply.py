"""`apply`: let a model generate with speculative Jacobi decoding, and the handle that takes this back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pared_hooks import ConfigError, Handle, Patch

from sjd.adapters import adapter_of
from sjd.adapters.base import Adapter, is_instance
from sjd.adapters.llamagen import LlamaGen
from sjd.config import SJDConfig
from sjd.doors import door_of
from sjd.session import Session

OWNER = "sjd"


class SJDHandle(Handle):
    """sjd on a model. While it is there, `model.generate()` decodes with it."""

    def __init__(self, patch: Patch, session: Session) -> None:
        super().__init__(patch)
        self.session = session

    @property
    def config(self) -> SJDConfig:
        """The options in use."""
        return self.session.config

    def stats(self) -> dict[str, Any]:
        """What the generations since the last reset did.

        "images": for each, "tokens", forward passes "nfe", their "ratio", and a histogram "committed" of the lengths
        that passes committed; the same over all, "acceptance" of a tested draft by its place in the window, "survival"
        of drafts behind the commit, "ms_per_pass", peak "probability_bytes" of the stored distributions and
        "cache_bytes"; "mode", which is "greedy" where nothing was sampled; "relax_tv_bound", the mean bound of the
        deviation at a position with `relax`, None without.
        """
        return self.session.stats()

    def reset(self) -> None:
        """Forget the statistics, and the rates that `window="auto"` has seen."""
        self.session.reset()


def apply(model: Any, config: SJDConfig | None = None) -> SJDHandle:
    """Let a model, or the autoregressive model of a pipeline, generate with sjd until `handle.remove()`.

    Sets the attribute `generate` of that one object; its modules, weights and class stay as they are. All or nothing.
    Raises `UnsupportedModelError` (a ValueError) for a model that sjd does not know or whose cache cannot take tokens
    back, `AlreadyAppliedError` when sjd is on it already, `ConflictError` when another method decides what its cache
    holds, `ConfigError` for a config that is none.
    """
    config = SJDConfig() if config is None else config
    if not isinstance(config, SJDConfig):
        raise ConfigError(f"config = {config!r} is not valid: an SJDConfig", "config")
    target, adapter = target_of(model)
    session = Session(target, config, adapter)
    with Patch(OWNER) as patch:
        patch.claim(target, "generate")
        patch.claim(adapter.decoder, "decoder.cache")
        # Not before: another method's attention would be refused in place of the method.
        adapter.check()
        patch.wrap_method(target, "generate", door_of(session, target))
    return SJDHandle(patch, session)


@contextmanager
def applied(model: Any, config: SJDConfig | None = None) -> Iterator[SJDHandle]:
    """`apply` for the duration of a `with` block; raises what `apply` raises."""
    with apply(model, config) as handle:
        yield handle


def target_of(model: Any) -> tuple[Any, Adapter]:
    """The object whose `generate` draws the tokens, and its adapter, which `apply` checks."""
    encoder = getattr(model, "vision_language_encoder", None)
    if encoder is not None:
        return encoder, adapter_of(encoder, check=False)
    transformer = getattr(model, "transformer", None)
    if transformer is not None and is_instance(transformer, "LlamaGenTransformer"):
        return transformer, LlamaGen(transformer, model)
    return model, adapter_of(model, check=False)
