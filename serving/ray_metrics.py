"""What a replica of Ray Serve counts: the metrics of ``gircse-serve``, by way of Ray.

Serve's proxy sends each request to another replica, so that a page of one replica's counters would say something else
every time. Ray collects those of all replicas and tags each with ``application``, ``deployment`` and ``replica``.
"""

from ray.serve.metrics import Counter, Gauge, Histogram

from gircse.serving.metrics import POWERS, SECONDS


class RayMetrics:
    """Counters of one replica, made inside it; hears what its ``Batcher`` does."""

    def __init__(self) -> None:
        self._requests = Counter("gircse_requests", "Answered requests for embeddings", ("status",))
        self._texts = Counter("gircse_texts", "Embedded texts")
        self._tokens = Counter("gircse_tokens", "Embedded tokens, without padding")
        self._truncated = Counter("gircse_truncated_texts", "Texts that were too long and lost their end")
        self._seconds = Histogram("gircse_stage_seconds", "Time of a request", [*SECONDS], ("stage",))
        self._queue = Gauge("gircse_queue_tokens", "Tokens that wait")
        self._batch_texts = Histogram("gircse_batch_texts", "Texts of a batch", [*POWERS[:7]])
        self._batch_tokens = Histogram("gircse_batch_tokens", "Tokens of a batch, with padding", [*POWERS])

    def answered(self, status: int) -> None:
        """Count a request for embeddings by its HTTP status."""
        self._requests.inc(tags={"status": str(status)})

    def embedded(self, texts: int, tokens: int, truncated: int) -> None:
        """Count the texts of an answered request."""
        self._texts.inc(texts)
        self._tokens.inc(tokens)
        if truncated:  # Ray's counters refuse 0
            self._truncated.inc(truncated)

    def took(self, stage: str, seconds: float) -> None:
        """Record how long a stage of a request took: ``tokenize``, ``queue``, ``run``, ``total``."""
        self._seconds.observe(seconds, tags={"stage": stage})

    def queue_changed(self, tokens: int) -> None:
        """Record how many tokens wait."""
        self._queue.set(tokens)

    def batch_ended(self, texts: int, tokens: int) -> None:
        """Record the size of a batch."""
        self._batch_texts.observe(texts)
        self._batch_tokens.observe(tokens)
