"""What every report is made of: its directory, Markdown tables, and files that are written atomically."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from gircse.runtime.atomic_file import atomic_write
from gircse.runtime.errors import OutputError


def open_report_directory(directory: Path | None, *, flag: str = "--report") -> None:
    """Create the directory and check that it can be written, before the measurement rather than after it.

    Args:
        directory: value of the flag; None, where no report is wanted, is left alone.
        flag: for errors.

    Raises:
        OutputError: it cannot be created or written.
    """
    if directory is None:
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as err:
        raise OutputError(
            f"{flag} {directory}",
            f"cannot be written: {err.strerror or err}",
            None,
            "Choose a directory that can be written.",
        ) from err


def write_files(contents: Mapping[str, bytes], directory: Path) -> list[Path]:
    """Write files into a directory, each one atomically; other files there are left alone.

    Args:
        contents: file name to content.
        directory: an existing directory.

    Returns:
        The paths, in the same order.

    Raises:
        OSError: a file cannot be written.
    """
    for name, content in contents.items():
        with atomic_write(directory / name) as file:
            file.write(content)
    return [directory / name for name in contents]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; cells are not escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
