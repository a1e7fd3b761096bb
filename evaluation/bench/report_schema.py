"""The result of a benchmark as data: the content of ``bench.json``. Times are seconds, sizes are bytes."""

from gircse.runtime.records import Record, encode_record

SCHEMA_VERSION = 1


class Spread(Record, frozen=True):
    """Repeated times of one thing.

    Attributes:
        median: of the repeats.
        p95: their 95th percentile.
        low: the shortest.
        high: the longest.
        repeats: how many, warm-up not counted.
    """

    median: float
    p95: float
    low: float
    high: float
    repeats: int


class BackendCost(Record, frozen=True):
    """What a backend costs besides its runs.

    Attributes:
        backend: its name.
        load_s: time from the imported library to the loaded model, in fresh processes.
        peak_bytes: peak memory of its process over the whole benchmark.
        model_bytes: size of the files that it loads.
        min_cosine: smallest cosine of its vectors to those of the first backend, over every setting: do they compute
            the same?
    """

    backend: str
    load_s: Spread
    peak_bytes: int
    model_bytes: int
    min_cosine: float


class Latency(Record, frozen=True):
    """One backend at one setting.

    Attributes:
        backend: its name.
        batch: texts of a run.
        tokens: tokens of each text.
        steps: refinement steps.
        seconds: of one run.
        texts_per_s: batch over the median.
        roofline_s: time that reading the weights alone takes at the measured memory bandwidth; bundles only.
    """

    backend: str
    batch: int
    tokens: int
    steps: int
    seconds: Spread
    texts_per_s: float
    roofline_s: float | None


class Quality(Record, frozen=True):
    """Scores of one bundle and precision on one task; ``scores`` holds the steps 0..K."""

    backend: str
    task: str
    metric: str
    scores: tuple[float, ...]


class BenchReport(Record, frozen=True):
    """A benchmark.

    Attributes:
        schema_version: version of these fields.
        threads: threads of each backend.
        warm_up: runs of each backend at each setting that are not counted.
        bandwidth: bytes of memory read per second by so many threads, measured.
        backends: what each backend costs.
        latencies: every backend at every setting.
        quality: where tasks were given.
        environment: machine and versions.
        instruction_tokens: tokens before each text, which all texts share; reports of before have none.
    """

    schema_version: int
    threads: int
    warm_up: int
    bandwidth: float
    backends: tuple[BackendCost, ...]
    latencies: tuple[Latency, ...]
    quality: tuple[Quality, ...]
    environment: dict[str, str]
    instruction_tokens: int = 0

    def to_json(self) -> bytes:
        """Return the content of ``bench.json``."""
        return encode_record(self, indent=1)
