"""A bundle as ``BaseEmbedding`` of LlamaIndex."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Unpack

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.callbacks import CallbackManager

from gircse.runtime import Embedder, OptionError
from gircse.runtime.batch_planner import DEFAULT_BATCH_SIZE
from gircse.runtime.open_arguments import OpenArguments
from gircse.serving.integrations.bundle_encoder import BundleEncoder

_batches = ThreadPoolExecutor(1, "gircse-llama-index")
"""LlamaIndex starts all batches of an asynchronous call at once; one takes every core, and more take more memory."""


class LlamaIndexEmbedding(BaseEmbedding):
    """Embeds queries and the texts of nodes for LlamaIndex.

    Its fields are what ``to_dict`` writes, and by these an ingestion pipeline keys its cache. ``manifest_sha256`` is
    one, so that another bundle at the same path does not find the vectors of the first.

    Example:
        >>> embedding = LlamaIndexEmbedding("gircse-demo-8")
        >>> len(embedding.get_query_embedding("How do I reset my PIN?"))
        576
    """

    bundle: str
    query_instruction: str | None
    text_instruction: str | None
    steps: int | None
    precision: str | None = None
    provider: str = "auto"
    layout: str | None = None
    threads: int | None = None
    streams: int = 1
    verify: bool = True
    prefix_cache: bool | None = None
    manifest_sha256: str
    _encoder: BundleEncoder = PrivateAttr()

    def __init__(
        self,
        bundle: str | Path | Embedder,
        *,
        query_instruction: str | None = None,
        text_instruction: str | None = None,
        steps: int | None = None,
        embed_batch_size: int = DEFAULT_BATCH_SIZE,
        model_name: str | None = None,
        callback_manager: CallbackManager | None = None,
        num_workers: int | None = None,
        rate_limiter: Any = None,
        embeddings_cache: Any = None,
        manifest_sha256: str | None = None,
        **arguments: Unpack[OpenArguments],
    ) -> None:
        """Open a bundle, or take an open embedder.

        Args:
            bundle: bundle directory, or an embedder of one.
            query_instruction: put before queries; None is the bundle's own, an empty text is none.
            text_instruction: put before texts; None is none.
            steps: refinement steps, 0 to the bundle's K; None is K.
            embed_batch_size: maximum texts per batch.
            model_name: what LlamaIndex calls the model in its events; None is the name of the bundle's directory.
            callback_manager: as LlamaIndex has it.
            num_workers: as LlamaIndex has it; batches run one after the other whatever it is.
            rate_limiter: as LlamaIndex has it.
            embeddings_cache: only None.
            manifest_sha256: what ``to_dict`` wrote; the bundle itself counts.
            arguments: those of ``Embedder``.

        Raises:
            GircseError: as ``Embedder`` does.
            OptionError: there is an ``embeddings_cache``.
        """
        if embeddings_cache is not None:
            reason = "it finds vectors by their text alone, so that a query could get the vector of a document"
            raise OptionError("embeddings_cache", "is given", reason, "Leave it out.")
        encoder = BundleEncoder(bundle, steps=steps, batch_size=embed_batch_size, **arguments)
        encoder.open()
        config = encoder.config()
        del config["batch_size"]
        fields = config | {
            "query_instruction": query_instruction,
            "text_instruction": text_instruction,
            "embed_batch_size": embed_batch_size,
            "model_name": model_name or Path(config["bundle"]).name,
            "callback_manager": callback_manager or CallbackManager([]),
            "num_workers": num_workers,
            "rate_limiter": rate_limiter,
            "manifest_sha256": encoder.manifest_sha256(),
        }
        super().__init__(**fields)
        self._encoder = encoder

    @classmethod
    def class_name(cls) -> str:
        """Return the name that LlamaIndex serializes."""
        return "LlamaIndexEmbedding"

    def _get_query_embedding(self, query: str) -> list[float]:
        vector: list[float] = self._encoder.queries([query], self.query_instruction)[0].tolist()
        return vector

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        vectors: list[list[float]] = self._encoder.documents(texts, self.text_instruction).tolist()
        return vectors

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return await asyncio.to_thread(self._get_query_embedding, query)

    async def _aget_text_embedding(self, text: str) -> list[float]:
        return (await self._aget_text_embeddings([text]))[0]

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return await asyncio.get_running_loop().run_in_executor(_batches, self._get_text_embeddings, texts)
