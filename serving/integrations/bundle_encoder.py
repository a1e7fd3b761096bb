"""What every adapter holds: a bundle that is opened when it is needed, and how its texts are embedded."""

import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Unpack, cast
from weakref import WeakValueDictionary

from gircse.runtime import BundleError, Embedder, OptionError
from gircse.runtime.batch_planner import DEFAULT_BATCH_SIZE
from gircse.runtime.bundle import Bundle
from gircse.runtime.numerics import Float32
from gircse.runtime.open_arguments import OpenArguments

_open: WeakValueDictionary[str, Embedder] = WeakValueDictionary()
_opening = threading.Lock()


class EncoderArguments(OpenArguments, total=False):
    """The keyword arguments that every adapter takes: those of ``Embedder``, and two of ``Embedder.encode``."""

    steps: int | None
    batch_size: int


class BundleEncoder:
    """Embeds queries and documents with a bundle, given by its path or by an open embedder.

    It opens the bundle with the first text, or by ``open``. Encoders of one process share what they opened with equal
    arguments, and a pickle holds path and arguments.
    """

    def __init__(
        self,
        bundle: str | Path | Embedder,
        *,
        steps: int | None = None,
        batch_size: int = DEFAULT_BATCH_SIZE,
        **arguments: Unpack[OpenArguments],
    ) -> None:
        """Take a path or an open embedder, which stays the caller's to close.

        Args:
            bundle: bundle directory, or an embedder of one.
            steps: refinement steps, 0 to the bundle's K; None is K.
            batch_size: maximum texts per batch.
            arguments: those of ``Embedder``; none with an open embedder.

        Raises:
            OptionError: there are arguments with an open embedder.
        """
        self._steps, self._batch_size = steps, batch_size
        self._embedder: Embedder | None = None
        self._path, self._arguments = str(bundle), cast(OpenArguments | None, _plain(arguments))
        if isinstance(bundle, Embedder):
            if arguments:
                hint = "Pass the path of the bundle instead of an embedder."
                raise OptionError(", ".join(arguments), "cannot be given with an open embedder", hint=hint)
            self._path, self._arguments = bundle.path, bundle.arguments
            self._embedder = self._checked(bundle)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return _from_config, (self.config(),)

    def config(self) -> dict[str, Any]:
        """Return the arguments that make this encoder again, ready for JSON.

        Raises:
            OptionError: the embedder was made from an open session, which no path can open again.
        """
        if self._arguments is None:
            raise OptionError("embedder", "was made from an open session", hint="Pass the path of the bundle.")
        return {"bundle": self._path, "steps": self._steps, "batch_size": self._batch_size, **self._arguments}

    def open(self) -> Embedder:
        """Open the bundle, if it is not open.

        Raises:
            BundleError: the bundle cannot be used.
            ProviderError: the provider is not installed or cannot run the bundle.
            OptionError: an argument is out of range.
        """
        if self._embedder is None:
            self._embedder = self._checked(_shared_embedder(self._path, self._arguments or {}))
        return self._embedder

    def manifest_sha256(self) -> str:
        """Return the SHA-256 of the manifest, which holds that of every file: what tells one bundle from another.

        Raises:
            BundleError: there is no bundle, or another one than the one that is open.
        """
        bundle = Bundle.open(self._path)
        if self._embedder is not None and bundle.manifest != self._embedder.manifest:
            raise BundleError(self._path, "was replaced after it was opened", hint="Open it again.")
        return bundle.manifest_sha256()

    def queries(self, texts: Sequence[str], instruction: str | None) -> Float32:
        """Embed queries, (n, hidden) float32 unit vectors; an instruction of None is the bundle's for queries."""
        encode = self.open().encode_query
        return encode(texts, instruction=instruction, steps=self._steps, batch_size=self._batch_size)

    def documents(self, texts: Sequence[str], instruction: str | None, *, show_progress: bool = False) -> Float32:
        """Embed documents, (n, hidden) float32 unit vectors; an instruction of None is none."""
        encode = self.open().encode_document
        options: dict[str, Any] = {"steps": self._steps, "batch_size": self._batch_size}
        return encode(texts, instruction=instruction, show_progress=show_progress, **options)

    def _checked(self, embedder: Embedder) -> Embedder:
        embedder.encode([], steps=self._steps, batch_size=self._batch_size)  # a wrong number shows now
        return embedder


def _from_config(config: dict[str, Any]) -> BundleEncoder:
    return BundleEncoder(**config)


def _plain(arguments: OpenArguments) -> dict[str, Any]:
    """Return arguments whose enumerators are strings, as JSON and YAML have them."""
    return {name: str(value) if isinstance(value, str) else value for name, value in arguments.items()}


def _shared_embedder(path: str, arguments: OpenArguments) -> Embedder:
    """Return the embedder that another adapter holds of this bundle, opened with these arguments, or open it."""
    key = json.dumps([str(Path(path).resolve()), Bundle.open(path).manifest_sha256(), arguments], sort_keys=True)
    with _opening:
        embedder = _open.get(key)
        if embedder is None:
            embedder = _open[key] = Embedder(path, **arguments)
        return embedder
