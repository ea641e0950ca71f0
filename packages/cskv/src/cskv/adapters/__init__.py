"""What CSKV needs to know of an attention module."""

from cskv.adapters.attention import AttentionAdapter, adapters_of, attention_function

__all__ = ["AttentionAdapter", "adapters_of", "attention_function"]
