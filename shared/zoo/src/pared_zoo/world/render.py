"""Pictures of scenes: anti-aliased distance fields, drawn for a whole batch at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pared_zoo.world.attributes import BACKGROUNDS, COLORS, SHAPES, SIZES, TEXTURE_SHADE, TEXTURES
from pared_zoo.world.scene import Object, Scene

#: Period of stripes and dots in units of the object's radius.
TEXTURE_PERIOD = 0.62
#: Scenes drawn at once: a block of 64x64 pictures stays in the processor's cache.
BLOCK = 64


def render(scenes: Sequence[Scene], size: int = 64) -> np.ndarray:
    """Draw scenes.

    Args:
        scenes: any number of scenes.
        size: side of the square pictures in pixels, 16 to 1024.

    Returns:
        uint8 array (scenes, size, size, 3), RGB.

    Raises:
        ValueError: if ``size`` is out of range.
    """
    if not 16 <= size <= 1024:
        raise ValueError(f"size={size!r} must be 16 to 1024 pixels")
    pictures = np.empty((len(scenes), size, size, 3), dtype=np.uint8)
    for start in range(0, len(scenes), BLOCK):
        block = scenes[start : start + BLOCK]
        canvas = np.empty((len(block), size, size, 3), dtype=np.float32)
        canvas[:] = np.array([BACKGROUNDS[s.background] for s in block], dtype=np.float32)[:, None, None, :]
        for layer in range(max(len(s.objects) for s in block)):
            # Objects of one size share a window, so that small ones do not pay for the pixels of large ones.
            for word in SIZES:
                drawn = [
                    (i, s.objects[layer])
                    for i, s in enumerate(block)
                    if len(s.objects) > layer and s.objects[layer].size == word
                ]
                if drawn:
                    _draw(canvas, np.array([i for i, _ in drawn]), [o for _, o in drawn])
        pictures[start : start + BLOCK] = np.rint(canvas)
    return pictures


def _draw(canvas: np.ndarray, images: np.ndarray, objects: Sequence[Object]) -> None:
    """Blend one object into each of ``images``, touching only the pixels around it."""
    size = canvas.shape[1]
    centre = np.array([(o.x, o.y) for o in objects], dtype=np.float32) * size
    radius = np.array([o.radius for o in objects], dtype=np.float32) * size
    color = np.array([COLORS[o.color] for o in objects], dtype=np.float32)
    shape = np.array([SHAPES.index(o.shape) for o in objects])
    texture = np.array([TEXTURES.index(o.texture) for o in objects])

    half = int(np.ceil(radius.max())) + 1
    window = np.arange(-half, half + 1)
    xs = np.floor(centre[:, 0]).astype(int)[:, None] + window
    ys = np.floor(centre[:, 1]).astype(int)[:, None] + window
    u = ((xs + 0.5 - centre[:, 0:1]) / radius[:, None])[:, None, :].astype(np.float32)
    v = ((ys + 0.5 - centre[:, 1:2]) / radius[:, None])[:, :, None].astype(np.float32)

    distance = np.empty((len(objects), window.size, window.size), dtype=np.float32)
    for k in np.unique(shape):
        rows = shape == k
        distance[rows] = signed_distance(SHAPES[k], u[rows], v[rows])
    alpha = np.clip(0.5 - distance * radius[:, None, None], 0.0, 1.0)
    inside = (xs >= 0)[:, None, :] & (xs < size)[:, None, :] & ((ys >= 0) & (ys < size))[:, :, None]
    alpha = np.where(inside, alpha, 0.0)[..., None]

    shade = np.ones_like(distance)
    for k in np.unique(texture):
        rows = texture == k
        if TEXTURES[k] != "plain":
            shade[rows] = TEXTURE_SHADE + (1 - TEXTURE_SHADE) * _texture(TEXTURES[k], u[rows], v[rows])
    xs, ys = np.clip(xs, 0, size - 1), np.clip(ys, 0, size - 1)
    at = (images[:, None, None], ys[:, :, None], xs[:, None, :])
    ink = shade[..., None] * color[:, None, None, :]
    # Clipped window pixels outside the picture repeat border pixels with alpha 0: only visible pixels may be written.
    if inside.all():
        canvas[at] += alpha * (ink - canvas[at])
    else:
        rows, i, j = np.nonzero(inside)
        where = (images[rows], ys[rows, i], xs[rows, j])
        canvas[where] += alpha[rows, i, j] * (ink[rows, i, j] - canvas[where])


def stamp(shape: str, texture: str, u: np.ndarray, v: np.ndarray, radius: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coverage and brightness, both 0 to 1, of one kind of object at points (u, v) in units of its radius in pixels."""
    alpha = np.clip(0.5 - signed_distance(shape, u, v) * radius, 0.0, 1.0)
    shade = np.ones_like(alpha)
    if texture != "plain":
        shade = TEXTURE_SHADE + (1 - TEXTURE_SHADE) * _texture(texture, u, v)
    return alpha, shade


def signed_distance(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Distance to the outline of a shape of unit radius, negative inside; u to the right, v downwards."""
    if shape == "circle":
        return np.sqrt(u * u + v * v) - 1.0
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) - 0.84
    if shape == "triangle":
        return np.maximum(v - 0.70, 0.866 * np.abs(u) - 0.4995 * v - 0.4995)
    if shape == "diamond":
        return (1.35 * np.abs(u) + np.abs(v) - 1.05) / 1.68
    if shape == "cross":
        a, b = np.abs(u), np.abs(v)
        return np.minimum(np.maximum(a - 1.0, b - 0.34), np.maximum(a - 0.34, b - 1.0))
    if shape == "ring":
        return np.abs(np.sqrt(u * u + v * v) - 0.74) - 0.26
    raise ValueError(f"shape={shape!r} must be one of {SHAPES}")


def _texture(texture: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Pattern in 0 (dark) to 1 (the object's colour), softened over about a pixel."""
    wave_v = np.sin(2 * np.pi * v / TEXTURE_PERIOD)
    if texture == "striped":
        return np.broadcast_to(np.clip(0.5 + 1.2 * wave_v, 0, 1), np.broadcast_shapes(u.shape, v.shape))
    wave_u = np.sin(2 * np.pi * u / TEXTURE_PERIOD)
    return np.clip(1.25 - 2.5 * wave_u * wave_v, 0, 1)
