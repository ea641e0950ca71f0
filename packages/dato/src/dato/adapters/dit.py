"""DiT, PixArt and SD3: a stack of blocks, of which a call of depth k computes the first k (section 7.5)."""

from __future__ import annotations

from typing import Any

from pared_hooks import Patch
from torch import Tensor, nn

from dato.adapters.base import parameter_names
from dato.functional import FULL
from dato.pruning import PruneSite
from dato.state import Call, RunState


class DiTAdapter:
    """A `DiTTransformer2DModel`, `PixArtTransformer2DModel` or `SD3Transformer2DModel`.

    Every block works on the grid of patches, which counts as full resolution: `max_downsample` leaves none out.
    """

    def __init__(self, transformer: Any) -> None:
        self.denoiser = transformer
        self._blocks = list(transformer.transformer_blocks)
        self.num_units = len(self._blocks)
        patch_size = transformer.config.patch_size
        self.sites = tuple(
            _site(f"transformer_blocks.{index}", index, block, patch_size) for index, block in enumerate(self._blocks)
        )
        self._names = parameter_names(transformer)

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return {**dict(zip(self._names, args, strict=False)), **kwargs}

    def inputs(self, arguments: dict[str, Any]) -> tuple[Tensor, Any]:
        return arguments["hidden_states"], arguments["timestep"]

    def passes_by(self, arguments: dict[str, Any]) -> bool:
        """Skip-layer guidance of SD3 makes an extra call of another model: fewer layers."""
        return arguments.get("skip_layers") is not None

    def needs_full(self, arguments: dict[str, Any]) -> str | None:
        """Why this call can't reuse a residual of the stack, or None."""
        if arguments.get("block_controlnet_hidden_states") is not None:
            return "ControlNet residuals of SD3 enter between the blocks; such calls compute everything"
        return None

    def adjust(self, call: Call, arguments: dict[str, Any]) -> dict[str, Any]:
        return arguments

    def prediction(self, output: Any) -> Tensor:
        return output[0]

    def wrap_output(self, prediction: Tensor, arguments: dict[str, Any]) -> Any:
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=prediction) if arguments.get("return_dict", True) else (prediction,)

    def install_cache(self, patch: Patch, run: RunState) -> None:
        """Wrap the blocks that some depth starts from or leaves out."""
        if not run.depths:
            return
        starts: dict[int, Tensor] = {}
        run.on_forget(starts.clear)
        for index, block in enumerate(self._blocks):
            if index >= min(run.depths) or index == self.num_units - 1:
                _wrap_block(patch, block, index, self.num_units, run, starts)


def _site(name: str, index: int, block: Any, patch_size: int) -> PruneSite:
    def grid(latent_size: tuple[int, int]) -> tuple[int, int]:
        return latent_size[0] // patch_size, latent_size[1] // patch_size

    if hasattr(block, "attn1"):
        return PruneSite(name, index, index, block.norm1, (block.attn1,), block.pos_embed is None, grid)
    attentions = tuple(module for module in (block.attn, block.attn2) if module is not None)
    return PruneSite(name, index, index, block.norm1, attentions, True, grid)


def _wrap_block(
    patch: Patch, block: nn.Module, index: int, num_blocks: int, run: RunState, starts: dict[int, Tensor]
) -> None:
    """Keep at a FULL call what the blocks from each depth k on add; a call of depth k adds that instead of them."""
    is_last = index == num_blocks - 1
    is_joint = not hasattr(block, "attn1")

    def forward(original: Any, *args: Any, **kwargs: Any) -> Any:
        call = run.call
        if call is None:
            return original(*args, **kwargs)
        hidden_states = args[0] if args else kwargs["hidden_states"]
        if call.depth == FULL and index in run.depths:
            starts[index] = hidden_states.detach()
        if call.computes(index):
            output = original(*args, **kwargs)
            if is_last and call.depth == FULL:
                _store_residuals(call, output, run.depths, num_blocks, starts)
            return output
        if is_last:
            hidden_states = hidden_states + call.stored()
        if not is_joint:
            return hidden_states
        # A joint block returns text and image tokens; the last one has no more use for the text.
        return kwargs.get("encoder_hidden_states"), hidden_states

    patch.wrap_forward(block, forward)


def _store_residuals(
    call: Call, output: Any, depths: frozenset[int], num_blocks: int, starts: dict[int, Tensor]
) -> None:
    end = output[1] if isinstance(output, tuple) else output
    for depth in depths:
        # A call that computes every block needs no residual, only the note that it may run.
        call.store(depth, end - starts[depth] if depth < num_blocks else end.new_zeros(()))
    starts.clear()
