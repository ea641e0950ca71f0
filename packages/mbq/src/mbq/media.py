"""Pictures and frames of clips from files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mbq.errors import CalibrationError

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
ANIMATED = (".gif", ".webp", ".png")


def picture_of(path: Path) -> Any:
    """The picture in a file, a PIL image in RGB; raises CalibrationError naming a file that holds none."""
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(path).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise CalibrationError(f"{path.name} is no picture that can be read ({error})") from None


def frames_of(path: Path, count: int) -> np.ndarray:
    """Up to `count` evenly spaced frames of a clip, uint8 (frames, height, width, 3).

    The clip is a folder of pictures in the order of their names, an animated picture, or a film, which transformers
    reads with PyAV.

    Raises CalibrationError naming a clip that cannot be read, or whose pictures differ in size.
    """
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in PICTURES)
        if not files:
            raise CalibrationError(f"{path.name} holds none of {', '.join(PICTURES)}")
        pictures = [np.asarray(picture_of(files[i])) for i in spaced(len(files), count)]
    elif path.suffix.lower() in ANIMATED:
        pictures = _animation(path, count)
    else:
        return _film(path, count)
    if len({picture.shape for picture in pictures}) > 1:
        raise CalibrationError(f"the frames of {path.name} are not of one size")
    return np.stack(pictures)


def spaced(total: int, count: int) -> list[int]:
    """Up to `count` numbers below `total`, evenly spaced from the first to the last."""
    taken = min(total, count)
    return [round(i * (total - 1) / max(taken - 1, 1)) for i in range(taken)]


def _animation(path: Path, count: int) -> list[np.ndarray]:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as animation:
            pictures = []
            for place in spaced(getattr(animation, "n_frames", 1), count):
                animation.seek(place)
                pictures.append(np.asarray(animation.convert("RGB")))
            return pictures
    except (UnidentifiedImageError, OSError) as error:
        raise CalibrationError(f"{path.name} is no animation that can be read ({error})") from None


def _film(path: Path, count: int) -> np.ndarray:
    from transformers.video_utils import load_video

    def indices(metadata: Any, **_: Any) -> np.ndarray:
        return np.array(spaced(metadata.total_num_frames, count))

    try:
        return np.asarray(load_video(str(path), sample_indices_fn=indices)[0])
    except Exception as error:  # whatever the library that decodes it raises
        raise CalibrationError(
            f"{path.name} cannot be read as a film ({error}); a film needs the package av, a folder of frames does not"
        ) from error
