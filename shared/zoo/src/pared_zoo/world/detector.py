"""What is in a picture: objects found by comparison with everything the renderer could have drawn.

With ``J`` the picture minus its background colour ``B`` and ``T`` what an object adds to a background, placing the
object lowers the squared error by ``2 <J, T> - |T|^2``. ``T = color * mask - B * alpha`` is linear in the colour, so a
few colourless templates, correlated with the three channels, score every combination of words.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from pared_zoo.world.attributes import BACKGROUNDS, COLORS, PLACES, RELATIONS, SHAPES, SIZES, TEXTURES
from pared_zoo.world.render import stamp
from pared_zoo.world.scene import RADIUS_JITTER, holds

#: Larger pictures are averaged down to this side: the words are as plain there and the search is cheaper.
WORKING_SIDE = 64
#: More objects than any caption names are still counted, up to this many.
MAX_OBJECTS = 6
#: An object is accepted when it explains at least this share of what a perfect one would. Blur that halves a texture
#: takes nearly all the share of a textured object as dark as its background, so the bar is low.
MIN_EXPLAINED = 0.1
#: Objects of the world do not touch: what is nearer to a clearer object than this part of both radii is its outline.
MIN_APART = 0.9
#: Largest distance from a named place, as a fraction of the side; places are 0.25 apart.
PLACE_RADIUS = 0.125

_COLORS = np.array(list(COLORS.values()), dtype=np.float32)
_BACKGROUNDS = np.array(list(BACKGROUNDS.values()), dtype=np.float32)
_BLOCK = 16


@dataclass(frozen=True)
class DetectedObject:
    """One object found in a picture.

    Attributes:
        shape, color, size, texture: words from ``pared_zoo.world.attributes``.
        x, y: centre as fractions of the side, x to the right and y downwards.
        radius: half the side of the box as a fraction of the image side.
        explained: how much of a perfect drawing of this object the picture holds; 1 is all of it.
    """

    shape: str
    color: str
    size: str
    texture: str
    x: float
    y: float
    radius: float
    explained: float

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Layout box (x0, y0, x1, y1) as fractions of the side."""
        return (self.x - self.radius, self.y - self.radius, self.x + self.radius, self.y + self.radius)

    @property
    def words(self) -> tuple[str, str, str, str]:
        """(shape, color, size, texture)."""
        return (self.shape, self.color, self.size, self.texture)

    @property
    def place(self) -> str | None:
        """The word of ``PLACES`` this object stands at, or None."""
        for word, (x, y) in PLACES.items():
            if max(abs(self.x - x), abs(self.y - y)) <= PLACE_RADIUS:
                return word
        return None


@dataclass(frozen=True)
class Detection:
    """What a picture shows.

    Attributes:
        objects: the objects found, the clearest first.
        background: the word of ``BACKGROUNDS`` nearest to the background colour.
    """

    objects: tuple[DetectedObject, ...]
    background: str

    @property
    def count(self) -> int:
        """Number of objects."""
        return len(self.objects)

    @property
    def relations(self) -> tuple[tuple[int, str, int], ...]:
        """Triples (i, relation, j) that hold between ``objects[i]`` and ``objects[j]``."""
        pairs = [(i, j) for i in range(self.count) for j in range(self.count) if i != j]
        return tuple((i, relation, j) for i, j in pairs for relation in RELATIONS if self.related(i, relation, j))

    def related(self, i: int, relation: str, j: int) -> bool:
        """Whether ``objects[i] relation objects[j]``: further apart along the relation's axis than across it."""
        first, second = (np.array([o.x, o.y]) for o in (self.objects[i], self.objects[j]))
        return bool(holds(relation, first, second, margin=0.0))


def detect(images: np.ndarray) -> list[Detection]:
    """Find the objects and the background of pictures of the world.

    Args:
        images: uint8 array (pictures, side, side, 3), RGB, side at least 16.

    Returns:
        One ``Detection`` per picture.

    Raises:
        ValueError: if ``images`` has another shape or dtype.
    """
    if not isinstance(images, np.ndarray) or images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8:
        found = f"{images.dtype} {images.shape}" if isinstance(images, np.ndarray) else type(images).__name__
        raise ValueError(f"images={found} must be a uint8 array of shape (pictures, side, side, 3)")
    if images.shape[1] != images.shape[2] or images.shape[1] < 16:
        raise ValueError(
            f"images of {images.shape[1]}x{images.shape[2]} pixels must be square with a side of 16 or more"
        )
    found_all: list[Detection] = []
    for start in range(0, len(images), _BLOCK):
        found_all += _detect_block(images[start : start + _BLOCK])
    return found_all


