"""How good pictures, texts and answers are."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Spread:
    """A 95 % bootstrap interval and the standard error of a statistic."""

    low: float
    high: float
    standard_error: float


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Return the Frechet distance of two sets of features (samples, channels), fitted by a Gaussian each, in float64.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), covariances over samples - 1 (Heusel et al. 2017, arXiv 1706.08500,
    equation 6). Raises ValueError unless both have two samples or more and as many channels.
    """
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise ValueError(
            f"first and second must be (samples, channels) of equal channels, got {_shapes(first, second)}"
        )
    if min(len(first), len(second)) < 2:
        raise ValueError(f"first and second need two samples or more each, got {_shapes(first, second)}")
    first, second = first.detach().double(), second.detach().double()
    means = first.mean(0) - second.mean(0)
    a = (first - first.mean(0)) / math.sqrt(len(first) - 1)
    b = (second - second.mean(0)) / math.sqrt(len(second) - 1)
    if min(len(a), len(b)) < a.shape[1]:
        # the eigenvalues of C1 C2 are the squared singular values of A B^T, which is smaller here
        cross = torch.linalg.svdvals(a @ b.T).sum()
    else:
        # R1 R2^T, with the triangular factors of A = Q1 R1 and B = Q2 R2, has the singular values of A B^T
        cross = torch.linalg.svdvals(torch.linalg.qr(a, mode="r").R @ torch.linalg.qr(b, mode="r").R.T).sum()
    distance = means.square().sum() + a.square().sum() + b.square().sum() - 2 * cross
    return max(float(distance), 0.0)


def bootstrap(
    statistic: Callable[..., float], *samples: Sequence[Any] | Tensor, resamples: int = 100, seed: int = 0
) -> Spread:
    """Return the spread of `statistic(*samples)` when each of `samples` is drawn again with replacement.

    Raises ValueError when a sample is empty or `resamples` is below 2.
    """
    if resamples < 2:
        raise ValueError(f"resamples must be at least 2, got {resamples}")
    if not samples or any(len(sample) == 0 for sample in samples):
        raise ValueError("samples must not be empty")
    generator = random.Random(seed)
    values = sorted(statistic(*(_drawn(sample, generator) for sample in samples)) for _ in range(resamples))
    mean = sum(values) / resamples
    error = math.sqrt(sum((value - mean) ** 2 for value in values) / (resamples - 1))
    edge = 0.025 * (resamples - 1)
    return Spread(values[math.floor(edge)], values[math.ceil(resamples - 1 - edge)], error)


def psnr(images: Tensor, reference: Tensor, *, data_range: float = 1.0) -> Tensor:
    """Return each image's peak signal-to-noise ratio in dB (batch,); infinite where the images are equal.

    Both (batch, ...) of equal shape, values spanning `data_range`.
    """
    _same_shape(images, reference)
    error = (images.double() - reference.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(data_range**2 / error)


def ssim(images: Tensor, reference: Tensor, *, data_range: float = 1.0, window: int = 11, sigma: float = 1.5) -> Tensor:
    """Return each image's structural similarity (batch,), 1 where equal; inputs (batch, channels, height, width).

    Gaussian window, K1 0.01 and K2 0.03, mean over channels and the places where the window fits (Wang et al. 2004,
    equation 13). Raises ValueError when the images are smaller than the window.
    """
    _same_shape(images, reference)
    if images.ndim != 4 or min(images.shape[-2:]) < window:
        raise ValueError(f"images must be (batch, channels, height, width) of at least {window}, got {images.shape}")
    x, y = images.double(), reference.double()
    offsets = torch.arange(window, dtype=x.dtype, device=x.device) - (window - 1) / 2
    weights = torch.exp(-offsets.square() / (2 * sigma**2))
    weights = weights / weights.sum()
    channels = x.shape[1]
    rows = weights.view(1, 1, window, 1).expand(channels, 1, window, 1)
    columns = weights.view(1, 1, 1, window).expand(channels, 1, 1, window)

    def blur(value: Tensor) -> Tensor:
        return functional.conv2d(functional.conv2d(value, rows, groups=channels), columns, groups=channels)

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    similarity = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    )
    return similarity.flatten(1).mean(1)


