"""`export`: a packed model in the formats of other libraries."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from pared_hooks import ConfigError
from pared_hooks.files import write_whole
from torch import Tensor, nn

from mbq.card import write_card
from mbq.config import PER_ROW, MBQConfig
from mbq.functional import pack_dense
from mbq.hf import PackedConfig
from mbq.modules import QuantLinear

Format = Literal["pared-mbq", "compressed-tensors", "gptq", "awq"]
FORMATS = ("pared-mbq", "compressed-tensors", "gptq", "awq")
# Order of the eight 4-bit codes in a word of AWQ's layout.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def export(model: Any, path: str | Path, format: Format = "compressed-tensors") -> Path:
    """Write a packed model (of `quantize`, or loaded) as a folder in another library's format.

    "pared-mbq" is `save_pretrained`. "compressed-tensors" writes the same tensors under another configuration, which
    transformers loads where that package is installed, and vLLM serves. "gptq" (asymmetric or symmetric, 3 or 4 bits or
    another width) and "awq" (4 bits, with zero points) repack the codes; weights alone, 16-bit inputs.

    Raises:
        ConfigError: for an unknown format, or a model that has no form in it, saying why.
    """
    if format not in FORMATS:
        raise ConfigError(f"format = {format!r} is not valid: {', '.join(FORMATS)}", "format")
    packed = getattr(getattr(model, "config", None), "quantization_config", None)
    if not isinstance(packed, PackedConfig):
        raise ConfigError(f"{type(model).__name__} is not packed by mbq; export what mbq.quantize has packed", "model")
    config, folder = packed.config, Path(path)
    if format == "pared-mbq":
        model.save_pretrained(folder)
        write_card(folder, packed, format)
        return folder
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    state = dict(model.state_dict())
    if format == "compressed-tensors":
        _save(model, folder, state, compressed_tensors_config(config, linears), format)
        return folder
    _require_weight_only(config, format)
    for name in packed.modules:
        module = model.get_submodule(name)
        assert isinstance(module, QuantLinear)
        for key in ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape"):
            state.pop(f"{name}.{key}", None)
        tensors = gptq_tensors(module) if format == "gptq" else awq_tensors(module)
        state |= {f"{name}.{key}": value for key, value in tensors.items()}
    theirs = gptq_config(config) if format == "gptq" else awq_config(config, linears)
    _save(model, folder, state, theirs, format)
    return folder


def _save(model: Any, folder: Path, state: dict[str, Tensor], quantization: dict[str, Any], format: Format) -> None:
    """Write `state` with the model's configuration and another `quantization_config`."""
    model.hf_quantizer.written = state
    try:
        model.save_pretrained(folder)
    finally:
        model.hf_quantizer.written = None
    file = folder / "config.json"
    values = json.loads(file.read_text(encoding="utf-8")) | {"quantization_config": quantization}
    write_whole(file, json.dumps(values, indent=2) + "\n")
    write_card(folder, model.config.quantization_config, format)


def compressed_tensors_config(config: MBQConfig, ignored: list[str]) -> dict[str, Any]:
    """The `quantization_config` of compressed-tensors for the same tensors; `ignored` names the layers left alone."""
    per_row = config.group_size == PER_ROW
    weights = {
        "num_bits": config.w_bits,
        "type": "int",
        "symmetric": config.is_symmetric,
        "strategy": "channel" if per_row else "group",
        "group_size": None if per_row else config.group_size,
        "dynamic": False,
        "observer": "minmax",
    }
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ignored,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": inputs if config.a_bits == 8 else None,
                "output_activations": None,
                # Without it, weights with 8-bit inputs are taken for unpacked ones.
                "format": "pack-quantized",
            }
        },
    }


def gptq_config(config: MBQConfig) -> dict[str, Any]:
    """The `quantization_config` of GPTQ.

    The first version stores zero points less one, so that it cannot hold a zero point of zero; weights with zero points
    are in the second, which stores them as they are.
    """
    return {
        "quant_method": "gptq",
        "bits": config.w_bits,
        "group_size": config.group_size,
        "sym": config.is_symmetric,
        "desc_act": False,
        "checkpoint_format": "gptq" if config.is_symmetric else "gptq_v2",
    }


def awq_config(config: MBQConfig, ignored: list[str]) -> dict[str, Any]:
    """The `quantization_config` of AWQ."""
    return {
        "quant_method": "awq",
        "bits": config.w_bits,
        "group_size": config.group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ignored,
    }


def gptq_tensors(module: QuantLinear) -> dict[str, Tensor]:
    """`qweight` (K * bits / 32, N), `qzeros` (G, N * bits / 32), `scales` (G, N) float16, `g_idx` (K,).

    Zero points are those of the format that `gptq_config` names.
    """
    if module.out_features % 32:
        raise ConfigError(f"format = 'gptq' is not valid: {module.out_features} output channels are no multiple of 32")
    zeros = _zero_codes(module).T
    stored = zeros - 1 if module.symmetric else zeros
    groups = module.in_features // module.group_size
    return {
        "qweight": module.packed.T.contiguous(),
        "qzeros": pack_dense(stored.contiguous(), module.bits),
        "scales": module.weight_scale.T.contiguous().half(),
        "g_idx": torch.arange(groups, dtype=torch.int32).repeat_interleave(module.group_size),
    }


def awq_tensors(module: QuantLinear) -> dict[str, Tensor]:
    """`qweight` (K, N / 8) and `qzeros` (G, N / 8) with AWQ's order of codes in a word, `scales` (G, N) float16."""
    if module.out_features % 8:
        raise ConfigError(f"format = 'awq' is not valid: {module.out_features} output channels are no multiple of 8")
    weight = module.quantized_weight()

    def words(codes: Tensor) -> Tensor:
        return pack_dense(codes.unflatten(1, (-1, 8))[..., list(AWQ_ORDER)].flatten(1), 4)

    return {
        "qweight": words(weight.codes.T.contiguous()),
        "qzeros": words(_zero_codes(module).T.contiguous()),
        "scales": module.weight_scale.T.contiguous().half(),
    }


def _zero_codes(module: Any) -> Tensor:
    """Zero points (N, G), those of symmetric codes written out."""
    weight = module.quantized_weight()
    if weight.zeros is not None:
        return weight.zeros
    return torch.full(weight.scales.shape, 2 ** (weight.bits - 1), dtype=torch.uint8, device=weight.scales.device)


def _require_weight_only(config: MBQConfig, format: str) -> None:
    if config.a_bits != 16:
        raise ConfigError(f"format = {format!r} is not valid for 8-bit inputs; use 'compressed-tensors'", "format")
    if format == "awq" and (config.w_bits != 4 or config.is_symmetric):
        raise ConfigError("format = 'awq' is not valid: it holds 4 bits with zero points alone", "format")


def size_on_disk(model: Any) -> int:
    """Bytes of the weight files that `save_pretrained` writes for a model."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
