"""Calibration data from files: text, or conversations about pictures as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from mbq.errors import CalibrationError

TEXT, LINES = (".txt", ".md"), (".jsonl",)


def load_batches(path: str | Path, processor: Any, samples: int, length: int) -> list[Any]:
    """Up to `samples` batches from a file, or from the files of a folder in the order of their names.

    Text (.txt, .md) is cut into pieces of `length` tokens, all of them answer. A line of a .jsonl file is a
    conversation, `{"image": "cat.png", "question": "...", "answer": "..."}` with the picture's path relative to the
    file ("image" may be missing); the processor's chat template is applied and the answer's tokens get labels.

    Raises CalibrationError for a path without such files, or a line that is no conversation.
    """
    place = Path(path)
    files = sorted(f for f in place.rglob("*") if f.suffix in (*TEXT, *LINES)) if place.is_dir() else [place]
    files = [file for file in files if file.is_file() and file.suffix in (*TEXT, *LINES)]
    if not files:
        raise CalibrationError(f"{path} holds no {', '.join((*TEXT, *LINES))} file")
    batches: list[Any] = []
    for file in files:
        found = _conversations(file, processor) if file.suffix in LINES else _pieces(file, processor, length)
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


def _conversations(file: Path, processor: Any) -> Iterator[dict[str, Tensor]]:
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
                f'{where}: an object with "question" and "answer" is needed, and "image" if there is one'
            )
        yield labelled(processor, entry["question"], entry["answer"], _picture(file, entry.get("image"), where))


def _picture(file: Path, name: Any, where: str) -> Any:
    if name is None:
        return None
    from PIL import Image

    folder = file.parent.resolve()
    path = (folder / str(name)).resolve()
    if not path.is_relative_to(folder) or not path.is_file():
        raise CalibrationError(f"{where}: image {name!r} is no file beside or below {file.name}")
    return Image.open(path).convert("RGB")


def labelled(processor: Any, question: str, answer: str, image: Any = None) -> dict[str, Tensor]:
    """A batch of one conversation, its answer's tokens labelled, all others -100.

    Raises CalibrationError when the template does not put the answer behind the same tokens as the question alone.
    """
    content: Any = question
    if image is not None:
        content = [{"type": "image"}, {"type": "text", "text": question}]
    asked = [{"role": "user", "content": content}]
    texts = [
        processor.apply_chat_template(asked, add_generation_prompt=True, tokenize=False),
        processor.apply_chat_template([*asked, {"role": "assistant", "content": _said(answer, image)}], tokenize=False),
    ]
    pictures = {} if image is None else {"images": [image]}
    prompt, whole = (dict(processor(text=[text], return_tensors="pt", **pictures)) for text in texts)
    count = prompt["input_ids"].shape[1]
    if not whole["input_ids"][:, :count].equal(prompt["input_ids"]) or whole["input_ids"].shape[1] <= count:
        raise CalibrationError("the chat template does not put an answer behind the prompt; label the batches yourself")
    labels = whole["input_ids"].clone()
    labels[:, :count] = -100
    return {**whole, "labels": labels}


def _said(answer: str, image: Any) -> Any:
    return answer if image is None else [{"type": "text", "text": answer}]