def feature_distance(
    images: Tensor, reference: Tensor, *, features: Callable[[Tensor], Sequence[Tensor]] | None = None
) -> Tensor:
    """Return a perceptual distance per image (batch,), 0 where equal; inputs (batch, 3, height, width) in 0..1.

    As LPIPS without its learned weights: feature maps (batch, channels, height, width) of a fixed network, unit length
    over channels, squared difference summed over channels, mean over places and layers (Zhang et al. 2018, equation 1).
    `features` defaults to EfficientNet-Lite0, which needs the extra pared-zoo[real].
    """
    _same_shape(images, reference)
    if features is None:
        from pared_zoo.real import efficientnet_features

        def features(batch: Tensor) -> Sequence[Tensor]:
            return efficientnet_features(batch, maps=True)

    total: Tensor | None = None
    layers = list(zip(features(images), features(reference), strict=True))
    for ours, theirs in layers:
        difference = functional.normalize(ours.float(), dim=1) - functional.normalize(theirs.float(), dim=1)
        distance = difference.square().sum(1).flatten(1).mean(1)
        total = distance if total is None else total + distance
    if total is None:
        raise ValueError("features must return at least one map, got none")
    return total / len(layers)


def attribute_accuracy(images: Any, scenes: Sequence[Any]) -> dict[str, float]:
    """Return the share of what the captions say that the pictures show, by aspect and as "mean".

    `images`: a uint8 array or tensor (batch, height, width, 3), a float tensor (batch, 3, height, width) in 0..1, or
    PIL images; `scenes`: the `pared_zoo.world` scenes behind the captions. Raises ValueError when their numbers differ.
    """
    from pared_zoo.world import attribute_accuracy as judge

    return dict(judge(as_uint8(images), scenes))


def as_uint8(images: Any) -> Any:
    """Return pictures as a uint8 array (batch, height, width, 3); see `attribute_accuracy` for what is taken."""
    import numpy as np

    if isinstance(images, Tensor):
        if images.is_floating_point():
            if images.ndim != 4 or images.shape[1] != 3:
                raise ValueError(f"images must be (batch, 3, height, width) when floating, got {tuple(images.shape)}")
            images = images.detach().float().clamp(0, 1).mul(255).round().permute(0, 2, 3, 1).to(torch.uint8)
        array = images.cpu().numpy()
    elif isinstance(images, np.ndarray):
        array = images
    else:
        array = np.stack([np.asarray(image.convert("RGB")) for image in images])
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3:
        raise ValueError(f"images must be uint8 (batch, height, width, 3), got {array.dtype} {array.shape}")
    return array


@torch.no_grad()
def perplexity(model: Callable[[Tensor], Any], sequences: Iterable[Tensor], *, skip: int = 0) -> float:
    """Return exp of the mean negative log-likelihood of the tokens of `sequences`, each (batch, tokens) int64.

    `model(sequence)` gives logits (batch, tokens, vocabulary) or an output with `.logits`. The first token of a
    sequence is never predicted; with `skip`, the first `skip` tokens are context alone. Raises ValueError when nothing
    is scored.
    """
    total, count = 0.0, 0
    for sequence in sequences:
        output = model(sequence)
        logits = output if isinstance(output, Tensor) else output.logits
        begin = max(skip, 1)
        targets = sequence[:, begin:]
        predicted = logits[:, begin - 1 : -1]
        for row, wanted in zip(predicted, targets, strict=True):
            # row by row: float32 logits of a whole batch over a large vocabulary would not fit beside the model
            total += float(functional.cross_entropy(row.float(), wanted.to(row.device), reduction="sum"))
        count += targets.numel()
    if count == 0:
        raise ValueError(f"sequences hold no token after the first {max(skip, 1)}")
    return math.exp(total / count)


def answer_accuracy(answers: Sequence[str], expected: Sequence[str]) -> float:
    """Return the share of answers that equal the expected one, case, spaces and a final full stop aside.

    Raises ValueError when the numbers differ or are zero.
    """
    if len(answers) != len(expected) or not answers:
        raise ValueError(
            f"answers and expected must be equally many and at least one, got {len(answers)}, {len(expected)}"
        )
    return sum(_plain(a) == _plain(b) for a, b in zip(answers, expected, strict=True)) / len(answers)


def hypervolume(points: Iterable[tuple[float, float]], reference: tuple[float, float]) -> float:
    """Return the area that two-objective points, both to be minimised, dominate below `reference`."""
    area, ceiling = 0.0, reference[1]
    for x, y in sorted(points):
        if x < reference[0] and y < ceiling:
            area += (reference[0] - x) * (ceiling - y)
            ceiling = y
    return area


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".").strip()


def _drawn(sample: Sequence[Any] | Tensor, generator: random.Random) -> Any:
    picks = generator.choices(range(len(sample)), k=len(sample))
    return sample[picks] if isinstance(sample, Tensor) else [sample[pick] for pick in picks]


def _same_shape(images: Tensor, reference: Tensor) -> None:
    if images.shape != reference.shape:
        raise ValueError(f"images and reference must have equal shapes, got {_shapes(images, reference)}")


def _shapes(first: Tensor, second: Tensor) -> str:
    return f"{tuple(first.shape)} and {tuple(second.shape)}"
