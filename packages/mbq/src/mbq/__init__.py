"""Modality-balanced quantization of vision-language models to 3 and 4 bits, packed (MBQ, arXiv 2412.19509).

Importing it registers the quantisation method "pared-mbq" with transformers, whose `from_pretrained` then loads packed
models.
"""

from __future__ import annotations

# `mbq.calibrate` and `mbq.quantize` are functions: these imports rebind the names that importing the submodules binds.
from mbq.calibrate import calibrate
from mbq.config import MBQConfig
from mbq.data import load_batches
from mbq.errors import (
    AlreadyQuantizedError,
    CalibrationError,
    FoldError,
    RestoreUnavailableError,
    ResultMismatchError,
    UnsupportedLayerError,
)
from mbq.export import export
from mbq.hf import PackedConfig, PackedQuantizer, from_pretrained
from mbq.modules import FakeQuantLinear, QuantLinear
from mbq.quantize import MBQHandle, apply, quantize
from mbq.result import MBQResult, ScaleGroup

__version__ = "0.1.0"

__all__ = [
    "AlreadyQuantizedError",
    "CalibrationError",
    "FakeQuantLinear",
    "FoldError",
    "MBQConfig",
    "MBQHandle",
    "MBQResult",
    "PackedConfig",
    "PackedQuantizer",
    "QuantLinear",
    "RestoreUnavailableError",
    "ResultMismatchError",
    "ScaleGroup",
    "UnsupportedLayerError",
    "__version__",
    "apply",
    "calibrate",
    "export",
    "from_pretrained",
    "load_batches",
    "quantize",
]
