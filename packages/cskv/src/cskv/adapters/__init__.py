"""What CSKV needs to know of an attention module."""

from cskv.adapters.attention import AttentionAdapter, adapters_of

__all__ = ["AttentionAdapter", "adapters_of"]
