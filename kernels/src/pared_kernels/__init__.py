"""Triton kernels with plain references, CPU paths and one dispatch, shared by the pared packages."""

__version__ = "0.1.0"
