"""Files that are written atomically."""

import contextlib
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Yield a scratch file that becomes ``path`` if the block succeeds and is deleted if it fails.

    Its permissions are those that the umask gives to any new file, which those of ``tempfile`` are not.

    Raises:
        OSError: the folder does not exist or cannot be written.
    """
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with scratch.open("xb") as file:
            yield file
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
