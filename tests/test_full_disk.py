"""Files on a full disk: lines wait and are written whole. What a run makes of it is in test_checkpoint.py."""

from __future__ import annotations

import io
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from altgrad.runfiles import LineFile, console_on_stderr


@contextmanager
def room_up_to(size: int) -> Iterator[None]:
    """No file can grow beyond a size, as on a disk that is full: writes end early, or fail."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_lines_wait_and_are_written_whole_once_there_is_room(tmp_path: Path) -> None:
    path = tmp_path / "log"
    file = LineFile(path)
    file.add(["first"])
    assert file.flush()
    file.add(["second", "third"])
    with room_up_to(9):  # in the middle of the second line
        assert not file.flush()
        assert not file.flush()
        assert path.read_bytes() == b"first\nsec"
        assert file.trouble is not None
        assert file.state == {"written": 1, "unwritten": ["second", "third"]}
    file.add(["fourth"])
    assert file.flush()
    assert (file.trouble, file.waiting) == (None, 0)
    file.close()
    assert path.read_text().split() == ["first", "second", "third", "fourth"]


@pytest.mark.parametrize("on_disk", ["first\nsec", "first\nsecond\nthird\nfourth\n", "first\n"])
def test_a_file_goes_on_where_its_state_says(tmp_path: Path, on_disk: str) -> None:
    """Whatever was written after that: nothing, half a line, or lines that will come again."""
    path = tmp_path / "log"
    path.write_text(on_disk)
    file = LineFile(path, {"written": 1, "unwritten": ["second"]})
    file.add(["third"])
    file.flush()
    file.close()
    assert path.read_text().split() == ["first", "second", "third"]


def test_a_line_that_was_lost_in_part_is_dropped(tmp_path: Path) -> None:
    """As by a machine that went down with lines that it had not yet put on its disk."""
    path = tmp_path / "log"
    path.write_text("first\nsec")
    file = LineFile(path, {"written": 2, "unwritten": []})
    file.add(["third"])
    file.flush()
    file.close()
    assert path.read_text().split() == ["first", "third"]


def test_a_file_without_a_state_starts_anew(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("old\n")
    file = LineFile(path)
    file.close()
    assert path.read_text() == ""


def test_a_console_on_a_full_disk_drops_what_it_cannot_write(monkeypatch: pytest.MonkeyPatch) -> None:
    with io.TextIOWrapper(open("/dev/full", "wb", buffering=0), write_through=True) as full:
        with pytest.raises(OSError, match="No space left"):
            full.write("lost")
        monkeypatch.setattr("sys.stderr", full)
        console = console_on_stderr()
        console.print("lost")
        assert not console.is_terminal
