r"""Texts from files, one a line: the one reader of every command.

A file is UTF-8, with or without a byte order mark; one whose name ends in ``.gz`` is unpacked. A line ends at ``\n`` or
``\r\n`` and nowhere else (``str.splitlines`` would also cut a text in two at a form feed or U+2028), and its text is what
stands there, spaces included. Blank lines are the caller's choice: ``read_lines`` keeps them, so that line i + 1 is text
i, and ``read_texts`` leaves them out.
"""

import codecs
import gzip
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
    """Read the texts of a file; lines of nothing but white space are left out.

    Raises:
        TextFileError: the file cannot be read, is not UTF-8, or holds no text.
    """
    texts = [line.text for line in read_lines(path) if line.text.strip()]
    if not texts:
        raise TextFileError(f"{path}: no text | one text a line | check the path")
    return texts


def read_lines(path: Path) -> Iterator[TextLine]:
    """Yield every line of a file, blank ones too.

    Raises:
        TextFileError: the file cannot be read or is not UTF-8.
    """
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            yield from decode_lines(file, str(path))
    except (OSError, EOFError, zlib.error) as err:
        came = getattr(err, "strerror", None) or err
        raise TextFileError(f"{path}: {came} | a text file that can be read | check the path") from err


def decode_lines(lines: Iterable[bytes], name: str) -> Iterator[TextLine]:
    """Yield every line of an open file, blank ones too.

    Args:
        lines: a file that was opened in binary mode.
        name: of the file, for errors.

    Raises:
        TextFileError: a line is not UTF-8.
    """
    for number, line in enumerate(lines, start=1):
        where = f"{name}, line {number}"
        content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if not content:  # a byte order mark and nothing else
            return
        try:
            yield TextLine(where, content.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8"))
        except UnicodeDecodeError as err:
            raise TextFileError(
                f"{where}: {err.reason} at byte {err.start} | UTF-8 | convert the file, for example with iconv"
            ) from err
