"""A bundle as the embedding function of a Chroma collection.

Chroma stores ``get_config()`` with the collection and builds the function again from it, for every call where a
collection was opened without a function. So building opens nothing, and the functions of one process are kept.
"""

import json
from pathlib import Path
from typing import Any, Unpack

from chromadb.api.types import Documents, EmbeddingFunction, Embeddings, Space
from chromadb.utils.embedding_functions import register_embedding_function

from gircse.runtime import BundleError, Embedder, OptionError
from gircse.serving.integrations.bundle_encoder import BundleEncoder, EncoderArguments

_built: dict[str, "ChromaEmbeddingFunction"] = {}


class ChromaEmbeddingFunction(EmbeddingFunction[Documents]):
    """Embeds the documents of a collection, and queries with their own instruction.

    A collection that was made with it refuses another bundle at the same path.

    Example:
        >>> import chromadb
        >>> function = ChromaEmbeddingFunction("gircse-demo-8")
        >>> collection = chromadb.PersistentClient("cards").create_collection("faq", embedding_function=function)
    """

    def __init__(
        self,
        bundle: str | Path | Embedder,
        *,
        query_instruction: str | None = None,
        document_instruction: str | None = None,
        manifest_sha256: str | None = None,
        **arguments: Unpack[EncoderArguments],
    ) -> None:
        """Open a bundle, or take an open embedder.

        Args:
            bundle: bundle directory, or an embedder of one.
            query_instruction: put before queries; None is the bundle's own, an empty text is none.
            document_instruction: put before documents; None is none.
            manifest_sha256: as a collection has stored it; the first text opens the bundle, if it still is that one.
            arguments: ``steps``, ``batch_size``, and those of ``Embedder``.

        Raises:
            GircseError: as ``Embedder`` does.
        """
        self._encoder = BundleEncoder(bundle, **arguments)
        self._query_instruction, self._document_instruction = query_instruction, document_instruction
        self._checked = manifest_sha256 is None
        if self._checked:
            self._encoder.open()
        self._manifest_sha256 = manifest_sha256 or self._encoder.manifest_sha256()

    def __call__(self, input: Documents) -> Embeddings:
        """Embed documents."""
        return list(self._opened().documents(input, self._document_instruction))

    def embed_query(self, input: Documents) -> Embeddings:
        """Embed queries."""
        return list(self._opened().queries(input, self._query_instruction))

    def _opened(self) -> BundleEncoder:
        """Open the bundle, after a look at whether it is still the one of the collection."""
        if not self._checked and self._encoder.manifest_sha256() != self._manifest_sha256:
            raise BundleError(
                self._encoder.config()["bundle"],
                "is not the bundle that this collection was embedded with",
                "vectors of two bundles cannot be compared",
                "Put that bundle back, or embed the documents again into a new collection.",
            )
        self._encoder.open()
        self._checked = True
        return self._encoder

    @staticmethod
    def name() -> str:
        """Return the name that a collection finds this class by."""
        return "gircse"

    def default_space(self) -> Space:
        """Return the distance of a collection that names none."""
        return "cosine"

    def get_config(self) -> dict[str, Any]:
        """Return what a collection stores: path and arguments, and the SHA-256 of the manifest."""
        return self._encoder.config() | {
            "query_instruction": self._query_instruction,
            "document_instruction": self._document_instruction,
            "manifest_sha256": self._manifest_sha256,
        }

    @staticmethod
    def build_from_config(config: dict[str, Any]) -> "ChromaEmbeddingFunction":
        """Return the function of a stored collection; its bundle is opened with the first text."""
        key = json.dumps(config, sort_keys=True)
        if key not in _built:
            _built[key] = ChromaEmbeddingFunction(**config)
        return _built[key]

    def validate_config_update(self, old_config: dict[str, Any], new_config: dict[str, Any]) -> None:
        """Refuse to change what the vectors of documents depend on.

        Raises:
            OptionError: the bundle, the number of steps or the documents' instruction is another.
        """
        for name in ("manifest_sha256", "steps", "document_instruction"):
            if old_config[name] != new_config[name]:
                raise OptionError(
                    name,
                    f"is {new_config[name]!r}",
                    f"the documents of this collection were embedded with {old_config[name]!r}",
                    "Embed them again into a new collection.",
                )


register_embedding_function(ChromaEmbeddingFunction)
