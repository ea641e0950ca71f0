"""Photographs that lie in the scikit-image wheel."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np

from pared_zoo.real.wheels import EXTRA

#: Colour photographs inside the wheel; the others of ``skimage.data`` would be downloaded.
PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "hubble_deep_field.jpg")


@lru_cache(maxsize=1)
def photos() -> tuple[np.ndarray, ...]:
    """Colour photographs of ``PHOTOS`` as uint8 arrays (height, width, 3), read once; copy before writing into them.

    Raises:
        ModuleNotFoundError: if scikit-image is absent; the message has the line to type.
    """
    try:
        import skimage
        from skimage.io import imread
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"photos need scikit-image: {EXTRA}", name="skimage") from error
    folder = Path(skimage.__file__).parent / "data"
    return tuple(np.ascontiguousarray(imread(folder / name)[..., :3]) for name in PHOTOS)


def photo_crops(n: int, size: int, seed: int) -> np.ndarray:
    """Draw ``n`` square crops of the photographs at random places, scales and flips.

    Args:
        n: number of crops.
        size: side in pixels; a crop covers one to four times this side of a photograph and is averaged down.
        seed: picks the crops; the same seed gives the same crops.

    Returns:
        uint8 array (n, size, size, 3), RGB.

    Raises:
        ValueError: if ``n`` is negative, or ``size`` below 8 or larger than the smallest photograph.
        ModuleNotFoundError: if scikit-image is absent; the message has the line to type.
    """
    if n < 0:
        raise ValueError(f"n={n!r} must be >= 0")
    pictures = photos()
    smallest = min(min(p.shape[:2]) for p in pictures)
    if not 8 <= size <= smallest:
        raise ValueError(f"size={size!r} must be 8 to {smallest} pixels")
    rng = np.random.default_rng(seed)
    crops = np.empty((n, size, size, 3), dtype=np.uint8)
    for crop in crops:
        picture = pictures[int(rng.integers(len(pictures)))]
        factor = int(rng.integers(1, min(4, min(picture.shape[:2]) // size) + 1))
        side = factor * size
        y, x = (int(rng.integers(extent - side + 1)) for extent in picture.shape[:2])
        window = picture[y : y + side, x : x + side].reshape(size, factor, size, factor, 3).mean(axis=(1, 3))
        crop[:] = window[:, ::-1] if rng.random() < 0.5 else window
    return crops
