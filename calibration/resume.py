"""Finished parts of a running calibration on disk, in the folder ``FILE.partial``, so that an interrupted one resumes.

Each part is a safetensors file that appears when it is complete, so a calibration may be killed at any point. A file
identifies the run: with another model, other texts or other settings a calibration starts from the beginning.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gircse.runtime.atomic_file import atomic_write

_IDENTITY, _FACTS = "identity.json", "gircse.facts"


class ResumeFolder:
    """The finished parts of a calibration, by name.

    Attributes:
        path: of the folder; other scratch files of the same run may lie there too.
    """

    def __init__(self, path: Path, *, identity: str) -> None:
        """Open the folder; what another run left in it is deleted.

        Args:
            path: of the folder.
            identity: everything that the parts depend on.

        Raises:
            OSError: it cannot be written.
        """
        self.path = path
        if self._identity() != identity:
            self.remove()
            path.mkdir()
            with atomic_write(path / _IDENTITY) as file:
                file.write(identity.encode())

    def save(self, name: str, tensors: Mapping[str, Tensor], facts: str = "") -> None:
        """Write a part.

        Args:
            name: of the part.
            tensors: by name.
            facts: a text that is kept with them.

        Raises:
            OSError: it cannot be written.
        """
        content = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        with atomic_write(self._file(name)) as file:
            try:
                save_file(content, file.name, {_FACTS: facts})
            except SafetensorError as err:
                raise OSError(None, str(err)) from err

    def facts(self, name: str) -> str | None:
        """Return the text of a part; None if there is no such part, or it is damaged."""
        try:
            with safe_open(self._file(name), framework="pt") as file:
                return str((file.metadata() or {})[_FACTS])
        except (FileNotFoundError, SafetensorError):
            return None

    def names(self, name: str) -> list[str]:
        """Return the names of a part's tensors."""
        with safe_open(self._file(name), framework="pt") as file:
            return list(file.keys())

    def tensor(self, name: str, key: str) -> Tensor:
        """Return one tensor of a part."""
        with safe_open(self._file(name), framework="pt") as file:
            tensor: Tensor = file.get_tensor(key)
        return tensor

    def remove(self) -> None:
        """Delete the folder, if there is one."""
        if self.path.is_dir():
            shutil.rmtree(self.path)
        else:
            self.path.unlink(missing_ok=True)  # a file of an older version

    def _file(self, name: str) -> Path:
        return self.path / f"{name}.safetensors"

    def _identity(self) -> str | None:
        try:
            return (self.path / _IDENTITY).read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            return None
