"""A bundle as the backend of BERTopic."""

from collections.abc import Iterable
from pathlib import Path
from typing import Unpack

from bertopic.backend import BaseEmbedder

from gircse.runtime import Embedder
from gircse.runtime.numerics import Float32
from gircse.serving.integrations.bundle_encoder import BundleEncoder, EncoderArguments


class BERTopicBackend(BaseEmbedder):
    """Embeds documents and words for topic models.

    BERTopic has to get it, not an ``Embedder``: objects that it does not know, it replaces by a model of its own.

    Example:
        >>> from bertopic import BERTopic
        >>> topics = BERTopic(embedding_model=BERTopicBackend("gircse-demo-8", instruction="Identify the topic"))
    """

    def __init__(
        self, bundle: str | Path | Embedder, *, instruction: str | None = None, **arguments: Unpack[EncoderArguments]
    ) -> None:
        """Open a bundle, or take an open embedder.

        Args:
            bundle: bundle directory, or an embedder of one.
            instruction: put before every text; None is none.
            arguments: ``steps``, ``batch_size``, and those of ``Embedder``.

        Raises:
            GircseError: as ``Embedder`` does.
        """
        super().__init__()
        self._encoder, self._instruction = BundleEncoder(bundle, **arguments), instruction
        self._encoder.open()

    def embed(self, documents: Iterable[str], verbose: bool = False) -> Float32:
        """Embed documents or words, (n, hidden) float32 unit vectors; ``verbose`` shows a progress bar."""
        return self._encoder.documents(list(documents), self._instruction, show_progress=verbose)
