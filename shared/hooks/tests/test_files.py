from __future__ import annotations

from pathlib import Path

import pytest
from pared_hooks.files import write_whole


def test_bytes_and_text_are_written_with_their_folders(tmp_path):
    path = tmp_path / "a" / "b.bin"
    write_whole(path, b"\x00\x01")
    assert path.read_bytes() == b"\x00\x01"
    write_whole(path, "é\n")
    assert path.read_bytes() == b"\xc3\xa9\n"
    assert [one.name for one in path.parent.iterdir()] == ["b.bin"]


def test_a_failure_leaves_the_older_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, "old")

    def full(self, target):
        raise OSError("no space")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="no space"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert [one.name for one in tmp_path.iterdir()] == ["file"]
