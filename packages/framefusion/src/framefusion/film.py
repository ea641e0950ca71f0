"""Frames out of a video file, and pictures of which tokens are left of a clip."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

EXTRA = "pip install 'framefusion[video]'"
MERGED = (230, 60, 60)
PRUNED, JOINED, LEFT = 0, 1, 2
"""What has become of a token."""
MEANING = {
    LEFT: "are left and go through all layers",
    JOINED: "were merged into the one at their place in an earlier frame",
    PRUNED: "were pruned: the question looked at others",
}
WIDTH, GAP, LABEL, LEGEND = 112, 8, 20, 640
"""Pixels: width of a frame, space between frames, height of a line of text, least width of the picture."""


def read_film(path: str | Path, frames: int) -> np.ndarray:
    """`frames` frames spread evenly over a video file, uint8 (frames, height, width, 3).

    Raises FileNotFoundError for a missing file, ValueError for one without pictures, and ModuleNotFoundError, with the
    line to type, without PyAV.
    """
    try:
        import av
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"reading video files needs PyAV: {EXTRA}", name="av") from error
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: there is no such video file")
    try:
        with av.open(str(path)) as container:
            pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    except (av.error.InvalidDataError, IndexError) as error:
        raise ValueError(f"{path}: not a video that PyAV can read ({error})") from error
    if not pictures:
        raise ValueError(f"{path}: the file has no pictures")
    return np.stack([pictures[i] for i in np.linspace(0, len(pictures) - 1, frames).round().astype(int)])


def states_of_tokens(kept: Tensor, groups: Tensor, places: Tensor) -> Tensor:
    """What became of the tokens at `places` (count,) of one sequence: `LEFT`, `JOINED` to another, or `PRUNED`.

    `kept` (n,) int64 positions left in the end, `groups` (tokens,) int64 the row each token went into or -1.
    """
    left = torch.isin(places, kept.to(places.device))
    return torch.where(left, LEFT, torch.where(groups.to(places.device)[places] >= 0, JOINED, PRUNED))


def paint(picture: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """A picture (height, width, 3) uint8 with its tokens drawn on, whose states `grid` (rows, columns) has.

    Tokens that are left show the picture, merged ones are tinted red, pruned ones are nearly black.
    """
    height, width = picture.shape[:2]
    rows = np.arange(height) * grid.shape[0] // height
    columns = np.arange(width) * grid.shape[1] // width
    state = grid[rows][:, columns][..., None]
    shown = picture.astype(np.float32)
    tinted = 0.35 * shown + 0.65 * np.array(MERGED, np.float32)
    out = np.where(state == LEFT, shown, np.where(state == JOINED, tinted, 0.12 * shown))
    # A thin line between tokens.
    out[rows != np.roll(rows, 1)] *= 0.7
    out[:, columns != np.roll(columns, 1)] *= 0.7
    return out.clip(0, 255).astype(np.uint8)


def draw_tokens(frames: np.ndarray, states: Tensor, columns: int = 8) -> Image:
    """Each frame with its tokens below it, in rows of `columns` frames, and a legend that counts them.

    `frames` (count, height, width, 3) uint8; `states` (count, rows, columns) as `states_of_tokens` has them.
    """
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=13)
    grids = states.cpu().numpy()
    height = round(WIDTH * frames.shape[1] / frames.shape[2])
    lines = -(-len(frames) // columns)
    line = LABEL + 2 * (height + GAP) + GAP
    across = min(columns, len(frames)) * (WIDTH + GAP) + GAP
    sheet = Image.new("RGB", (max(across, LEGEND), lines * line + 3 * LABEL + 2 * GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (picture, grid) in enumerate(zip(frames, grids, strict=True)):
        x, y = GAP + index % columns * (WIDTH + GAP), index // columns * line
        draw.text((x, y + 2), f"frame {index + 1}", fill="black", font=font)
        small = Image.fromarray(picture).resize((WIDTH, height), Image.Resampling.BICUBIC)
        sheet.paste(small, (x, y + LABEL))
        sheet.paste(Image.fromarray(paint(np.asarray(small), grid)), (x, y + LABEL + height + GAP // 2))
    swatch = np.asarray(Image.fromarray(frames[0]).resize((LABEL - 4, LABEL - 4)))
    for index, (state, text) in enumerate(MEANING.items()):
        y = lines * line + GAP + index * LABEL
        sheet.paste(Image.fromarray(paint(swatch, np.full((1, 1), state))), (GAP, y + 2))
        share = (grids == state).sum()
        draw.text((GAP + LABEL + 4, y + 2), f"{share} of {grids.size} tokens {text}", fill="black", font=font)
    return sheet


def grid_shape(patches: int, width: int, height: int) -> tuple[int, int]:
    """Rows and columns of a frame of `patches` tokens whose picture is `width` to `height`; (1, patches) if unknown."""
    sides = [(rows, patches // rows) for rows in range(1, patches + 1) if patches % rows == 0]
    return min(sides, key=lambda side: abs(np.log(side[1] / side[0] * height / width)))


def processor_inputs(processor: Any, film: np.ndarray, question: str, device: torch.device) -> dict[str, Any]:
    """Arguments of a model for one question about a film (frames, height, width, 3) uint8, by its own processor."""
    message = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    inputs = processor(text=[text], videos=[film], return_tensors="pt", do_sample_frames=False)
    return {name: value.to(device) for name, value in inputs.items() if isinstance(value, Tensor)}
