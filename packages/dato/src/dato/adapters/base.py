"""What a backend asks of a model family, and which adapter answers for which class."""

from __future__ import annotations

import inspect
from typing import Any, Protocol

from pared_hooks import Patch, UnsupportedModelError
from torch import Tensor, nn

from dato.pruning import PruneSite
from dato.state import Call, RunState

SUPPORTED = ("DiTTransformer2DModel", "PixArtTransformer2DModel", "SD3Transformer2DModel", "UNet2DConditionModel")


class DenoiserAdapter(Protocol):
    """One denoiser as the backends see it."""

    denoiser: nn.Module
    num_units: int
    """Largest depth a policy may ask for."""
    sites: tuple[PruneSite, ...]
    """Blocks that may be pruned, in the order they run."""

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a denoiser call by name."""

    def inputs(self, arguments: dict[str, Any]) -> tuple[Tensor, Any]:
        """Latent and timestep of a denoiser call."""

    def passes_by(self, arguments: dict[str, Any]) -> bool:
        """Whether this call is none of the run's denoising calls and must run untouched."""

    def needs_full(self, arguments: dict[str, Any]) -> str | None:
        """Why this call must compute everything whatever the policy says, or None."""

    def adjust(self, call: Call, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments with which the model's own forward carries out `call`."""

    def prediction(self, output: Any) -> Tensor:
        """The prediction in what the model's forward returned."""

    def wrap_output(self, prediction: Tensor, arguments: dict[str, Any]) -> Any:
        """`prediction` in the form that the caller asked for."""

    def install_cache(self, patch: Patch, run: RunState) -> None:
        """Wrap the modules that calls of the run's depths skip or store."""


def parameter_names(denoiser: nn.Module) -> tuple[str, ...]:
    """Names of the parameters of the denoiser's forward, in order."""
    return tuple(inspect.signature(type(denoiser).forward).parameters)[1:]


def find_denoiser(pipe_or_model: Any) -> nn.Module:
    """The denoiser of a pipeline, or the model itself. Raises `UnsupportedModelError` for anything else."""
    if isinstance(pipe_or_model, nn.Module):
        return pipe_or_model
    for name in ("unet", "transformer"):
        denoiser = getattr(pipe_or_model, name, None)
        if isinstance(denoiser, nn.Module):
            return denoiser
    raise unsupported(pipe_or_model)


def adapter_for(denoiser: nn.Module, max_downsample: int) -> DenoiserAdapter:
    """The adapter of `denoiser` with its prunable sites. Raises `UnsupportedModelError` naming an unknown class."""
    from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel

    from dato.adapters.dit import DiTAdapter
    from dato.adapters.unet import UNetAdapter

    if isinstance(denoiser, UNet2DConditionModel):
        return UNetAdapter(denoiser, max_downsample)
    if isinstance(denoiser, DiTTransformer2DModel | PixArtTransformer2DModel | SD3Transformer2DModel):
        return DiTAdapter(denoiser)
    raise unsupported(denoiser)


def unsupported(found: object) -> UnsupportedModelError:
    """The error for a class that no adapter knows."""
    return UnsupportedModelError.unknown(
        found,
        SUPPORTED,
        "An adapter is a class like dato.adapters.dit.DiTAdapter; models with rotary embeddings also need their tables "
        "gathered per sample.",
    )
