"""A plan spelled out with masks, on the model's own code: what every replay is compared with."""

from __future__ import annotations

import itertools

import torch
from ditfastattn2 import functional as f
from torch.nn.functional import scaled_dot_product_attention


class Spelled(torch.overrides.TorchFunctionMode):
    """The method spelled out: every joint attention under the mask of its heads, outputs of the step before copied."""

    def __init__(self, plan, tiny, branches=("cond",)):
        super().__init__()
        self.plan, self.branches = plan, branches
        self.calls = itertools.count()
        self.before = {}
        self.text_first = plan.layers[0].text == "first"

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is not scaled_dot_product_attention:
            return function(*args, **kwargs)
        named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        q, k, v = (named[name] for name in ("query", "key", "value"))
        if q.shape[2] != k.shape[2] or q.shape[2] < self.plan.num_vision:
            return function(*args, **kwargs)
        layers = len(self.plan.layers)
        number = next(self.calls)
        layer, branch = number % layers, self.branches[number // layers % len(self.branches)]
        step = number // (layers * len(self.branches))
        methods = self.plan.methods(self.plan.branch_for(branch), step, layer)
        text = q.shape[2] - self.plan.num_vision
        mask = torch.ones(q.shape[0], len(methods), q.shape[2], q.shape[2], dtype=torch.bool, device=q.device)
        for head, method in enumerate(methods):
            if method.kind == "arrow":
                window, block = method.window(self.plan.num_vision), self.plan.config.block
                blocks = f.arrow_block_map(self.plan.num_vision, text, window, self.text_first, block)
                place = torch.arange(q.shape[2])
                mask[:, head] = blocks[(place // block[0])[:, None], (place // block[1])[None, :]]
        if named.get("attn_mask") is not None:
            mask &= named["attn_mask"]
        out = function(q, k, v, attn_mask=mask, scale=named.get("scale"))
        for head, method in enumerate(methods):
            if method.kind == "cached":
                out[:, head] = self.before[layer, branch][:, head]
        self.before[layer, branch] = out.clone()
        return out
