"""Speculative Jacobi decoding for autoregressive image generators (arXiv 2410.01699)."""

from __future__ import annotations

# `sjd.apply` and `sjd.decode` are functions: these imports rebind the names that importing the submodules binds.
from sjd.adapters import Adapter, register_adapter
from sjd.adapters.chameleon import lumina_grammar
from sjd.apply import SJDHandle, applied, apply
from sjd.cache import RaggedCache
from sjd.config import SJDConfig, preset
from sjd.decode import decode
from sjd.errors import GrammarError
from sjd.grammar import ImageGrammar
from sjd.images import generate_images
from sjd.progress import Progress

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "GrammarError",
    "ImageGrammar",
    "Progress",
    "RaggedCache",
    "SJDConfig",
    "SJDHandle",
    "applied",
    "apply",
    "decode",
    "generate_images",
    "lumina_grammar",
    "preset",
    "register_adapter",
]
