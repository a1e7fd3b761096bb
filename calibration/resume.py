"""State of a running calibration on disk, ``FILE.partial``, so that an interrupted one resumes.

It is a safetensors file whose metadata identifies the run: with another model, other texts or other settings a
calibration starts from the beginning.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from gircse.runtime.atomic_file import atomic_write

SAVE_SECONDS = 20.0
"""Minimum time between two saves; a killed run loses no more work than this."""

_IDENTITY = "gircse.identity"


class ResumeState:
    """The saved state of a calibration."""

    def __init__(self, path: Path, *, identity: str) -> None:
        """Name the file; nothing is read or written yet.

        Args:
            path: of the file.
            identity: everything that the state depends on.
        """
        self._path, self._identity = path, identity
        self._saved = time.monotonic()

    def load(self) -> Mapping[str, Tensor] | None:
        """Return the saved state; None if there is none, it is damaged, or it belongs to another run."""
        try:
            with safe_open(self._path, framework="pt") as file:
                if (file.metadata() or {}).get(_IDENTITY) != self._identity:
                    return None
                return {name: file.get_tensor(name) for name in file.keys()}
        except (FileNotFoundError, SafetensorError):
            return None

    def save_if_due(self, state: Callable[[], Mapping[str, Tensor]]) -> None:
        """Save if the last save was ``SAVE_SECONDS`` ago."""
        if time.monotonic() - self._saved >= SAVE_SECONDS:
            self.save(state())

    def save(self, state: Mapping[str, Tensor]) -> None:
        """Replace the file atomically.

        Raises:
            OSError: it cannot be written.
        """
        content = save({name: tensor.contiguous() for name, tensor in state.items()}, {_IDENTITY: self._identity})
        with atomic_write(self._path) as file:
            file.write(content)
        self._saved = time.monotonic()

    def remove(self) -> None:
        """Delete the file, if there is one."""
        self._path.unlink(missing_ok=True)
