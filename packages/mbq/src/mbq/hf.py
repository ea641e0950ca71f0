"""How transformers knows packed models: a quantisation config and a quantizer of the method "pared-mbq"."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from pared_hooks import Patch
from torch import Tensor, nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from mbq.config import MBQConfig
from mbq.errors import ResultMismatchError
from mbq.layers import LayerPlan
from mbq.modules import QuantLinear

METHOD = "pared-mbq"


class PackedConfig(QuantizationConfigMixin):
    """What `config.json` of a packed model says: how it was quantised, and which modules are packed, by name."""

    def __init__(self, mbq: dict[str, Any], modules: Sequence[str], **_: Any) -> None:
        self.quant_method = METHOD
        self.mbq = MBQConfig.from_dict(mbq).to_dict()
        self.modules = list(modules)

    @property
    def config(self) -> MBQConfig:
        """The options that the model was quantised with."""
        return MBQConfig.from_dict(self.mbq)


class PackedQuantizer(HfQuantizer):
    """Puts empty packed layers into a model before its weights are read."""

    requires_calibration = True
    quantization_config: PackedConfig
    written: dict[str, Tensor] | None = None
    """What `save_pretrained` writes in place of the model's own tensors, while an export runs."""

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        config = self.quantization_config.config
        ignored: set[str] = cast(Any, model)._keys_to_ignore_on_load_unexpected
        ignored |= {rf"^{re.escape(name)}$" for name in self._guard()}
        for name in self.quantization_config.modules:
            try:
                linear = model.get_submodule(name)
            except AttributeError:
                raise ResultMismatchError(
                    f"{name} is packed in this checkpoint, and {type(model).__name__} has none"
                ) from None
            if not isinstance(linear, nn.Linear):
                raise ResultMismatchError(f"{name} is packed in this checkpoint, and a {type(linear).__name__} here")
            parent = model.get_submodule(name.rpartition(".")[0])
            parent._modules[name.rpartition(".")[2]] = QuantLinear(
                linear.in_features,
                linear.out_features,
                linear.bias is not None,
                bits=config.w_bits,
                group_size=config.group_size,
                symmetric=config.is_symmetric,
                a_bits=config.a_bits,
                scale_dtype=config.torch_scale_dtype,
                dtype=linear.weight.dtype,
                device="meta",
            )

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for name in self.quantization_config.modules:
            module = model.get_submodule(name)
            assert isinstance(module, QuantLinear)
            module.arrange()
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """The tensors to save: those of an export, or the model's with the guard."""
        return self.written if self.written is not None else model.state_dict() | self._guard(), {}

    def _guard(self) -> dict[str, Tensor]:
        """An empty tensor in the place of a weight.

        Without mbq, transformers warns of a method it does not know and builds linear layers with random weights. That
        this one does not fit makes it raise.
        """
        return {f"{name}.weight": torch.empty(0) for name in self.quantization_config.modules[:1]}

    def is_serializable(self) -> bool:
        """Packed models are saved as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """The packed weights are constants; adapters beside them can be trained."""
        return True

    @property
    def is_compileable(self) -> bool:
        """The kernels are registered operators."""
        return True

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        for name in self.quantization_config.modules:
            packed = model.get_submodule(name)
            assert isinstance(packed, QuantLinear)
            weight = packed.dequantized(dtype or torch.float32)
            linear = nn.Linear(
                packed.in_features, packed.out_features, packed.bias is not None, weight.device, weight.dtype
            )
            linear.weight.data = weight
            if packed.bias is not None:
                linear.bias.data = packed.bias.detach().to(weight)
            model.get_submodule(name.rpartition(".")[0])._modules[name.rpartition(".")[2]] = linear
        return model


# Both registries refuse a name that they have, and this module may be imported again.
if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(METHOD)(PackedConfig)
if METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantizer(METHOD)(PackedQuantizer)


def mark_quantized(root: nn.Module, plans: list[LayerPlan], config: MBQConfig, mode: str, patch: Patch) -> None:
    """Tell transformers what the model is now, so that `save_pretrained` writes it; undone with the patch.

    A fake-quantised model is not labelled as quantised: its configuration carries a note alone.
    """
    model_config = getattr(root, "config", None)
    if model_config is None:
        return
    if mode == "fake":
        patch.set_attribute(model_config, "mbq_fake", config.to_dict(), keeper=root)
        return
    modules = [f"{plan.name}.{name}" for plan in plans for name in plan.linears]
    packed = PackedConfig(config.to_dict(), modules)
    patch.set_attribute(model_config, "quantization_config", packed, keeper=root)
    for name, value in {
        "hf_quantizer": PackedQuantizer(packed),
        "is_quantized": True,
        "quantization_method": METHOD,
    }.items():
        patch.set_attribute(root, name, value)


def from_pretrained(path: str | Path, **options: Any) -> Any:
    """Load a packed model with the class that its `config.json` names; `options` go to its `from_pretrained`.

    Raises ValueError for a folder or repository that holds no packed model of mbq.
    """
    import transformers
    from transformers import PreTrainedConfig

    values, _ = PreTrainedConfig.get_config_dict(path)
    found = values.get("quantization_config", {}).get("quant_method")
    if found != METHOD:
        raise ValueError(f"{path} was quantised by {found!r}; mbq.from_pretrained loads {METHOD!r}")
    name = (values.get("architectures") or ["AutoModelForCausalLM"])[0]
    model_class = getattr(transformers, name, None)
    if model_class is None:
        raise ValueError(f"{path}: transformers has no class {name!r}; load it with its own class after importing mbq")
    return model_class.from_pretrained(path, **options)


def is_packed(path: str | Path) -> bool:
    """Whether a local folder holds a packed model."""
    file = Path(path) / "config.json"
    if not file.is_file():
        return False
    return json.loads(file.read_text()).get("quantization_config", {}).get("quant_method") == METHOD
