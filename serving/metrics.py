"""What Prometheus can ask a server."""

from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from gircse.serving.batching import BatchObserver

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)
POWERS = tuple(float(1 << power) for power in range(15))


class Recorder(BatchObserver, Protocol):
    """Is told what a server does; most of it from the event loop."""

    def answered(self, status: int) -> None:
        """Count a request for embeddings by its HTTP status."""

    def embedded(self, texts: int, tokens: int, truncated: int) -> None:
        """Count the texts of an answered request."""

    def took(self, stage: str, seconds: float) -> None:
        """Record how long a stage of a request took: ``tokenize``, ``queue``, ``run``, ``total``."""


class Metrics:
    """Counters of one server; hears what its ``Batcher`` does.

    Attributes:
        content_type: of what ``text`` returns.
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter("gircse_requests", "Answered requests for embeddings", ["status"], registry=registry)
        self._texts = Counter("gircse_texts", "Embedded texts", registry=registry)
        self._tokens = Counter("gircse_tokens", "Embedded tokens, without padding", registry=registry)
        self._truncated = Counter(
            "gircse_truncated_texts", "Texts that were too long and lost their end", registry=registry
        )
        self._seconds = Histogram(
            "gircse_stage_seconds", "Time of a request", ["stage"], buckets=SECONDS, registry=registry
        )
        self._queue = Gauge("gircse_queue_tokens", "Tokens that wait", registry=registry)
        self._batch_texts = Histogram("gircse_batch_texts", "Texts of a batch", buckets=POWERS[:7], registry=registry)
        self._batch_tokens = Histogram(
            "gircse_batch_tokens", "Tokens of a batch, with padding", buckets=POWERS, registry=registry
        )

    def text(self) -> bytes:
        """Return everything in Prometheus's format."""
        return generate_latest(self._registry)

    def answered(self, status: int) -> None:
        """Count a request for embeddings by its HTTP status."""
        self._requests.labels(str(status)).inc()

    def embedded(self, texts: int, tokens: int, truncated: int) -> None:
        """Count the texts of an answered request."""
        self._texts.inc(texts)
        self._tokens.inc(tokens)
        self._truncated.inc(truncated)

    def took(self, stage: str, seconds: float) -> None:
        """Record how long a stage of a request took: ``tokenize``, ``queue``, ``run``, ``total``."""
        self._seconds.labels(stage).observe(seconds)

    def queue_changed(self, tokens: int) -> None:
        """Record how many tokens wait."""
        self._queue.set(tokens)

    def batch_ended(self, texts: int, tokens: int) -> None:
        """Record the size of a batch."""
        self._batch_texts.observe(texts)
        self._batch_tokens.observe(tokens)
