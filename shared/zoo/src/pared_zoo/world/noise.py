"""Noise of a camera: two pictures of the same scene are never equal to the last bit."""

from __future__ import annotations

import numpy as np

#: Standard deviation in levels of 255; the smallest step of an object between two frames changes pixels by far more.
CAMERA_NOISE = 3.0


def camera_noise(pictures: np.ndarray, seed: int, sigma: float = CAMERA_NOISE) -> np.ndarray:
    """Pictures with independent Gaussian noise in every pixel and channel.

    Args:
        pictures: uint8 array of any shape.
        seed: the same seed gives the same noise.
        sigma: standard deviation in levels of 255, at least 0.

    Returns:
        uint8 array of the same shape; ``pictures`` is not changed.

    Raises:
        ValueError: if ``pictures`` is not uint8 or ``sigma`` is negative.
    """
    if pictures.dtype != np.uint8:
        raise ValueError(f"pictures is {pictures.dtype} and must be uint8")
    if not sigma >= 0:
        raise ValueError(f"sigma={sigma!r} must be at least 0")
    noise = np.random.default_rng(seed).standard_normal(pictures.shape, dtype=np.float32)
    return np.clip(np.rint(pictures + sigma * noise), 0, 255).astype(np.uint8)
