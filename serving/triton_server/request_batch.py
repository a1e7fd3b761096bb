"""The requests of one call of ``execute``, embedded together where they ask for the same."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from gircse.runtime import Embedder
from gircse.runtime.numerics import Float32


class EmbedOptions(NamedTuple):
    """How a text is embedded: arguments of ``Embedder.encode``."""

    steps: int
    instruction: str


@dataclass(frozen=True)
class TextRequest:
    """The texts of a request, one or more, and how each is embedded."""

    texts: Sequence[str]
    options: Sequence[EmbedOptions]


class _Row(NamedTuple):
    request: int
    row: int


class RequestBatch:
    """Embeds requests together. An error belongs to the request that has it alone."""

    def __init__(self, embedder: Embedder, requests: Sequence[TextRequest], *, batch_size: int) -> None:
        """Take requests; ``batch_size`` is that of ``Embedder.encode``."""
        self._embedder, self._requests, self._batch_size = embedder, requests, batch_size
        hidden = embedder.embedding_dimension
        self._vectors = [np.empty((len(request.texts), hidden), np.float32) for request in requests]
        self._errors: dict[int, Exception] = {}

    def embed(self) -> list[Float32 | Exception]:
        """Return for each request its vectors, (texts, hidden) float32, or why there are none."""
        alike: dict[EmbedOptions, list[_Row]] = {}
        for number, request in enumerate(self._requests):
            for row, options in enumerate(request.options):
                alike.setdefault(options, []).append(_Row(number, row))
        for options, rows in alike.items():
            self._embed_rows(rows, options)
        return [self._errors.get(number, vectors) for number, vectors in enumerate(self._vectors)]

    def _embed_rows(self, rows: Sequence[_Row], options: EmbedOptions) -> None:
        texts = [self._requests[number].texts[row] for number, row in rows]
        try:
            found = self._embedder.encode(
                texts, steps=options.steps, instruction=options.instruction, batch_size=self._batch_size
            )
        except Exception as err:  # whatever it is, the other requests have nothing to do with it
            numbers = dict.fromkeys(row.request for row in rows)
            if len(numbers) == 1:
                self._errors[rows[0].request] = err
            else:  # whose it is shows when each is alone
                for number in numbers:
                    self._embed_rows([row for row in rows if row.request == number], options)
            return
        for (number, row), vector in zip(rows, found, strict=True):
            self._vectors[number][row] = vector
