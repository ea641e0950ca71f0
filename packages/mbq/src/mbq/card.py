"""The README.md beside packed weights: what they are, and how to load them."""

from __future__ import annotations

from pathlib import Path

from pared_hooks.files import write_whole

from mbq.config import PER_ROW
from mbq.hf import PackedConfig

LOADING = {
    "pared-mbq": """```python
import mbq  # registers the method with transformers; pip install mbq

model = mbq.from_pretrained("this folder")  # or from_pretrained of the model's class, once mbq is imported
```

Without `import mbq`, transformers warns "Unknown quantization type, got pared-mbq", and then ends with "You set
`ignore_mismatched_sizes` to `False`, thus raising an error". Do not set it to True: the linear layers would be random.
""",
    "compressed-tensors": "transformers loads it where compressed-tensors is installed; vLLM serves it.\n",
    "gptq": "GPTQModel loads it, and transformers where gptqmodel and optimum are installed.\n",
    "awq": "transformers loads it where gptqmodel is installed.\n",
}
# By this a card that is to be written anew is told from one that somebody wrote.
TAG = "tags: [mbq, quantized]"


def card(packed: PackedConfig, format: str) -> str:
    """The text of the card for a model in one of the formats of `mbq.export`."""
    config = packed.config
    scales = "one scale a row" if config.group_size == PER_ROW else f"groups of {config.group_size}"
    kind = "symmetric" if config.is_symmetric else "with zero points"
    inputs = ", inputs rounded to 8 bits as they come" if config.a_bits == 8 else ""
    return f"""---
library_name: transformers
{TAG}
---
# Quantised with mbq

{len(packed.modules)} linear layers of the language model hold weights of {config.w_bits} bits, {scales},
{kind}{inputs}. All else (vision tower, projector, embeddings, language head) is as it was. Scales were found by the
method "{config.method}"; `config.json` tells the options and the layers. Format: {format}.

## Loading

{LOADING[format]}"""


def write_card(folder: Path, packed: PackedConfig, format: str) -> None:
    """Write README.md into `folder`, unless there is one that is not by mbq."""
    file = folder / "README.md"
    if not file.is_file() or TAG in file.read_text(encoding="utf-8"):
        write_whole(file, card(packed, format))
