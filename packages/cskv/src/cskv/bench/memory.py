"""Bytes of caches: of the tensors they hold, and of the process, for as many tokens as asked for."""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from typing import Any

import torch
from pared_hooks import DecoderView
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from cskv.apply import CSKVHandle, apply
from cskv.bench.full_size import llama
from cskv.cache import CSKVLayer
from cskv.config import CSKVConfig

PAGE = 4096
CHUNK = 512
M_MMAP_THRESHOLD = -3
"""Parameter number of glibc's mallopt."""


def tensor_bytes(root: Any) -> int:
    """Bytes of all distinct tensor storages reachable from a cache; modules and configurations are not followed."""
    storages: dict[int, int] = {}
    seen: set[int] = set()
    pending = [root]
    while pending:
        one = pending.pop()
        if id(one) in seen or isinstance(one, torch.nn.Module | type):
            continue
        seen.add(id(one))
        if is_traceable_wrapper_subclass(one):
            # A quantised tensor of another library: what it wraps is what is stored.
            pending += [getattr(one, name) for name in one.__tensor_flatten__()[0]]
        elif isinstance(one, torch.Tensor):
            storages[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
        elif isinstance(one, dict):
            pending += one.values()
        elif isinstance(one, list | tuple):
            pending += one
        elif type(one).__module__.startswith(("cskv.", "transformers.cache_utils")) and not _shared(one):
            pending += vars(one).values()
    return sum(storages.values())


def _shared(one: Any) -> bool:
    """Whether an object belongs to the model or its handle rather than to a cache."""
    return type(one).__name__ in ("LayerSpec", "Applied", "CSKVConfig", "LayerPlan")


@torch.no_grad()
def fill(model: Any, cache: Any, tokens: int, dtype: torch.dtype, seed: int = 0) -> None:
    """Add `tokens` random keys and values of the model's shapes to a cache, in chunks, as prompts would."""
    view = DecoderView.of(model)
    heads, head_dim = view.num_key_value_heads, view.head_dim
    generator = torch.Generator().manual_seed(seed)
    past = cache.get_seq_length()
    for begin in range(past, past + tokens, CHUNK):
        count = min(CHUNK, past + tokens - begin)
        angle = torch.randn(1, count, head_dim // 2, generator=generator)
        cos, sin = (torch.cat((one, one), -1).to(dtype) for one in (angle.cos(), angle.sin()))
        for index, layer in enumerate(cache.layers):
            if isinstance(layer, CSKVLayer):
                hidden = torch.randn(1, count, view.hidden_size, generator=generator).to(dtype)
                mask = torch.ones(1, 1, count, begin + count, dtype=torch.bool)
                layer.stage(hidden, cos, sin, mask, "sdpa")
            keys, values = (torch.randn(1, heads, count, head_dim, generator=generator).to(dtype) for _ in range(2))
            cache.update(keys, values, index)


def cache_of(model: Any, config: CSKVConfig | None) -> tuple[Any, CSKVHandle | None]:
    """An empty full cache without a configuration, else one of CSKV with factors of the weights alone."""
    from transformers import DynamicCache

    if config is None:
        return DynamicCache(config=model.config), None
    handle = apply(model, config.replace(init="svd"))
    return handle.new_cache(), handle


def resident_bytes(shapes: dict[str, int], config: CSKVConfig | None, tokens: int) -> int:
    """Growth of the resident memory of a fresh process when it fills such a cache in bfloat16; Linux alone.

    Raises RuntimeError with the process's own words when it fails.
    """
    task = {"shapes": shapes, "config": None if config is None else config.to_dict(), "tokens": tokens}
    result = subprocess.run(
        [sys.executable, "-m", "cskv.bench.memory"], input=json.dumps(task), capture_output=True, text=True, check=False
    )
    if result.returncode != 0:
        raise RuntimeError(f"measuring resident memory failed: {result.stderr.strip()[-500:]}")
    return int(result.stdout.split()[-1])


def _resident() -> int:
    gc.collect()
    # Freed memory is given back first, so that what is counted is what is held.
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * PAGE


def _main() -> None:
    task = json.loads(sys.stdin.read())
    model = llama(task["shapes"], torch.bfloat16)
    config = None if task["config"] is None else CSKVConfig.from_dict(task["config"])
    warm, _keep = cache_of(model, config)
    # As long as what is measured: libraries keep scratch memory of the largest product they have seen.
    fill(model, warm, task["tokens"], torch.bfloat16)
    del warm
    if _keep is not None:
        _keep.remove()
    cache, _keep = cache_of(model, config)
    # From here on every tensor gets pages of its own: what the allocator keeps of freed ones is not what a cache holds.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 16 * PAGE)
    before = _resident()
    fill(model, cache, task["tokens"], torch.bfloat16)
    print(_resident() - before)


if __name__ == "__main__":
    _main()
