from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from pared_bench.errors import explain_os_error
from pared_bench.files import atomic_write, own_folder, writable_folder


def test_a_write_makes_parent_folders_and_leaves_one_file(tmp_path: Path) -> None:
    atomic_write(tmp_path / "a" / "b.json", "text")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.json"]
    assert (tmp_path / "a" / "b.json").read_text() == "text"


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_keeps_the_older_file_and_leaves_no_half_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "results.json"
    path.write_text("old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a temporary name")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="No space left") as caught:
        atomic_write(path, "new")
    assert caught.value.filename == str(path)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("results.json", "old")]


def test_ctrl_c_during_a_write_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        atomic_write(tmp_path / "results.json", "new")
    assert list(tmp_path.iterdir()) == []


def test_a_written_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    atomic_write(tmp_path / "ours", "x")
    (tmp_path / "theirs").write_text("x")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "theirs").stat().st_mode


def test_a_file_that_must_not_be_written_is_named_by_its_own_name(
    tmp_path: Path, forbid_writing: Callable[[Path], None]
) -> None:
    forbid_writing(tmp_path / "closed")
    with pytest.raises(PermissionError) as caught:
        atomic_write(tmp_path / "closed" / "page.html", "x")
    assert caught.value.filename == str(tmp_path / "closed" / "page.html")


def test_a_folder_that_is_a_file_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        writable_folder(tmp_path / "file")


def test_a_folder_in_which_nothing_was_written_goes_away(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), own_folder(tmp_path / "empty"):
        raise KeyboardInterrupt
    with own_folder(tmp_path / "full") as place:
        (place / "file").write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


@pytest.mark.parametrize(
    ("code", "words"), [(errno.ENOSPC, "disk is full"), (errno.EACCES, "no permission"), (errno.EROFS, "read-only")]
)
def test_the_systems_refusals_are_put_into_words_with_the_remedy(code: int, words: str) -> None:
    text = explain_os_error(OSError(code, os.strerror(code), "/results/a.json"))
    assert words in text
    assert "/results/a.json" in text
    assert "--out DIR" in text
