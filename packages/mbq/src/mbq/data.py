"""Calibration data from files: text, or conversations about pictures and clips as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mbq.errors import CalibrationError
from mbq.media import frames_of, picture_of

TEXT, LINES = (".txt", ".md"), (".jsonl",)


def load_batches(path: str | Path, processor: Any, samples: int, length: int, frames: int = 8) -> list[Any]:
    """Up to `samples` batches from a file, or from the files of a folder in the order of their names.

    Text (.txt, .md) is cut into pieces of `length` tokens, all of them answer. A line of a .jsonl file is a
    conversation, `{"image": "cat.png", "question": "...", "answer": "..."}`; the processor's chat template is applied
    and the answer's tokens get labels. "image" may be a list of pictures, or "video" stand in its place: a folder of
    frames, an animated picture, or a film that transformers can read; up to `frames` of it are taken. Both may be
    missing. Their paths are relative to the file, and beside or below it.

    Raises CalibrationError for a path without such files, or a line that is no conversation.
    """
    place = Path(path)
    files = sorted(f for f in place.rglob("*") if f.suffix in (*TEXT, *LINES)) if place.is_dir() else [place]
    files = [file for file in files if file.is_file() and file.suffix in (*TEXT, *LINES)]
    if not files:
        raise CalibrationError(f"{path} holds no {', '.join((*TEXT, *LINES))} file")
    batches: list[Any] = []
    for file in files:
        found = _pieces(file, processor, length) if file.suffix in TEXT else _conversations(file, processor, frames)
        for batch in found:
            batches.append(batch)
            if len(batches) == samples:
                return batches
    if not batches:
        raise CalibrationError(f"{path} holds less than one piece of {length} tokens")
    return batches


def _pieces(file: Path, processor: Any, length: int) -> Iterator[Tensor]:
    tokenizer = getattr(processor, "tokenizer", processor)
    ids = tokenizer(file.read_text(encoding="utf-8"), return_tensors="pt", verbose=False).input_ids[0]
    for start in range(0, len(ids) - length + 1, length):
        yield ids[start : start + length][None]


def _conversations(file: Path, processor: Any, frames: int) -> Iterator[dict[str, Tensor]]:
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        where = f"{file.name}, line {number}"
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise CalibrationError(f"{where}: not JSON ({error})") from None
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("question", "answer")):
            raise CalibrationError(
                f'{where}: an object with "question" and "answer" is needed, and "image" or "video" if there is one'
            )
        names = entry.get("image", [])
        images = [picture_of(_beside(file, name, where)) for name in ([names] if isinstance(names, str) else names)]
        video = entry.get("video")
        clip = None if video is None else frames_of(_beside(file, video, where), frames)
        yield labelled(processor, entry["question"], entry["answer"], images, clip)


def _beside(file: Path, name: Any, where: str) -> Path:
    folder = file.parent.resolve()
    path = (folder / str(name)).resolve()
    if not path.is_relative_to(folder) or not path.exists():
        raise CalibrationError(f"{where}: {name!r} is nothing beside or below {file.name}")
    return path


def labelled(
    processor: Any, question: str, answer: str, images: Sequence[Any] = (), video: Any = None
) -> dict[str, Tensor]:
    """A batch of one conversation, its answer's tokens labelled, all others -100.

    `images` are PIL pictures, `video` is an array of frames, uint8 (frames, height, width, 3).

    Raises CalibrationError when the template does not put the answer behind the same tokens as the question alone.
    """
    shown = [{"type": "image"} for _ in images] + ([] if video is None else [{"type": "video"}])
    asked = [{"role": "user", "content": [*shown, {"type": "text", "text": question}] if shown else question}]
    said = [{"type": "text", "text": answer}] if shown else answer
    texts = [
        processor.apply_chat_template(asked, add_generation_prompt=True, tokenize=False),
        processor.apply_chat_template([*asked, {"role": "assistant", "content": said}], tokenize=False),
    ]
    media: dict[str, Any] = {"images": list(images)} if images else {}
    if video is not None:
        # The frames were chosen already.
        media |= {"videos": [video], "do_sample_frames": False}
    prompt, whole = (dict(processor(text=[text], return_tensors="pt", **media)) for text in texts)
    count = prompt["input_ids"].shape[1]
    if not whole["input_ids"][:, :count].equal(prompt["input_ids"]) or whole["input_ids"].shape[1] <= count:
        raise CalibrationError("the chat template does not put an answer behind the prompt; label the batches yourself")
    labels = whole["input_ids"].clone()
    labels[:, :count] = -100
    return {**whole, "labels": labels}
