"""Weight and bias of a projection, also of one that keeps its weight in a quantised or otherwise unusual form."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cskv.errors import UnsupportedAttentionError


def linear_map(projection: nn.Module, in_features: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Weight (d_out, d_in) and bias (d_out,) or None of the affine map that `projection` computes.

    A plain `nn.Linear` is read. Anything else (quantised weights, adapters on top) is applied to the unit vectors in
    `dtype`, that of the hidden states: what quantised weights are stored in says nothing of it.
    Raises `UnsupportedAttentionError` for weights that are not loaded.
    """
    parameters = [*projection.parameters(), *projection.buffers()]
    if any(parameter.device.type == "meta" for parameter in parameters):
        raise UnsupportedAttentionError(
            f"{type(projection).__name__} has weights on the meta device, as offloaded models do; load them to a device"
        )
    weight = getattr(projection, "weight", None)
    if type(projection) is nn.Linear and weight is not None and weight.is_floating_point():
        bias = projection.bias
        return weight.detach(), None if bias is None else bias.detach()
    device = parameters[0].device if parameters else None
    with torch.no_grad():
        offset = projection(torch.zeros(1, in_features, dtype=dtype, device=device))[0]
        unit = torch.eye(in_features, dtype=dtype, device=device)
        weight = (projection(unit) - offset).T.contiguous()
    return weight, offset if bool((offset != 0).any()) else None
