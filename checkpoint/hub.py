"""Downloads from Hugging Face: a snapshot of a repository, or only what says what a snapshot would hold."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from gircse.runtime.errors import CheckpointError

Download = Callable[[str, str | None, Sequence[str]], Path]
"""Takes a repository, a revision or None, and patterns of file names; returns a directory named like the commit."""


def download_snapshot(repository: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """Download the files of a repository that match, unless they are in the cache.

    Raises:
        CheckpointError: they cannot be downloaded.
    """
    from huggingface_hub import snapshot_download

    with _translated(repository, revision):
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(patterns)))


def hub_cache() -> Path:
    """Return the directory that downloads go to."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


class HeaderDownload:
    """A ``Download`` that fetches small files, and of safetensors their headers.

    A file of weights that is not in the cache becomes a sparse file: header and size are right, every value is 0, and
    it takes no space. So whatever looks at headers alone works on it.

    Attributes:
        missing_bytes: of the weights that a download of the whole would still have to fetch.
    """

    def __init__(self, directory: Path) -> None:
        """Take a directory for what stands in for the weights; small files go to the cache as ever."""
        self.missing_bytes = 0
        self._directory = directory

    def __call__(self, repository: str, revision: str | None, patterns: Sequence[str]) -> Path:
        """Make a directory of a repository's files.

        Raises:
            CheckpointError: they cannot be downloaded.
        """
        from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache
        from huggingface_hub.utils._paths import filter_repo_objects

        if constants.HF_HUB_OFFLINE:
            return download_snapshot(repository, revision, patterns)
        with _translated(repository, revision):
            info = HfApi().model_info(repository, revision=revision, files_metadata=True)
            snapshot = self._directory / repository.replace("/", "--") / str(info.sha)
            snapshot.mkdir(parents=True)
            names = [file.rfilename for file in info.siblings or () if "/" not in file.rfilename]
            for name in filter_repo_objects(names, allow_patterns=list(patterns)):
                cached = try_to_load_from_cache(repository, name, revision=info.sha)
                if not isinstance(cached, str) and name.endswith(".safetensors"):
                    self.missing_bytes += _write_stand_in(snapshot / name, repository, str(info.sha))
                    continue
                if not isinstance(cached, str):
                    cached = hf_hub_download(repository, name, revision=info.sha)
                (snapshot / name).symlink_to(os.path.abspath(cached))
        return snapshot


def _write_stand_in(path: Path, repository: str, commit: str) -> int:
    """Write the header of a safetensors file, and nothing where its values are; returns the size of the file."""
    from huggingface_hub import parse_safetensors_file_metadata

    tensors = parse_safetensors_file_metadata(repository, path.name, revision=commit).tensors
    header = {
        name: {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": tensor.data_offsets}
        for name, tensor in tensors.items()
    }
    content = json.dumps(header).encode()
    size = 8 + len(content) + max((tensor.data_offsets[1] for tensor in tensors.values()), default=0)
    with path.open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        file.truncate(size)
    return size


@contextlib.contextmanager
def _translated(repository: str, revision: str | None) -> Iterator[None]:
    try:
        yield
    except Exception as err:  # hub, HTTP and socket errors share only Exception
        at = f" at revision {revision}" if revision else ""
        reason = (str(err) or "no message").splitlines()[0]
        raise CheckpointError(
            f"{repository}{at}",
            f"cannot be downloaded from Hugging Face ({type(err).__name__}: {reason})",
            None,
            "Check the name and the network, run 'hf auth login' for a gated model, or pass a local directory.",
        ) from err