def _detect_block(images: np.ndarray) -> list[Detection]:
    pictures = _shrink(images.astype(np.float32))
    side = pictures.shape[1]
    background = np.median(pictures.reshape(len(pictures), -1, 3), axis=1)
    contrast = (pictures - background[:, None, None, :]).transpose(0, 3, 1, 2)
    proposals = _propose(contrast, background, side)
    fits: list[list[tuple[float, DetectedObject]]] = [[] for _ in pictures]
    for k, word in enumerate(SIZES):
        chosen = [(i, y, x) for i, size, y, x in proposals if size == k]
        if chosen:
            index = np.array(chosen)
            for i, fit in zip(index[:, 0], _fit(contrast, background, index, word), strict=True):
                fits[i].append(fit)
    nearest = np.square(background[:, None] - _BACKGROUNDS).sum(-1).argmin(-1)
    words = tuple(BACKGROUNDS)
    return [Detection(_accept(fitted), words[k]) for fitted, k in zip(fits, nearest, strict=True)]


def _accept(fits: list[tuple[float, DetectedObject]]) -> tuple[DetectedObject, ...]:
    """Fitted objects that stand clear of the better ones, the best first."""
    accepted: list[DetectedObject] = []
    for _, obj in sorted(fits, key=lambda fit: -fit[0]):
        clear = all(np.hypot(obj.x - o.x, obj.y - o.y) >= MIN_APART * (obj.radius + o.radius) for o in accepted)
        if clear and obj.explained >= MIN_EXPLAINED:
            accepted.append(obj)
    return tuple(accepted)


def _shrink(pictures: np.ndarray) -> np.ndarray:
    """Average pictures (n, side, side, 3) down to ``WORKING_SIDE`` by area; smaller ones stay as they are."""
    side = pictures.shape[1]
    if side <= WORKING_SIDE:
        return pictures
    edges = np.linspace(0, side, WORKING_SIDE + 1)
    pixels = np.arange(side)
    share = np.clip(np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels), 0, None)
    share = (share * WORKING_SIDE / side).astype(np.float32)
    return np.einsum("ai,nijc,bj->nabc", share, pictures, share, optimize=True)


# -- where: every size at every pixel ---------------------------------------------------------------------------------


def _propose(contrast: np.ndarray, background: np.ndarray, side: int) -> list[tuple[int, int, int, int]]:
    """Best non-overlapping places, as (picture, size, row, column)."""
    gain = _gain_maps(contrast, background, side)
    radius = np.array(list(SIZES.values())) * side
    rows, columns = np.mgrid[:side, :side]
    proposals = []
    for i, maps in enumerate(gain):
        for _ in range(MAX_OBJECTS):
            size, y, x = np.unravel_index(int(maps.argmax()), maps.shape)
            if maps[size, y, x] <= 0:
                break
            proposals.append((i, int(size), int(y), int(x)))
            distance = np.hypot(rows - y, columns - x)
            for k, r in enumerate(radius):
                maps[k][distance < MIN_APART * (r + radius[size])] = -np.inf
    return proposals


