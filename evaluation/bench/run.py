"""The benchmark from end to end: every backend in turn (A B A B) on the same inputs, threads and warm-up."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

import numpy as np
import psutil

from gircse.checkpoint.source import Checkpoint
from gircse.evaluation.bench.backends import BackendSpec, Baseline, BundleSpec, LlamaCppSpec, TorchSpec
from gircse.evaluation.bench.memory import check_memory
from gircse.evaluation.bench.report_schema import SCHEMA_VERSION, BackendCost, BenchReport, Latency, Quality, Spread
from gircse.evaluation.bench.roofline import memory_bandwidth
from gircse.evaluation.bench.worker import Worker
from gircse.evaluation.environment import describe_environment
from gircse.evaluation.parity.backends import BundleBackend
from gircse.evaluation.parity.references import source_checkpoint
from gircse.evaluation.tasks.files import TaskOptions, read_tasks
from gircse.evaluation.tasks.prompts import tokenize_prompts
from gircse.evaluation.tasks.scoring import Task, score_steps
from gircse.reporting.progress import StageProgress
from gircse.runtime.bundle import Bundle
from gircse.runtime.errors import CheckpointError, MeasurementError, OptionError
from gircse.runtime.manifest import Layout
from gircse.runtime.numerics import Float32, Int64, row_cosine
from gircse.runtime.precision import runs_on
from gircse.runtime.provider import Provider
from gircse.runtime.tokenization import common_length, load_tokenizer, open_tokenizer

DEFAULT_TOKENS = (16, 64, 256)
DEFAULT_STEPS = (1, 2, 4, 8)
LOADS = 3
WARM_UP = 2
MIN_REPEATS = 3
PAUSE_S = 0.05
"""Between two backends, until idle threads of the first stop spinning (OpenBLAS and OpenMP do for milliseconds)."""

PROSE = """\
The harbour freezes over by late November, and the ferries stop until the ice has gone. Those who live on the islands
order what they need for the winter in autumn: flour, candles, medicine, spare parts for the generator. A doctor comes
by sledge every second week, if the weather allows, and takes the post with him. Years ago the mail was left in a hut
halfway, where whoever passed first picked it up; since the telephone line was laid, the shop reads the names of those
who have letters over the radio each evening. Children learn to tell from the sound of the ice how thick it is. In \
March,
when it begins to sing, nobody drives a car on it any more, and the elders place bets on the day when the first boat \
will
break through to the mainland. The winner has to buy coffee for everyone, which is why some hope to lose.
"""
"""What the backends embed; longer prompts start again from the beginning."""


@dataclass(frozen=True)
class BenchOptions:
    """What to measure; the fields are the flags of ``gircse-bench``.

    Attributes:
        bundles: bundle directories; the baselines take K, pooling and checkpoint from the first.
        precisions: variants; empty means every one that the provider runs and that has the layout.
        batches: texts of a run.
        instruction: put before every text; bundles that can are also measured with its keys and values kept.
        tokens: tokens of each text, without the instruction; None takes 16, 64 and 256 as far as the first bundle goes.
        steps: refinement steps; None takes 1, 2, 4, 8 and K as far as the first bundle goes.
        against: baselines to measure in turn with the bundles.
        model: where the first bundle's checkpoint is now; None is as in its manifest.
        adapter: where its adapter is now.
        gguf: model file of llama.cpp; None writes one in Q8_0.
        repeats: maximum runs of each backend at each setting.
        setting_s: seconds after which a setting gets no further repeats beyond three.
        layout: graph to run; None is the one that suits the provider.
        provider: where the bundles run.
        device: where PyTorch runs.
        dtype: precision of PyTorch.
        threads: threads per backend; None takes the physical cores.
        tasks: tasks for the quality at each step.
    """

    bundles: Sequence[Path]
    precisions: Sequence[str] = ()
    batches: Sequence[int] = (1, 8, 32)
    instruction: str = ""
    tokens: Sequence[int] | None = None
    steps: Sequence[int] | None = None
    against: Sequence[Baseline] = ()
    model: str | None = None
    adapter: str | None = None
    gguf: Path | None = None
    repeats: int = 10
    setting_s: float = 20.0
    layout: Layout | None = None
    provider: Provider = Provider.CPU
    device: str = "cpu"
    dtype: str = "fp32"
    threads: int | None = None
    tasks: TaskOptions = field(default_factory=TaskOptions)


@dataclass(frozen=True)
class _Setting:
    batch: int
    tokens: int
    steps: int


def run_bench(options: BenchOptions, *, progress: StageProgress | None = None) -> BenchReport:
    """Measure bundles and baselines.

    Raises:
        GircseError: a bundle, baseline or task cannot be used.
        OptionError: an option is out of range.
    """
    progress = progress or StageProgress()
    bundles = [Bundle.open(path) for path in options.bundles]
    instruction = _instruction_ids(options, bundles[0])
    settings = _choose_settings(options, bundles[0], len(instruction))
    _check(options, bundles, settings, len(instruction))
    tasks = read_tasks(options.tasks)
    threads = options.threads or psutil.cpu_count(logical=False) or 1
    bundle_specs = _bundle_specs(options, bundles, threads)
    prefix_specs = [
        replace(spec, cached_instruction=len(instruction))
        for spec in bundle_specs
        if instruction and spec.takes_prefixes
    ]
    baselines = _baseline_specs(options, bundles[0], settings, threads, len(instruction))
    specs = [*bundle_specs, *prefix_specs, *baselines]
    _check_names(specs)
    check_memory(specs)
    with progress.stage("measure the memory bandwidth"):
        bandwidth = memory_bandwidth(threads)
    costs, latencies = _run_backends(specs, settings, instruction, options, bandwidth, progress)
    quality = [result for spec in bundle_specs for result in _measure_quality(spec, tasks, progress)]
    return BenchReport(
        schema_version=SCHEMA_VERSION,
        threads=threads,
        warm_up=WARM_UP,
        instruction_tokens=len(instruction),
        bandwidth=bandwidth,
        backends=tuple(costs),
        latencies=tuple(latencies),
        quality=tuple(quality),
        environment=describe_environment(),
    )


def _choose_settings(options: BenchOptions, bundle: Bundle, instruction_tokens: int) -> list[_Setting]:
    facts = bundle.manifest.graph
    most = facts.max_tokens - instruction_tokens
    tokens = options.tokens or [size for size in DEFAULT_TOKENS if size <= most] or [most]
    steps = options.steps or [step for step in DEFAULT_STEPS if step < facts.steps] + [facts.steps]
    return [_Setting(*values) for values in product(options.batches, sorted(set(tokens)), sorted(set(steps)))]


def _check(
    options: BenchOptions, bundles: Sequence[Bundle], settings: Sequence[_Setting], instruction_tokens: int
) -> None:
    facts = bundles[0].manifest.graph
    if instruction_tokens >= facts.max_tokens:
        raise OptionError("--instruction", f"has {instruction_tokens} tokens", f"the bundle takes {facts.max_tokens}")
    for name, values, low, high in (
        ("--batch", options.batches, 1, 4096),
        ("--tokens", [setting.tokens for setting in settings], 1, facts.max_tokens - instruction_tokens),
        ("--steps", [setting.steps for setting in settings], 0, facts.steps),
        ("--repeats", [options.repeats], MIN_REPEATS, 10000),
        ("--threads", [1 if options.threads is None else options.threads], 1, 4096),
    ):
        for value in values:
            if not low <= value <= high:
                raise OptionError(name, f"is {value}", f"the range is {low} to {high}")
    if options.gguf is not None and not options.gguf.is_file():
        raise CheckpointError(f"--gguf {options.gguf}", "is not a file", None, "Check the path.")
    for bundle in bundles[1:]:
        if bundle.manifest.graph.vocab_size != facts.vocab_size:
            raise MeasurementError(
                str(bundle.directory),
                f"has a vocabulary of {bundle.manifest.graph.vocab_size}",
                f"{bundles[0].directory} has {facts.vocab_size}",
                "Compare bundles of one model.",
            )


def _check_names(specs: Sequence[BackendSpec]) -> None:
    names = [spec.name for spec in specs]
    for name in names:
        if names.count(name) > 1:
            raise OptionError(
                f"the name {name}", "belongs to two backends", None, "Rename one of the bundle directories."
            )


def _run_backends(
    specs: Sequence[BackendSpec],
    settings: Sequence[_Setting],
    instruction: Sequence[int],
    options: BenchOptions,
    bandwidth: float,
    progress: StageProgress,
) -> tuple[list[BackendCost], list[Latency]]:
    """Load every backend, run all of them at every setting, and measure what each costs."""
    latencies: list[Latency] = []
    cosines = {spec.name: 1.0 for spec in specs}
    with ExitStack() as opened:
        workers, loads = [], []
        for spec in specs:
            with progress.stage(f"load {spec.name}, {LOADS} times"):
                worker, seconds = _load(spec)
                workers.append(opened.enter_context(worker))
                loads.append(_spread(seconds))
        with progress.stage(f"run {len(specs)} backends at {len(settings)} settings", total=len(settings)) as advance:
            for setting in settings:
                input_ids = _input_ids(setting, instruction, workers[0].spec.bundle)
                runs = _run_setting(setting, input_ids, workers, options, cosines=cosines)
                latencies += [_latency(setting, spec, seconds, bandwidth) for spec, seconds in runs]
                advance(1)
        costs = [
            BackendCost(spec.name, load, worker.peak_bytes(), spec.model_bytes(), cosines[spec.name])
            for spec, load, worker in zip(specs, loads, workers, strict=True)
        ]
    return costs, latencies


def _bundle_specs(options: BenchOptions, bundles: Sequence[Bundle], threads: int) -> list[BundleSpec]:
    specs = []
    for bundle in bundles:
        able = [
            name
            for name, variant in bundle.manifest.variants.items()
            if runs_on(name, options.provider) and options.layout in (None, *variant.graphs)
        ]
        for precision in options.precisions or able or bundle.manifest.variants:
            # Refuses a graph that is not there before anything runs for minutes.
            bundle.graph(precision, bundle.layout(precision, options.provider, options.layout))
            specs.append(BundleSpec(bundle, precision, threads, options.layout, options.provider))
    return specs


def _baseline_specs(
    options: BenchOptions, bundle: Bundle, settings: Sequence[_Setting], threads: int, instruction_tokens: int
) -> list[BackendSpec]:
    if not options.against:
        return []
    checkpoint = source_checkpoint(bundle.manifest, model=options.model, adapter=options.adapter)
    specs: list[BackendSpec] = []
    for baseline in options.against:
        if baseline is Baseline.TORCH:
            specs.append(TorchSpec(bundle, checkpoint, options.dtype, threads, options.device))
        else:
            specs.append(_llama_cpp_spec(options, bundle, checkpoint, settings, threads, instruction_tokens))
    return specs


def _llama_cpp_spec(
    options: BenchOptions,
    bundle: Bundle,
    checkpoint: Checkpoint,
    settings: Sequence[_Setting],
    threads: int,
    instruction_tokens: int,
) -> LlamaCppSpec:
    from gircse.evaluation.bench.gguf import gguf_of

    return LlamaCppSpec(
        bundle=bundle,
        checkpoint=checkpoint,
        gguf=options.gguf or gguf_of(checkpoint),
        weights=options.gguf.stem if options.gguf else "Q8_0",
        threads=threads,
        batch=max(setting.batch for setting in settings),
        tokens=instruction_tokens + max(setting.tokens for setting in settings),
        steps=max(setting.steps for setting in settings),
    )


def _load(spec: BackendSpec) -> tuple[Worker, list[float]]:
    """Load a backend several times, each in a fresh process, and keep the last."""
    seconds = []
    for _ in range(LOADS - 1):
        with Worker(spec) as worker:
            seconds.append(worker.load_s)
    worker = Worker(spec)
    return worker, [*seconds, worker.load_s]


def _run_setting(
    setting: _Setting,
    input_ids: Int64,
    workers: Sequence[Worker],
    options: BenchOptions,
    *,
    cosines: dict[str, float],
) -> list[tuple[BackendSpec, list[float]]]:
    """Run every backend that can in turn; ``cosines`` keeps the worst agreement of each with the first."""
    able = [worker for worker in workers if worker.spec.can_run(setting.steps)]
    seconds: list[list[float]] = [[] for _ in able]
    start = time.perf_counter()
    first: Float32 | None = None
    for repeat in range(WARM_UP + options.repeats):
        if repeat >= WARM_UP + MIN_REPEATS and time.perf_counter() - start > options.setting_s:
            break
        for worker, runs in zip(able, seconds, strict=True):
            time.sleep(PAUSE_S)
            elapsed, vectors = worker.run(input_ids, setting.steps)
            runs.append(elapsed)
            first = vectors if first is None else first
            name = worker.spec.name
            cosines[name] = min(cosines[name], float(row_cosine(vectors, first).min()))
    return [(worker.spec, runs[WARM_UP:]) for worker, runs in zip(able, seconds, strict=True)]


def _instruction_ids(options: BenchOptions, bundle: Bundle) -> list[int]:
    """Return what every prompt with the instruction begins with."""
    if not options.instruction:
        return []
    prompts, _ = open_tokenizer(bundle).tokenize(["a", "The"], instruction=options.instruction)
    return prompts[0][: common_length(prompts)]


def _input_ids(setting: _Setting, instruction: Sequence[int], bundle: Bundle) -> Int64:
    """Return the same tokens (batch, tokens) int64 for every backend: the instruction, and running prose.

    Each row starts at another word of it.

    Not random tokens: the entropy of the softmax over the vocabulary decides what a soft token costs in INT8 variants.
    """
    tokenizer = load_tokenizer(bundle.file("tokenizer.json"))
    prose = np.array(tokenizer.encode(PROSE, add_special_tokens=False).ids, np.int64)
    starts = np.arange(setting.batch)[:, None] * len(prose) // setting.batch
    picked: Int64 = prose[(starts + np.arange(setting.tokens)) % len(prose)]
    return np.hstack([np.tile(np.array(instruction, np.int64), (setting.batch, 1)), picked])


def _latency(setting: _Setting, spec: BackendSpec, seconds: Sequence[float], bandwidth: float) -> Latency:
    spread = _spread(seconds)
    read = spec.weight_bytes_read(setting.steps)
    return Latency(
        backend=spec.name,
        batch=setting.batch,
        tokens=setting.tokens,
        steps=setting.steps,
        seconds=spread,
        texts_per_s=setting.batch / spread.median,
        roofline_s=None if read is None else read / bandwidth,
    )


def _spread(seconds: Sequence[float]) -> Spread:
    return Spread(
        median=float(np.median(seconds)),
        p95=float(np.percentile(seconds, 95)),
        low=min(seconds),
        high=max(seconds),
        repeats=len(seconds),
    )


def _measure_quality(spec: BundleSpec, tasks: Sequence[Task], progress: StageProgress) -> Iterator[Quality]:
    for task in tasks:
        backend = BundleBackend(
            spec.bundle, spec.precision, layout=spec.layout, provider=spec.provider, threads=spec.threads
        )
        token_ids = tokenize_prompts(open_tokenizer(spec.bundle), task.prompts)
        with progress.stage(
            f"embed {len(token_ids)} texts of {task.name}: {spec.name}", total=len(token_ids)
        ) as advance:
            vectors = backend.embed(token_ids, advance)
        yield Quality(spec.name, task.name, task.metric, score_steps(task, vectors))
