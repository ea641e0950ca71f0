from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from pared_bench import BenchContext, DemoContext
from pared_bench.progress import PlainProgress, RichProgress


def test_a_context_turns_names_into_a_device_and_a_path() -> None:
    context = DemoContext("cpu", seed=3, out="somewhere")
    assert context.device == torch.device("cpu")
    assert (context.seed, context.full, context.out) == (3, False, Path("somewhere"))


def test_track_yields_every_item_and_tells_the_length() -> None:
    stream = io.StringIO()
    context = BenchContext(progress=PlainProgress(stream))
    assert list(context.track([1, 2, 3], "sampling")) == [1, 2, 3]
    assert "sampling: 3 steps" in stream.getvalue()


def test_track_takes_an_iterator_of_unknown_length() -> None:
    context = BenchContext(progress=PlainProgress(None))
    assert list(context.track(iter("ab"), "reading")) == ["a", "b"]


def test_plain_progress_tells_how_far_a_long_task_is() -> None:
    stream = io.StringIO()
    progress = PlainProgress(stream, every=0.0)
    task = progress.begin("work", 2)
    progress.advance(task)
    assert stream.getvalue().splitlines() == ["work: 2 steps", "work: 1/2"]


def test_a_task_ends_when_the_loop_is_left_early() -> None:
    ended: list[int] = []

    class Watch(PlainProgress):
        def end(self, task: int) -> None:
            ended.append(task)

    context = BenchContext(progress=Watch(None))
    for _ in context.track(range(5), "work"):
        break
    assert ended


def test_bars_show_brackets_of_a_message_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    with RichProgress() as bars:
        context = DemoContext(progress=bars)
        list(context.track(range(2), "sampling [32, 32]"))
        context.log("shape [bold] 2")
    assert "shape [bold] 2" in capsys.readouterr().err
