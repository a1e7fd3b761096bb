"""``calibration.moments.safetensors``, next to ``calibration.json``: the second moments that weights are rounded by.

``calibration.json`` holds the file's SHA-256, so that only files of one calibration are used together.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO, Self

from safetensors import SafetensorError, safe_open

from gircse.calibration.int8.gptq import Moments, moment_blocks
from gircse.runtime.bundle import file_sha256
from gircse.runtime.errors import CalibrationError

_SUFFIX, _PREFIX = ".moments.safetensors", "moments."


class MomentsFile:
    """The second moments of a calibration, read one input at a time."""

    def __init__(self, path: Path) -> None:
        """Take a file whose hash was checked; ``open`` does both."""
        self._path = path

    @classmethod
    def open(cls, calibration: Path, sha256: str) -> Self:
        """Find the file next to a ``calibration.json`` and check its hash.

        Args:
            calibration: path of the ``calibration.json``.
            sha256: what it says about the file.

        Raises:
            CalibrationError: it is missing, or belongs to another calibration.
        """
        path = moments_path(calibration)
        try:
            found = file_sha256(path)
        except OSError as err:
            raise CalibrationError(
                f"--calibration {calibration}",
                f"needs {path.name} next to it, which cannot be read: {err.strerror}",
                None,
                "gircse-calibrate wrote both files: copy both.",
            ) from err
        if found != sha256:
            raise CalibrationError(
                str(path),
                f"has SHA-256 {found}",
                f"{calibration.name} names {sha256}",
                "Copy both files of one calibration.",
            )
        return cls(path)

    def read(self, name: str) -> Moments:
        """Return the blocks of H of an input.

        Args:
            name: of the input.

        Raises:
            CalibrationError: the file does not have it, or is damaged.
        """
        try:
            with safe_open(self._path, framework="pt") as file:
                count = sum(key.rpartition(".")[0] == f"{_PREFIX}{name}" for key in file.keys())
                if not count:
                    raise CalibrationError(str(self._path), f"has no moments of {name}", None, "Calibrate again.")
                return [file.get_tensor(moment_name(name, index)) for index in range(count)]
        except (SafetensorError, OSError) as err:
            raise CalibrationError(str(self._path), f"cannot be read: {err}", None, "Calibrate again.") from err


def moments_path(calibration: Path) -> Path:
    """Return the path of the moments that belong to a ``calibration.json``."""
    return calibration.with_name(calibration.stem + _SUFFIX)


def write_moments(file: BinaryIO, widths: Mapping[str, int], read: Callable[[str], Moments]) -> str:
    """Write the content of the file, one input at a time: that of a 7B model has 1.7 GB.

    Args:
        file: to write to.
        widths: of every input, by name.
        read: returns the blocks of H of an input.

    Returns:
        The SHA-256 of what was written.
    """
    header, end = {}, 0
    for name, width in widths.items():
        for index, inputs in enumerate(moment_blocks(width)):
            size = inputs.stop - inputs.start
            start, end = end, end + 4 * size * size
            header[moment_name(name, index)] = {"dtype": "F32", "shape": [size, size], "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the format aligns the data
    hashed = hashlib.sha256()

    def write(content: bytes) -> None:
        file.write(content)
        hashed.update(content)

    write(len(encoded).to_bytes(8, "little") + encoded)
    for name in widths:
        for block in read(name):
            write(block.contiguous().numpy().tobytes())
    return hashed.hexdigest()


def moment_name(name: str, index: int) -> str:
    """Return the name of the tensor with one block of an input."""
    return f"{_PREFIX}{name}.{index}"
