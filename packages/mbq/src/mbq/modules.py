"""What takes the place of `nn.Linear`: packed weights with kernels, or rounded weights for research."""

from __future__ import annotations

from typing import Any

import torch
from pared_kernels import (
    mbq_linear_tiled,
    mbq_linear_w4a8,
    mbq_linear_w16,
    mbq_tile,
    mbq_tiling_unsupported,
    mbq_untile,
)
from pared_kernels.bitstream import words
from torch import Tensor, nn

from mbq.functional import (
    QuantizedWeight,
    dequantize_weight,
    fake_quantize_activation,
    pack_dense,
    unpack_dense,
)


class QuantLinear(nn.Module):
    """A linear layer that stores its weight packed, in the layout of compressed-tensors.

    Buffers: `weight_packed` int32 (N, K * bits / 32), `weight_scale` (N, G) in its stored dtype, `weight_zero_point`
    int32 (ceil(N * bits / 32), G) unless symmetric, `weight_shape` int64 (2,); `bias` is a frozen parameter. The
    gradient flows to the input.

    For bfloat16 on a CPU `arrange` puts the bytes of `weight_packed` into the blocks that torch's product reads; state
    dictionaries, pickles and other devices get the stored layout.
    """

    weight_packed: Tensor
    weight_scale: Tensor
    weight_shape: Tensor
    steps: Tensor | None
    """Scales and offsets of a weight in blocks, bfloat16; None in the stored layout."""
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        *,
        bits: int,
        group_size: int,
        symmetric: bool,
        a_bits: int = 16,
        scale_dtype: torch.dtype = torch.float16,
        dtype: torch.dtype | None = None,
        device: Any = None,
    ) -> None:
        super().__init__()
        if in_features % 32:
            raise ValueError(f"in_features = {in_features} is not valid: a multiple of 32 to be packed")
        size = in_features if group_size == -1 else group_size
        if in_features % size or size % 32:
            raise ValueError(f"group_size = {group_size} is not valid: a divisor of {in_features}, a multiple of 32")
        if a_bits == 8 and not (bits == 4 and symmetric and size == in_features):
            raise ValueError("a_bits = 8 is not valid here: the integer kernel takes symmetric 4-bit rows")
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group_size, self.symmetric, self.a_bits = bits, size, symmetric, a_bits
        #: The dtype that inputs are expected in.
        self.dtype = torch.get_default_dtype() if dtype is None else dtype
        groups = in_features // size
        # Scales carry their dtype explicitly: one that a loader may choose would round them again.
        shapes = {
            "weight_packed": ((out_features, words(in_features, bits)), torch.int32),
            "weight_scale": ((out_features, groups), scale_dtype),
            "weight_zero_point": ((words(out_features, bits), groups), torch.int32),
            "weight_shape": ((2,), torch.int64),
        }
        for name, (shape, kind) in shapes.items():
            if name != "weight_zero_point" or not symmetric:
                self.register_buffer(name, torch.empty(shape, dtype=kind, device=device))
        self.register_buffer("steps", None, persistent=False)
        parameter = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        self.register_parameter("bias", None if parameter is None else nn.Parameter(parameter, requires_grad=False))

    @classmethod
    def pack(cls, weight: QuantizedWeight, bias: Tensor | None, a_bits: int, dtype: torch.dtype) -> QuantLinear:
        """Pack a quantised weight; `dtype` is that of the bias, and that inputs are expected in."""
        rows, columns = weight.codes.shape
        module = cls(
            columns,
            rows,
            bias is not None,
            bits=weight.bits,
            group_size=weight.group_size,
            symmetric=weight.symmetric,
            a_bits=a_bits,
            scale_dtype=weight.scales.dtype,
            dtype=dtype,
            device=weight.codes.device,
        )
        module.weight_packed = pack_dense(weight.codes, weight.bits)
        module.weight_scale = weight.scales.detach().clone()
        if weight.zeros is not None:
            module.weight_zero_point = pack_dense(weight.zeros, weight.bits, dim=0)
        module.weight_shape = torch.tensor([rows, columns], device=weight.codes.device)
        if bias is not None:
            module.bias = nn.Parameter(bias.detach().to(dtype, copy=True), requires_grad=False)
        module.arrange()
        return module

    def arrange(self) -> None:
        """Lay the weight out for `dtype` and the device: in blocks for bfloat16 on a CPU, else as it is stored."""
        fits = self.a_bits == 16 and self.dtype == torch.bfloat16 and self.weight_packed.device.type == "cpu"
        if fits and mbq_tiling_unsupported(self.out_features, self.bits, self.group_size) is None:
            if self.steps is None:
                self.weight_packed, self.steps = mbq_tile(
                    self.weight_packed, self.weight_scale, self.zero_points, self.bits, self.group_size
                )
        else:
            self.weight_packed, self.steps = self.packed, None

    @property
    def packed(self) -> Tensor:
        """The weight as it is stored, int32 (N, K * bits / 32)."""
        if self.steps is None:
            return self.weight_packed
        return mbq_untile(self.weight_packed, self.steps, self.bits, self.group_size, self.in_features)

    @property
    def stored_bytes(self) -> int:
        """Bytes of codes, scales and zero points as they are stored."""
        zeros = self.zero_points
        codes = 4 * self.out_features * words(self.in_features, self.bits)
        return codes + self.weight_scale.nbytes + (0 if zeros is None else zeros.nbytes)

    def quantized_weight(self) -> QuantizedWeight:
        """Codes, scales and zero points, unpacked."""
        zeros = self.zero_points
        return QuantizedWeight(
            unpack_dense(self.packed, self.bits, self.in_features),
            self.weight_scale,
            None if zeros is None else unpack_dense(zeros, self.bits, self.out_features, dim=0),
            self.bits,
            self.group_size,
            self.symmetric,
        )

    @property
    def zero_points(self) -> Tensor | None:
        """Packed zero points, None for symmetric codes."""
        return None if self.symmetric else self.get_buffer("weight_zero_point")

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight (N, K) in `dtype`."""
        return dequantize_weight(self.quantized_weight(), dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features), in the dtype of x."""
        flat = x.reshape(-1, self.in_features)
        if self.a_bits == 8:
            out = mbq_linear_w4a8(flat, self.weight_packed, self.weight_scale, self.bias)
        elif self.steps is not None:
            out = mbq_linear_tiled(flat, self.weight_packed, self.steps, self.bits, self.group_size, self.bias)
        else:
            out = mbq_linear_w16(
                flat, self.weight_packed, self.weight_scale, self.zero_points, self.bits, self.group_size, self.bias
            )
        return out.view(*x.shape[:-1], self.out_features)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # `.to(dtype)` casts floating buffers; stored scales keep the dtype that codes were computed for.
        kept = self.weight_scale
        self.weight_packed, self.steps = self.packed, None
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=kept.device)).dtype
        super()._apply(fn, recurse)
        if self.weight_scale.dtype != kept.dtype:
            self.weight_scale = kept.to(self.weight_scale.device)
        self.arrange()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight_packed"] = self.packed

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        self.weight_packed, self.steps = self.packed, None
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self.arrange()

    def __getstate__(self) -> dict[str, Any]:
        # Blocks are those of this processor; another may read the pickle.
        buffers = {**self._buffers, "weight_packed": self.packed, "steps": None}
        return {**self.__dict__, "_buffers": buffers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.arrange()

    def extra_repr(self) -> str:
        """What the layer's line in `print(model)` says."""
        kind = "symmetric" if self.symmetric else "asymmetric"
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{shape}, W{self.bits}A{self.a_bits}, group_size={self.group_size}, {kind}"


class FakeQuantLinear(nn.Linear):
    """An `nn.Linear` whose weight holds dequantised numbers, and whose inputs are rounded to `a_bits` if that is 8."""

    a_bits: int = 16

    @classmethod
    def round(cls, linear: nn.Linear, weight: QuantizedWeight, bias: Tensor | None, a_bits: int) -> FakeQuantLinear:
        """The layer `linear` with this weight and bias."""
        rows, columns = weight.codes.shape
        like = linear.weight
        module = cls(columns, rows, bias is not None, device="meta")
        module.weight = nn.Parameter(dequantize_weight(weight).to(like), requires_grad=False)
        if bias is not None:
            module.bias = nn.Parameter(bias.detach().to(like, copy=True), requires_grad=False)
        module.a_bits = a_bits
        return module

    def forward(self, input: Tensor) -> Tensor:
        """input (..., in_features) -> (..., out_features)."""
        return super().forward(fake_quantize_activation(input) if self.a_bits == 8 else input)
