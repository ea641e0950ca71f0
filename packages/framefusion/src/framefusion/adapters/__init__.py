"""What FrameFusion knows of single model families: how a prompt shows its videos, and layers of their own kind."""

from __future__ import annotations

from framefusion.adapters import frames_as_images, gemma4, llava, qwen_vl, video_llama3, video_token_runs  # noqa: F401 (register)
from framefusion.adapters.base import RESOLVERS, Resolver, find_resolver, resolver

__all__ = ["RESOLVERS", "Resolver", "find_resolver", "resolver"]
