"""A bundle as the embedder components of Haystack: one for queries, one for documents."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, Unpack

from haystack import Document, component, default_from_dict, default_to_dict

from gircse.runtime import Embedder
from gircse.runtime.errors import sentence
from gircse.serving.integrations.bundle_encoder import BundleEncoder, EncoderArguments


@component
class HaystackTextEmbedder:
    """Embeds one text, such as a query.

    Example:
        >>> len(HaystackTextEmbedder("gircse-demo-8").run(text="How do I reset my PIN?")["embedding"])
        576
    """

    def __init__(
        self, bundle: str | Path | Embedder, *, instruction: str | None = None, **arguments: Unpack[EncoderArguments]
    ) -> None:
        """Take a path, which ``warm_up`` or the first text opens, or an open embedder.

        Args:
            bundle: bundle directory, or an embedder of one.
            instruction: put before the text; None is the bundle's own for queries, an empty text is none.
            arguments: ``steps``, ``batch_size``, and those of ``Embedder``.
        """
        self._encoder, self._instruction = BundleEncoder(bundle, **arguments), instruction

    def warm_up(self) -> None:
        """Open the bundle; the errors are those of ``Embedder``."""
        self._encoder.open()

    def to_dict(self) -> dict[str, Any]:
        """Return the component's arguments."""
        return default_to_dict(self, instruction=self._instruction, **self._encoder.config())

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Make a component from what ``to_dict`` returned."""
        return default_from_dict(cls, data)

    @component.output_types(embedding=list[float])
    def run(self, text: str) -> dict[str, Any]:
        """Return the vector of a text under ``embedding``; the errors are those of ``Embedder.encode``."""
        return {"embedding": self._encoder.queries([text], self._instruction)[0].tolist()}


@component
class HaystackDocumentEmbedder:
    """Embeds documents, with some of their metadata if asked to.

    Example:
        >>> from haystack import Document
        >>> documents = HaystackDocumentEmbedder("gircse-demo-8").run(documents=[Document(content="Reset it here.")])
        >>> len(documents["documents"][0].embedding)
        576
    """

    def __init__(
        self,
        bundle: str | Path | Embedder,
        *,
        instruction: str | None = None,
        meta_fields_to_embed: Sequence[str] | None = None,
        embedding_separator: str = "\n",
        progress_bar: bool = False,
        **arguments: Unpack[EncoderArguments],
    ) -> None:
        """Take a path, which ``warm_up`` or the first documents open, or an open embedder.

        Args:
            bundle: bundle directory, or an embedder of one.
            instruction: put before every document; None is none.
            meta_fields_to_embed: fields of a document's metadata that are put before its content.
            embedding_separator: between these fields and the content.
            progress_bar: show one on stderr.
            arguments: ``steps``, ``batch_size``, and those of ``Embedder``.
        """
        self._encoder, self._instruction = BundleEncoder(bundle, **arguments), instruction
        self._meta_fields_to_embed = list(meta_fields_to_embed or [])
        self._embedding_separator, self._progress_bar = embedding_separator, progress_bar

    def warm_up(self) -> None:
        """Open the bundle; the errors are those of ``Embedder``."""
        self._encoder.open()

    def to_dict(self) -> dict[str, Any]:
        """Return the component's arguments."""
        return default_to_dict(
            self,
            instruction=self._instruction,
            meta_fields_to_embed=self._meta_fields_to_embed,
            embedding_separator=self._embedding_separator,
            progress_bar=self._progress_bar,
            **self._encoder.config(),
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Make a component from what ``to_dict`` returned."""
        return default_from_dict(cls, data)

    @component.output_types(documents=list[Document])
    def run(self, documents: list[Document]) -> dict[str, Any]:
        """Embed documents.

        Returns:
            The documents with their vectors under ``documents``; those that came stay as they are.

        Raises:
            TypeError: it is no list of documents.
        """
        if not isinstance(documents, list) or not all(isinstance(document, Document) for document in documents):
            given = "is no list of documents"
            raise TypeError(sentence("documents", given, None, "Use HaystackTextEmbedder for a text."))
        texts = [self._text(document) for document in documents]
        vectors = self._encoder.documents(texts, self._instruction, show_progress=self._progress_bar).tolist()
        pairs = zip(documents, vectors, strict=True)
        return {"documents": [replace(document, embedding=vector) for document, vector in pairs]}

    def _text(self, document: Document) -> str:
        fields = (document.meta.get(name) for name in self._meta_fields_to_embed)
        return self._embedding_separator.join(
            [*(str(value) for value in fields if value is not None), document.content or ""]
        )
