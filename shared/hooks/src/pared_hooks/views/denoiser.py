"""`DenoiserView`: the blocks and attention modules of a diffusers denoiser, and where its tokens lie."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from pared_hooks.errors import ConfigError, UnsupportedModelError


class Grid(NamedTuple):
    """Extent of the picture or video in tokens; the sequence runs over frames, then rows, then columns."""

    frames: int
    height: int
    width: int

    @property
    def num_tokens(self) -> int:
        return self.frames * self.height * self.width


class TokenSpans(NamedTuple):
    """Where text and picture lie in the sequence that an attention works on."""

    text: slice
    vision: slice
    grid: Grid


@dataclass(frozen=True, eq=False)
class AttentionSite:
    """One attention module of a denoiser.

    `kind`: "self" (picture with picture), "cross" (picture asks text), "joint" (both in one sequence). `text` says on
    which side of a joint sequence the text is. `level` counts how often the latent grid was halved before (UNets).
    """

    name: str
    module: nn.Module
    kind: Literal["self", "cross", "joint"]
    block: int
    text: Literal["first", "last"] | None = None
    level: int = 0


@dataclass(frozen=True, eq=False)
class DenoiserBlock:
    """One block of a denoiser; `part` is "down", "mid", "up" (UNets), "double", "single" or "block" (transformers).

    For the blocks of transformers `inputs` and `outputs` name the streams the forward takes first and returns:
    `("vision", "text")` in the order of each; "joint" is both in one sequence.
    """

    index: int
    name: str
    module: nn.Module
    part: str
    level: int = 0
    inputs: tuple[str, ...] = ("vision",)
    outputs: tuple[str, ...] = ("vision",)


@dataclass(frozen=True, eq=False)
class DenoiserView:
    """A denoiser under the same names for every family. Build it with `of`; families build it directly."""

    model: nn.Module
    family: str
    """ "unet", "dit" (text enters by cross-attention or not at all) or "mmdit" (text tokens in the sequence)."""
    architecture: str
    """Name of the registered family that recognised the model."""
    blocks: tuple[DenoiserBlock, ...]
    attentions: tuple[AttentionSite, ...]
    sample_name: str
    timestep_name: str
    text_name: str | None
    first: nn.Module
    """The module that turns the latent into channels or tokens."""
    last: nn.Module
    """The module that turns them into the prediction."""
    rotary: nn.Module | None
    """The module that computes rotary tables; None when there are none or the pipeline passes them."""
    patch: Grid
    """Latent frames, rows and columns per token."""
    grid_of: Callable[[Sequence[int], Mapping[str, Any]], Grid]
    more_text: tuple[str, ...] = ()
    """Further arguments whose tokens are text in the sequence, such as those of a second text encoder."""

    @property
    def has_cache_context(self) -> bool:
        """Whether pipelines name the guidance branch through `cache_context`."""
        return hasattr(self.model, "cache_context")

    @staticmethod
    def of(model_or_pipeline: Any) -> DenoiserView:
        """View a denoiser, or that of a pipeline (`transformer` or `unet`).

        Raises `UnsupportedModelError` for an architecture that no registered family knows.
        """
        model = denoiser_of(model_or_pipeline)
        classes = [kind.__name__ for kind in type(model).__mro__]
        for class_names, build in _families.values():
            if set(classes) & set(class_names):
                return build(model)
        supported = [f"{name} ({', '.join(class_names)})" for name, (class_names, _) in _families.items()]
        raise UnsupportedModelError.unknown(
            model,
            supported,
            "To support it, write a function that builds its DenoiserView and register it: "
            "pared_hooks.register_denoiser_family(name, ('ItsClass',), build).",
        )

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Name the arguments of a denoiser call, as its forward does."""
        names = list(inspect.signature(type(self.model).forward).parameters)[1:]
        return {**dict(zip(names, args, strict=False)), **kwargs}

    def grid(self, sample_shape: Sequence[int], level: int = 0, **call: Any) -> Grid:
        """Token grid of a latent of this shape, at a resolution level of a UNet.

        Denoisers that get packed tokens, (batch, tokens, channels), need what their call says about them: `img_ids`
        (Flux) or `img_shapes` (Qwen-Image); other arguments of the call are ignored. Raises `ConfigError` without.
        """
        grid = self.grid_of(sample_shape, call)
        for _ in range(level):
            grid = Grid(grid.frames, (grid.height + 1) // 2, (grid.width + 1) // 2)
        return grid

    def num_text_tokens(self, **call: Any) -> int:
        """Text tokens that a denoiser call with these arguments brings; others of the call are ignored."""
        names = (self.text_name, *self.more_text)
        return sum(call[name].shape[1] for name in names if name is not None and call.get(name) is not None)

    def spans(self, site: AttentionSite, sample_shape: Sequence[int], num_text_tokens: int, **call: Any) -> TokenSpans:
        """Where text and picture lie in the sequence of one attention; `call` as for `grid`."""
        grid = self.grid(sample_shape, site.level, **call)
        num_text, num_vision = num_text_tokens if site.text is not None else 0, grid.num_tokens
        if site.text == "first":
            return TokenSpans(slice(0, num_text), slice(num_text, num_text + num_vision), grid)
        return TokenSpans(slice(num_vision, num_vision + num_text), slice(0, num_vision), grid)


_families: dict[str, tuple[tuple[str, ...], Callable[[nn.Module], DenoiserView]]] = {}


def register_denoiser_family(name: str, class_names: Sequence[str], build: Callable[[nn.Module], DenoiserView]) -> None:
    """Make `DenoiserView.of` read models of the named classes; raises `ConfigError` for a name that is taken."""
    if name in _families:
        raise ConfigError(f"name = {name!r} is not valid: this denoiser family is registered already", "name")
    _families[name] = (tuple(class_names), build)


def denoiser_of(model_or_pipeline: Any) -> nn.Module:
    """Return the denoiser of a pipeline, or the model itself, without the wrapper of `torch.compile`."""
    found = model_or_pipeline
    if not isinstance(found, nn.Module):
        for name in ("transformer", "unet"):
            if isinstance(getattr(model_or_pipeline, name, None), nn.Module):
                found = getattr(model_or_pipeline, name)
                break
        else:
            raise UnsupportedModelError(
                f"{type(model_or_pipeline).__name__} is neither a denoiser nor a pipeline with one: "
                "expected an nn.Module or a diffusers pipeline with `transformer` or `unet`"
            )
    return getattr(found, "_orig_mod", found)


def patched_grid(patch: Grid, *, frames_first: bool = False) -> Callable[..., Grid]:
    """Grid of latents (batch, channels, [frames,] height, width), or with frames before channels."""

    def grid_of(sample_shape: Sequence[int], call: Mapping[str, Any]) -> Grid:
        if len(sample_shape) == 4:
            frames, (height, width) = 1, sample_shape[2:]
        elif len(sample_shape) == 5:
            frames = sample_shape[1] if frames_first else sample_shape[2]
            height, width = sample_shape[3:]
        else:
            raise ConfigError(f"sample_shape = {tuple(sample_shape)} is not valid: 4 or 5 dimensions", "sample_shape")
        return Grid(frames // patch.frames, height // patch.height, width // patch.width)

    return grid_of


def joint_blocks(
    model: nn.Module,
    parts: Mapping[str, str],
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    text: Literal["first", "last"],
    attention: str = "attn",
) -> tuple[tuple[DenoiserBlock, ...], tuple[AttentionSite, ...]]:
    """Blocks of joint attention, one site each: `parts` names the list that holds those of each part, in their order.

    `inputs`, `outputs` and `text` are those of `DenoiserBlock` and `AttentionSite`, `attention` the module's name.
    """
    blocks: list[DenoiserBlock] = []
    attentions: list[AttentionSite] = []
    for part, holder in parts.items():
        for index, block in enumerate(module_of(model, holder).children()):
            path, number = f"{holder}.{index}", len(blocks)
            blocks.append(DenoiserBlock(number, path, block, part, 0, inputs, outputs))
            site = module_of(block, attention)
            attentions.append(AttentionSite(f"{path}.{attention}", site, "joint", number, text))
    return tuple(blocks), tuple(attentions)


def module_of(parent: nn.Module, name: str) -> nn.Module:
    """Return a submodule by attribute name; raises `UnsupportedModelError` when it is not there."""
    part = getattr(parent, name, None)
    if not isinstance(part, nn.Module):
        raise UnsupportedModelError(
            f"{type(parent).__name__} has no module {name!r}, which its denoiser family expects"
        )
    return part


def config_of(model: nn.Module) -> Any:
    """Return the configuration of a diffusers model."""
    config: Any = model.config
    return config


def token_positions(ids: Tensor) -> Grid:
    """Grid of position ids (tokens, 3): frame, row and column of each token."""
    extent = ids.amax(0) - ids.amin(0) + 1
    frames, height, width = (int(value) for value in extent.tolist()[:3])
    return Grid(frames, height, width)
