r"""Texts from files, one text per line: the reader that all commands share.

A file is UTF-8, with or without a byte order mark; one whose name ends in ``.gz`` is unpacked. A line ends at ``\n`` or
``\r\n`` and nowhere else (``str.splitlines`` would also cut a text in two at a form feed or U+2028), and its text is
everything before that, spaces included. Blank lines are the caller's choice: ``read_lines`` keeps them, so that line
i + 1 is text i, and ``read_texts`` leaves them out.

Lines are read when they are asked for: a file of any size takes no memory.
"""

import codecs
import contextlib
import gzip
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from gircse.runtime.errors import TextFileError


class TextLine(NamedTuple):
    """One line.

    Attributes:
        where: file and number of the line, for errors.
        text: the line without its end.
    """

    where: str
    text: str


def read_texts(path: Path) -> list[str]:
    """Read the texts of a file; lines of white space alone are left out.

    Raises:
        TextFileError: the file cannot be read, is not UTF-8, or holds no text.
    """
    texts = [line.text for line in read_lines(path) if line.text.strip()]
    if not texts:
        raise TextFileError(str(path), "has no text", "one text per line is expected", "Check the path.")
    return texts


def read_lines(path: Path) -> Iterator[TextLine]:
    """Yield every line of a file, blank ones too.

    Raises:
        TextFileError: the file cannot be read or is not UTF-8.
    """
    with (
        _named_errors(str(path)),
        gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file,
    ):
        yield from decode_lines(file, str(path))


def read_stdin() -> Iterator[TextLine]:
    """Yield every line of stdin, blank ones too.

    Raises:
        TextFileError: it is closed, cannot be read, or is not UTF-8.
    """
    if sys.stdin is None:  # where the shell has closed it
        raise TextFileError("stdin", "is closed", None, "Redirect a file to it, or name one with --input.")
    return decode_lines(sys.stdin.buffer, "stdin")


def decode_lines(lines: Iterable[bytes], name: str) -> Iterator[TextLine]:
    """Yield every line of an open file, blank ones too.

    Args:
        lines: a file that was opened in binary mode.
        name: of the file, for errors.

    Raises:
        TextFileError: the file cannot be read, or a line is not UTF-8.
    """
    with _named_errors(name):
        for number, line in enumerate(lines, start=1):
            where = f"{name}, line {number}"
            content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if not content:  # a byte order mark and nothing else
                return
            yield TextLine(where, _decode(content.removesuffix(b"\n").removesuffix(b"\r"), where))


def _decode(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as err:
        raise TextFileError(
            f"{where},",
            f"is not UTF-8: {err.reason} at byte {err.start}",
            None,
            "Convert the file, for example with iconv.",
        ) from err


@contextlib.contextmanager
def _named_errors(name: str) -> Iterator[None]:
    """Turn whatever reading and unpacking raise into an error that names the file."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as err:
        reason = getattr(err, "strerror", None) or err
        raise TextFileError(name, f"cannot be read: {reason}", None, "Check the path.") from err
