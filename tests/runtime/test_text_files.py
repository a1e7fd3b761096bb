"""One reader of texts for every command: what a line is, which lines count, and what cannot be read."""

import gzip
import io
from collections.abc import Iterator
from pathlib import Path

import pytest

from gircse.runtime import TextFileError
from gircse.runtime.text_files import decode_lines, read_lines, read_texts


def lines_of(content: bytes) -> list[str]:
    return [line.text for line in decode_lines(io.BytesIO(content), "here")]


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (b"", []),
        (b"one", ["one"]),
        (b"one\ntwo\n", ["one", "two"]),
        (b"one\r\ntwo\r\n\r\n", ["one", "two", ""]),
        (b"\n\none\n \n", ["", "", "one", " "]),
        (b" one \t\n", [" one \t"]),
        ("a\u2028b\u2029c\x0bd\x0ce\x1cf\x85g\rh\n".encode(), ["a\u2028b\u2029c\x0bd\x0ce\x1cf\x85g\rh"]),
        ("\ufeffone\n\ufefftwo".encode(), ["one", "\ufefftwo"]),
        ("\ufeff\n".encode(), [""]),
        ("\ufeff".encode(), []),
    ],
)
def test_lines(content: bytes, lines: list[str]) -> None:
    assert lines_of(content) == lines


def test_a_line_knows_where_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    path.write_bytes(b"one\n\nthree\n")
    assert list(read_lines(path)) == [
        (f"{path}, line 1", "one"),
        (f"{path}, line 2", ""),
        (f"{path}, line 3", "three"),
    ]


def test_texts_are_the_lines_that_are_not_blank(tmp_path: Path) -> None:
    content = "\ufeffone\r\n\n \t\u2003\n  two \n".encode()
    plain, packed = tmp_path / "texts.txt", tmp_path / "texts.txt.gz"
    plain.write_bytes(content)
    packed.write_bytes(gzip.compress(content))
    for path in (plain, packed):
        assert read_texts(path) == ["one", "  two "]
        assert len(list(read_lines(path))) == 4


@pytest.mark.parametrize("content", [b"", b"\n \n", "\ufeff\n".encode()])
def test_no_text(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "texts.txt"
    path.write_bytes(content)
    with pytest.raises(
        TextFileError, match=r"texts\.txt has no text; one text per line is expected\. Check the path\."
    ):
        read_texts(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("texts.txt", b"fine\ncaf\xe9\n", r"texts\.txt, line 2, is not UTF-8: .* at byte 3\. Convert the file"),
        ("texts.txt", b"\xef\xbb\xbf\xff\n", r"line 1, is not UTF-8: invalid start byte at byte 0\."),
        ("texts.txt", None, r"texts\.txt cannot be read: No such file or directory\. Check the path\."),
        ("texts.txt.gz", b"no gzip", r"texts\.txt\.gz cannot be read: Not a gzipped file"),
        ("texts.txt.gz", gzip.compress(b"cut off\n", mtime=0)[:-6], r"cannot be read: Compressed file ended before"),
        (
            "texts.txt.gz",
            gzip.compress(b"", mtime=0)[:10] + b"\xff" * 20,
            r"texts\.txt\.gz cannot be read: .*decompress",
        ),
        (
            "texts.txt.gz",
            gzip.compress(b"\xff\n", mtime=0),
            r"texts\.txt\.gz, line 1, is not UTF-8: invalid start byte",
        ),
        (".", None, r"\S+ cannot be read: Is a directory"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(TextFileError, match=message):
        list(read_lines(tmp_path / name))


def test_lines_are_read_when_they_are_asked_for() -> None:
    asked = 0

    def content() -> Iterator[bytes]:
        nonlocal asked
        for asked in range(1, 100):  # noqa: B007
            yield b"line\n"

    lines = decode_lines(content(), "here")
    assert [next(lines).text for _ in range(3)] == ["line"] * 3
    assert asked == 3


def test_a_failing_stream_is_named() -> None:
    def content() -> Iterator[bytes]:
        yield b"one\n"
        raise OSError(5, "Input/output error")

    with pytest.raises(TextFileError, match=r"^stdin cannot be read: Input/output error\. Check the path\.$"):
        list(decode_lines(content(), "stdin"))
