"""Adapters to the libraries that people use, each imported with its library when it is asked for.

Each takes a bundle directory or an open ``Embedder``. Queries and documents carry their own instruction.
"""

import importlib
from typing import TYPE_CHECKING, Any

from gircse.runtime.errors import sentence

if TYPE_CHECKING:
    from gircse.serving.integrations.bertopic_backend import BERTopicBackend
    from gircse.serving.integrations.chroma_function import ChromaEmbeddingFunction
    from gircse.serving.integrations.haystack_components import HaystackDocumentEmbedder, HaystackTextEmbedder
    from gircse.serving.integrations.langchain_embeddings import LangChainEmbeddings
    from gircse.serving.integrations.llama_index_embedding import LlamaIndexEmbedding

__all__ = [
    "BERTopicBackend",
    "ChromaEmbeddingFunction",
    "HaystackDocumentEmbedder",
    "HaystackTextEmbedder",
    "LangChainEmbeddings",
    "LlamaIndexEmbedding",
]

_MODULE_AND_EXTRA = {
    "BERTopicBackend": ("bertopic_backend", "bertopic"),
    "ChromaEmbeddingFunction": ("chroma_function", "chroma"),
    "HaystackDocumentEmbedder": ("haystack_components", "haystack"),
    "HaystackTextEmbedder": ("haystack_components", "haystack"),
    "LangChainEmbeddings": ("langchain_embeddings", "langchain"),
    "LlamaIndexEmbedding": ("llama_index_embedding", "llama-index"),
}


def __getattr__(name: str) -> Any:
    """Import an adapter.

    Raises:
        ImportError: its library is not installed.
    """
    if name not in _MODULE_AND_EXTRA:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, extra = _MODULE_AND_EXTRA[name]
    try:
        return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    except ImportError as err:
        install = f"Install it: pip install 'gircse-deploy[{extra}]'"
        raise ImportError(sentence(name, f"cannot be imported: {err}", hint=install), name=err.name) from err
