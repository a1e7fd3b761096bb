"""``calibration.moments.safetensors``, beside ``calibration.json``: the second moments that weights are rounded by.

``calibration.json`` holds the file's SHA-256, so that the two are used together or not at all.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Self

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from gircse.calibration.int8.gptq import Moments
from gircse.runtime.bundle import file_sha256
from gircse.runtime.errors import CheckpointError

_SUFFIX, _PREFIX = ".moments.safetensors", "moments."


class MomentsFile:
    """The second moments of a calibration, read input by input."""

    def __init__(self, path: Path) -> None:
        """Take a file that was checked."""
        self._path = path

    @classmethod
    def open(cls, calibration: Path, sha256: str) -> Self:
        """Find the file beside a ``calibration.json`` that gives its SHA-256.

        Raises:
            CheckpointError: it is not there, or belongs to another calibration.
        """
        path = moments_path(calibration)
        try:
            found = file_sha256(path)
        except OSError as err:
            raise CheckpointError(
                f"--calibration {calibration}: {path.name}, beside it: {err.strerror} | the file that gircse-calibrate "
                "wrote with it | copy both"
            ) from err
        if found != sha256:
            raise CheckpointError(
                f"{path}: SHA-256 {found} | {sha256}, as {calibration.name} has | copy both files of one calibration"
            )
        return cls(path)

    def read(self, site: str) -> Moments:
        """Return the blocks of H of an input.

        Raises:
            CheckpointError: the file does not have it.
        """
        with safe_open(self._path, framework="pt") as file:
            count = sum(name.rpartition(".")[0] == f"{_PREFIX}{site}" for name in file.keys())
            if not count:
                raise CheckpointError(f"{self._path}: no moments of {site} | those of every input | calibrate again")
            return [file.get_tensor(moment_name(site, index)) for index in range(count)]


def moments_path(calibration: Path) -> Path:
    """Return the path of the moments of a ``calibration.json``."""
    return calibration.with_name(calibration.stem + _SUFFIX)


def moments_content(moments: Mapping[str, Moments]) -> bytes:
    """Return the content of the file."""
    return save(moment_tensors(moments))


def moment_name(site: str, index: int) -> str:
    """Return the tensor's name of one block."""
    return f"{_PREFIX}{site}.{index}"


def moment_tensors(moments: Mapping[str, Moments]) -> dict[str, Tensor]:
    """Return all blocks by name."""
    return {moment_name(site, index): block for site, blocks in moments.items() for index, block in enumerate(blocks)}
