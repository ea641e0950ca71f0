"""`UNet2DConditionModel`: which modules a call of depth k skips, and what it hands on instead (section 3.1)."""

from __future__ import annotations

from typing import Any

from pared_hooks import Patch
from torch import Tensor, nn

from dato.adapters.base import parameter_names
from dato.adapters.unet_units import SelfAttentionBlock, UnetUnits, Unit, enumerate_units
from dato.functional import FULL
from dato.pruning import PruneSite
from dato.state import Call, RunState


class UNetAdapter:
    """A `UNet2DConditionModel` (SD1.5, SD2.1, SDXL and their inpainting variants)."""

    def __init__(self, unet: Any, max_downsample: int) -> None:
        self.denoiser = unet
        self.units: UnetUnits = enumerate_units(unet)
        self.num_units = self.units.num_units
        self.sites = tuple(
            _site(block, index) for index, block in enumerate(self.units.blocks) if block.downsample <= max_downsample
        )
        self._names = parameter_names(unet)
        self.residual_units = [_residual_unit(_units_of(self.units.down, i)) for i in range(len(unet.down_blocks))]
        """By down block: the unit whose output T2I-Adapter features are added to."""

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return {**dict(zip(self._names, args, strict=False)), **kwargs}

    def inputs(self, arguments: dict[str, Any]) -> tuple[Tensor, Any]:
        return arguments["sample"], arguments["timestep"]

    def passes_by(self, arguments: dict[str, Any]) -> bool:
        return False

    def needs_full(self, arguments: dict[str, Any]) -> str | None:
        return None

    def adjust(self, call: Call, arguments: dict[str, Any]) -> dict[str, Any]:
        """Replace the residuals of ControlNet and T2I-Adapter that meet skipped units by placeholders."""
        down = arguments.get("down_block_additional_residuals")
        mid = arguments.get("mid_block_additional_residual")
        inside = arguments.get("down_intrablock_additional_residuals")
        if inside is None and down is not None and mid is None:
            # The older way of passing T2I-Adapter features, which the UNet still takes.
            down, inside = None, down
        call.protect = inside is not None or any(getattr(block, "b1", None) for block in self.denoiser.up_blocks)
        if call.depth == FULL or (down is None and inside is None):
            return arguments
        skipped = call.placeholder
        if down is not None:
            arguments["down_block_additional_residuals"] = tuple(
                residual if call.computes(unit) else skipped for unit, residual in enumerate(down)
            )
            if call.depth < self.num_units:
                arguments["mid_block_additional_residual"] = skipped
        if inside is not None:
            arguments.pop("down_block_additional_residuals", None)
            # A residual beyond the down blocks is for the mid block, which takes it only where the shapes agree.
            units = [*self.residual_units, 0]
            arguments["down_intrablock_additional_residuals"] = [
                residual if call.computes(units[min(index, len(units) - 1)]) else skipped
                for index, residual in enumerate(inside)
            ]
        return arguments

    def prediction(self, output: Any) -> Tensor:
        return output[0]

    def wrap_output(self, prediction: Tensor, arguments: dict[str, Any]) -> Any:
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

        return UNet2DConditionOutput(sample=prediction) if arguments.get("return_dict", True) else (prediction,)

    def install_cache(self, patch: Patch, run: RunState) -> None:
        """Wrap whole blocks, and single units where a depth ends inside a block."""
        if not run.depths:
            return
        for index, block in enumerate(self.denoiser.down_blocks):
            units = _units_of(self.units.down, index)
            _wrap_down_block(patch, block, units, run)
            for unit in units:
                if any(units[0].index < depth <= unit.index for depth in run.depths):
                    _wrap_skipped_unit(patch, unit, run)
        _wrap_mid(patch, self.units.mid, self.num_units, run)
        for index, block in enumerate(self.denoiser.up_blocks):
            units = _units_of(self.units.up, index)
            _wrap_up_block(patch, block, units[0].index, run)
            for unit in units:
                if any(units[0].index < depth <= unit.index for depth in run.depths):
                    _wrap_skipped_unit(patch, unit, run)
                if unit.index in run.depths:
                    _wrap_stored_unit(patch, unit, run)


def _site(block: SelfAttentionBlock, index: int) -> PruneSite:
    module: Any = block.module

    def grid(latent_size: tuple[int, int]) -> tuple[int, int]:
        height, width = latent_size
        for _ in range(block.level):
            height, width = -(-height // 2), -(-width // 2)
        return height, width

    return PruneSite(block.name, index, block.unit, module.norm1, (module.attn1,), module.pos_embed is None, grid)


def _units_of(units: tuple[Unit, ...], block: int) -> list[Unit]:
    """The units of one block, shallowest first."""
    return [unit for unit in units if unit.block == block]


def _residual_unit(units: list[Unit]) -> int:
    """A block with attention adds the features before its downsampler, a block without adds them after it."""
    with_attention = [unit.index for unit in units if unit.attention is not None]
    return with_attention[-1] if with_attention else units[-1].index


def _wrap_down_block(patch: Patch, block: nn.Module, units: list[Unit], run: RunState) -> None:
    first, count = units[0].index, len(units)

    def forward(original: Any, *args: Any, **kwargs: Any) -> Any:
        call = run.call
        if call is None or call.computes(first):
            return original(*args, **kwargs)
        return call.placeholder, (call.placeholder,) * count

    patch.wrap_forward(block, forward)


def _wrap_mid(patch: Patch, mid: nn.Module, num_units: int, run: RunState) -> None:
    def forward(original: Any, *args: Any, **kwargs: Any) -> Any:
        call = run.call
        if call is None or call.depth == FULL:
            output = original(*args, **kwargs)
            if call is not None and num_units in run.depths:
                call.store(num_units, output)
            return output
        return call.stored() if call.depth == num_units else call.placeholder

    patch.wrap_forward(mid, forward)


def _wrap_up_block(patch: Patch, block: nn.Module, last: int, run: RunState) -> None:
    """Skip an up block whose last unit, the shallowest, is deeper than the call computes."""

    def forward(original: Any, *args: Any, **kwargs: Any) -> Any:
        call = run.call
        if call is None or call.computes(last):
            return original(*args, **kwargs)
        return call.stored() if call.depth == last else call.placeholder

    patch.wrap_forward(block, forward)


def _wrap_skipped_unit(patch: Patch, unit: Unit, run: RunState) -> None:
    """Skip a unit of a block that other units of the same call run through."""
    index, modules = unit.index, unit.modules

    def wrap(module: nn.Module, is_last: bool) -> None:
        def forward(original: Any, *args: Any, **kwargs: Any) -> Any:
            call = run.call
            if call is None or call.computes(index):
                return original(*args, **kwargs)
            is_deep_input = is_last and unit.direction == "up" and call.depth == index
            output = call.stored() if is_deep_input else call.placeholder
            return (output,) if module is unit.attention else output

        patch.wrap_forward(module, forward)

    for module in modules:
        wrap(module, module is modules[-1])


def _wrap_stored_unit(patch: Patch, unit: Unit, run: RunState) -> None:
    """Store the output of an up unit that some depth takes as its deep input."""
    module = unit.modules[-1]

    def forward(original: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        call = run.call
        if call is not None and call.computes(unit.index):
            call.store(unit.index, output[0] if module is unit.attention else output)
        return output

    patch.wrap_forward(module, forward)