def _gain_maps(contrast: np.ndarray, background: np.ndarray, side: int) -> np.ndarray:
    """Drop of the squared error by the best object of each size at each pixel, (pictures, sizes, side, side)."""
    spectrum = np.fft.rfft2(contrast)
    gains = np.full((len(contrast), len(SIZES), side, side), -np.inf, dtype=np.float32)
    step = max(1, WORKING_SIDE**2 // side**2)  # so many templates at once stay in the processor's cache
    for k, word in enumerate(SIZES):
        bank, masks = _bank(side, word, *_coarse(side)), _spectra(side, word)
        for i, best in enumerate(gains[:, k].reshape(len(gains), -1)):
            matched = np.fft.irfft2(spectrum[i] * masks, s=(side, side)).reshape(-1, 3, side * side)
            outlined = np.matmul(background[i], matched[: bank.outlines])
            energy = bank.energy(background[i])
            for part in np.split(np.arange(len(matched)), range(step, len(matched), step)):
                ink = np.matmul(_COLORS, matched[part]) - outlined[bank.outline[part]][:, None]
                np.maximum(best, (2 * ink - energy[part][:, :, None]).max(axis=(0, 1)), out=best)
    return gains


def _coarse(side: int) -> tuple[int, int, float]:
    """(radii, shifts, reach) of the templates that search everywhere: below 48 pixels half a pixel matters."""
    return (1, 1, 0.0) if side >= 48 else (1, 2, 0.25)


def _fine(side: int) -> tuple[int, int, float]:
    """(radii, shifts, reach) of the templates at a place: below 48 pixels dots are so small that an eighth matters."""
    return (5, 9, 1.0) if side >= 48 else (9, 17, 1.0)


@lru_cache(maxsize=16)
def _spectra(side: int, size: str) -> np.ndarray:
    """Conjugate spectra of the searching templates of a size, (templates, 1, side, side // 2 + 1)."""
    bank = _bank(side, size, *_coarse(side))
    canvas = np.zeros((len(bank.masks), 1, side, side), dtype=np.float32)
    at = np.arange(-bank.half, bank.half + 1) % side
    canvas[:, 0, at[:, None], at[None, :]] = bank.masks.reshape(-1, at.size, at.size)
    return np.conj(np.fft.rfft2(canvas))


# -- what: all words, radii and shifts at one place -------------------------------------------------------------------


def _fit(
    contrast: np.ndarray, background: np.ndarray, index: np.ndarray, size: str
) -> list[tuple[float, DetectedObject]]:
    """(gain, object) of the best words, centre and radius of ``size`` near each (picture, row, column) of ``index``."""
    side = contrast.shape[-1]
    bank = _bank(side, size, *_fine(side))
    at = np.arange(2 * bank.half + 1)
    padded = np.pad(contrast, ((0, 0), (0, 0), (bank.half, bank.half), (bank.half, bank.half)))
    picture, y, x = index.T
    rows, columns = y[:, None, None] + at[:, None], x[:, None, None] + at
    patches = padded[picture[:, None, None], :, rows, columns].reshape(len(index), at.size**2, 3)
    matched = np.matmul(bank.masks, patches.transpose(1, 0, 2).reshape(at.size**2, -1))
    matched = matched.reshape(len(bank.masks), len(index), 3)
    objects = []
    for k, i in enumerate(picture):
        outlined = matched[: bank.outlines, k] @ background[i]
        energy = bank.energy(background[i])
        gain = 2 * (matched[:, k] @ _COLORS.T - outlined[bank.outline][:, None]) - energy
        t, color = np.unravel_index(int(gain.argmax()), gain.shape)
        shape, texture, radius, dx, dy = bank.meaning(int(t))
        centre = (float((x[k] + 0.5 + dx) / side), float((y[k] + 0.5 + dy) / side))
        explained = float(gain[t, color] / energy[t, color])
        words = (shape, tuple(COLORS)[color], size, texture)
        objects.append((float(gain[t, color]), DetectedObject(*words, *centre, radius / side, explained)))
    return objects


class _Bank:
    """Colourless templates of one size as flattened windows: brightness times coverage.

    Plain templates come first and are the outlines of all; ``outline[t]`` is the one of template ``t``.
    """

    def __init__(self, side: int, size: str, radii: int, shifts: int, reach: float) -> None:
        nominal = SIZES[size] * side
        self.half = int(np.ceil(nominal * (1 + RADIUS_JITTER) + reach)) + 1
        jitter = np.linspace(-RADIUS_JITTER, RADIUS_JITTER, radii) if radii > 1 else np.zeros(1)
        shift = np.linspace(-reach, reach, shifts)
        grid = np.meshgrid(nominal * (1 + jitter), shift, shift, indexing="ij")
        self._geometry = np.stack([g.ravel() for g in grid], axis=1)
        self._kinds = [(shape, texture) for texture in TEXTURES for shape in SHAPES]
        at = np.arange(-self.half, self.half + 1, dtype=np.float32)
        radius, dx, dy = (self._geometry[:, k, None].astype(np.float32) for k in range(3))
        u, v = ((at - dx) / radius)[:, None, :], ((at - dy) / radius)[:, :, None]
        drawn = (stamp(shape, texture, u, v, radius[:, :, None]) for shape, texture in self._kinds)
        self.masks = np.stack([alpha * shade for alpha, shade in drawn]).reshape(-1, at.size**2)
        self.outlines = len(SHAPES) * len(self._geometry)
        self.outline = np.tile(np.arange(self.outlines), len(TEXTURES))
        outline = self.masks[: self.outlines]
        self._ink_ink = np.square(self.masks).sum(-1)
        self._ink_outline = np.concatenate([(m * outline).sum(-1) for m in np.split(self.masks, len(TEXTURES))])
        self._outline_outline = np.square(outline).sum(-1)[self.outline]

    def energy(self, background: np.ndarray) -> np.ndarray:
        """``|T|^2`` of every template in every colour, (templates, colours)."""
        squared, crossed = np.square(_COLORS).sum(-1), _COLORS @ background
        constant = self._outline_outline * np.square(background).sum()
        return self._ink_ink[:, None] * squared - 2 * self._ink_outline[:, None] * crossed + constant[:, None]

    def meaning(self, template: int) -> tuple[str, str, float, float, float]:
        """(shape, texture, radius, dx, dy) of a template, in pixels."""
        kind, place = divmod(template, len(self._geometry))
        radius, dx, dy = self._geometry[place]
        return *self._kinds[kind], float(radius), float(dx), float(dy)


@lru_cache(maxsize=16)
def _bank(side: int, size: str, radii: int, shifts: int, reach: float) -> _Bank:
    return _Bank(side, size, radii, shifts, reach)
