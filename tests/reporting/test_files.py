"""A report's directory is checked before the work, and its files are written."""

from pathlib import Path

import pytest

from gircse.reporting.files import markdown_table, open_report_directory, write_files
from gircse.runtime.errors import OutputError


@pytest.mark.parametrize("inside", ["", "report"])
def test_directory_that_cannot_be_written(inside: str, tmp_path: Path) -> None:
    (tmp_path / "taken").write_bytes(b"")
    message = r"^--report .*taken.* cannot be written: .*\. Choose a directory that can be written\.$"
    with pytest.raises(OutputError, match=message):
        open_report_directory(tmp_path / "taken" / inside)
    assert (tmp_path / "taken").read_bytes() == b""


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a directory that even root cannot write to")
def test_directory_that_exists_and_cannot_be_written() -> None:
    with pytest.raises(OutputError, match=r"^--report /proc cannot be written: "):
        open_report_directory(Path("/proc"))


def test_directory_is_created_and_left_empty(tmp_path: Path) -> None:
    open_report_directory(tmp_path / "a" / "report")
    assert list((tmp_path / "a" / "report").iterdir()) == []
    open_report_directory(tmp_path / "a" / "report")


def test_no_report() -> None:
    open_report_directory(None)


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"mine")
    (tmp_path / "a.md").write_bytes(b"old")
    assert write_files({"b.json": b"2", "a.md": b"1"}, tmp_path) == [tmp_path / "b.json", tmp_path / "a.md"]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        "other": b"mine",
        "a.md": b"1",
        "b.json": b"2",
    }


def test_markdown_table() -> None:
    assert markdown_table(("a", "b"), [("1", "2")]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
