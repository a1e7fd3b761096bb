"""What every report is made of: its directory, Markdown tables and files that appear whole or not at all."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from gircse.runtime.atomic_file import atomic_write
from gircse.runtime.errors import MeasurementError


def open_report_directory(directory: Path | None) -> None:
    """Make the directory and see that it can be written, before the measurement and not after it.

    Raises:
        MeasurementError: it cannot.
    """
    if directory is None:
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as err:
        raise MeasurementError(
            f"--report {directory}: {err.strerror} | a directory that can be written | choose another"
        ) from err


def write_files(contents: Mapping[str, bytes], directory: Path) -> list[Path]:
    """Write file names to contents; other files are left alone.

    Returns:
        The files.
    """
    for name, content in contents.items():
        with atomic_write(directory / name) as file:
            file.write(content)
    return [directory / name for name in contents]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
