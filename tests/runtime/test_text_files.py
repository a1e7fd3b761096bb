"""One reader of texts for every command: what a line is, which lines count, and what cannot be read."""

import gzip
import io
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
    with pytest.raises(TextFileError, match=r"texts\.txt: no text \| one text a line \| check the path"):
        read_texts(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("texts.txt", b"fine\ncaf\xe9\n", r"texts\.txt, line 2: .* at byte 3 \| UTF-8 \| convert the file"),
        ("texts.txt", b"\xef\xbb\xbf\xff\n", r"line 1: invalid start byte at byte 0 \| UTF-8"),
        ("texts.txt", None, r"texts\.txt: No such file or directory \| a text file .* \| check the path"),
        ("texts.txt.gz", b"no gzip", r"texts\.txt\.gz: Not a gzipped file .* \| a text file that can be read"),
        ("texts.txt.gz", gzip.compress(b"cut off\n")[:-6], r"Compressed file ended before .* \| a text file"),
        (
            "texts.txt.gz",
            gzip.compress(b"")[:10] + b"\xff" * 20,
            r"texts\.txt\.gz: .*decompress.* \| a text file",
        ),
        ("texts.txt.gz", gzip.compress(b"\xff\n"), r"texts\.txt\.gz, line 1: invalid start byte"),
        (".", None, r"\S+: Is a directory \| a text file"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(TextFileError, match=message):
        list(read_lines(tmp_path / name))
