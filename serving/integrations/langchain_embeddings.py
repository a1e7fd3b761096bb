"""A bundle as ``Embeddings`` of LangChain."""

from pathlib import Path
from typing import Unpack

from langchain_core.embeddings import Embeddings

from gircse.runtime import Embedder
from gircse.serving.integrations.bundle_encoder import BundleEncoder, EncoderArguments


class LangChainEmbeddings(Embeddings):
    """Embeds queries and documents for LangChain's vector stores and retrievers.

    Example:
        >>> embeddings = LangChainEmbeddings("gircse-demo-8")
        >>> len(embeddings.embed_query("How do I reset my PIN?"))
        576
    """

    def __init__(
        self,
        bundle: str | Path | Embedder,
        *,
        query_instruction: str | None = None,
        document_instruction: str | None = None,
        **arguments: Unpack[EncoderArguments],
    ) -> None:
        """Open a bundle, or take an open embedder.

        Args:
            bundle: bundle directory, or an embedder of one.
            query_instruction: put before queries; None is the bundle's own, an empty text is none.
            document_instruction: put before documents; None is none.
            arguments: ``steps``, ``batch_size``, and those of ``Embedder``.

        Raises:
            GircseError: as ``Embedder`` does.
        """
        self._encoder = BundleEncoder(bundle, **arguments)
        self._query_instruction, self._document_instruction = query_instruction, document_instruction
        self._encoder.open()

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Embed documents."""
        vectors: list[list[float]] = self._encoder.documents(texts, self._document_instruction).tolist()
        return vectors

    def embed_query(self, text: str) -> list[float]:
        """Embed a query."""
        vector: list[float] = self._encoder.queries([text], self._query_instruction)[0].tolist()
        return vector
