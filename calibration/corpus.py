"""Texts to calibrate on: a file of one text a line."""

from pathlib import Path

from gircse.runtime.errors import CheckpointError


def read_texts(path: Path) -> list[str]:
    """Read the texts of a UTF-8 file, one a line; empty lines are left out.

    Raises:
        CheckpointError: the file cannot be read, is no UTF-8, or holds no text.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as err:
        raise CheckpointError(f"{path}: {err.strerror} | a file of one text a line | check the path") from err
    except UnicodeDecodeError as err:
        raise CheckpointError(
            f"{path}: byte {err.start} is no UTF-8 | UTF-8 text | convert it: iconv -f latin1 -t utf-8"
        ) from err
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise CheckpointError(f"{path}: no text | one text a line | check the path")
    return texts
