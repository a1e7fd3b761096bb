"""The benchmark from end to end: every side in turn (A B A B) on the same inputs, threads and warm-up."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

import numpy as np
import psutil

from gircse.evaluation.bench.report_schema import SCHEMA_VERSION, BackendCost, BenchReport, Latency, Quality, Spread
from gircse.evaluation.bench.roofline import memory_bandwidth, weight_bytes_read
from gircse.evaluation.bench.worker import BackendSpec, Int64, Kind, Worker
from gircse.evaluation.environment import describe_environment
from gircse.evaluation.parity.backends import BundleBackend, source_checkpoint
from gircse.evaluation.tasks.files import TaskOptions, read_tasks
from gircse.evaluation.tasks.prompts import tokenize_prompts
from gircse.evaluation.tasks.scoring import Task, score_steps
from gircse.reporting.progress import StageProgress
from gircse.runtime.bundle import Bundle
from gircse.runtime.errors import MeasurementError
from gircse.runtime.manifest import Layout
from gircse.runtime.numerics import Float32, row_cosine
from gircse.runtime.precision import precision_spec
from gircse.runtime.provider import Provider
from gircse.runtime.tokenization import load_tokenizer, open_tokenizer

DEFAULT_TOKENS = (16, 64, 256)
DEFAULT_STEPS = (1, 2, 4, 8)
LOADS = 3
WARM_UP = 2
MIN_REPEATS = 3
PAUSE_S = 0.05
"""Between two sides: idle threads of the one that just ran stop spinning (OpenBLAS and OpenMP do for milliseconds)."""


PROSE = """\
The harbour freezes over by late November, and the ferries stop until the ice has gone. Those who live on the islands
order what they need for the winter in autumn: flour, candles, medicine, spare parts for the generator. A doctor comes
by sledge every second week, if the weather allows, and takes the post with him. Years ago the mail was left in a hut
halfway, where whoever passed first picked it up; since the telephone line was laid, the shop reads the names of those
who have letters over the radio each evening. Children learn to tell from the sound of the ice how thick it is. In March,
when it begins to sing, nobody drives a car on it any more, and the elders place bets on the day when the first boat will
break through to the mainland. The winner has to buy coffee for everyone, which is why some hope to lose.
"""
"""What the sides embed; longer prompts start again from the beginning."""


@dataclass(frozen=True)
class BenchOptions:
    """What to measure; the fields are the flags of ``gircse-bench``.

    Attributes:
        bundles: bundle directories; the peers take K, pooling and checkpoint from the first.
        precisions: variants; empty means every one that the provider runs and that has the layout.
        batches: texts of a run.
        tokens: tokens of each text; None takes 16, 64 and 256 as far as the first bundle goes.
        steps: refinement steps; None takes 1, 2, 4, 8 and K as far as the first bundle goes.
        against: ``torch``, ``llama.cpp``.
        gguf: model file of llama.cpp; the demo has its own.
        repeats: most runs of each side at each setting.
        setting_s: seconds after which a setting gets no further repeats beyond three.
        layout: graph to run; None is the default of each variant.
        provider: where the bundles run.
        device: where PyTorch runs.
        dtype: precision of PyTorch.
        threads: threads of each side; None takes the physical cores.
        tasks: tasks for the quality at each step.
    """

    bundles: Sequence[Path]
    precisions: Sequence[str] = ()
    batches: Sequence[int] = (1, 8, 32)
    tokens: Sequence[int] | None = None
    steps: Sequence[int] | None = None
    against: Sequence[str] = ()
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
    """Measure bundles and their peers.

    Raises:
        GircseError: a bundle, peer or task cannot be used.
        ValueError: an option is out of range.
    """
    progress = progress or StageProgress()
    bundles = [Bundle.open(path) for path in options.bundles]
    settings = _choose_settings(options, bundles[0])
    _check(options, bundles, settings)
    tasks = read_tasks(options.tasks)
    threads = options.threads or psutil.cpu_count(logical=False) or 1
    with progress.stage("measure the memory bandwidth"):
        bandwidth = memory_bandwidth(threads)
    specs = [
        *_bundle_specs(options, bundles, settings, threads),
        *_baseline_specs(options, bundles[0], settings, threads),
    ]
    _check_names(specs)
    costs, latencies = _run_backends(specs, settings, options, bandwidth, progress)
    quality = [
        result
        for spec in specs
        if tasks and spec.kind is Kind.BUNDLE
        for result in _measure_quality(spec, tasks, progress)
    ]
    return BenchReport(
        schema_version=SCHEMA_VERSION,
        threads=threads,
        warm_up=WARM_UP,
        bandwidth=bandwidth,
        sides=tuple(costs),
        latencies=tuple(latencies),
        quality=tuple(quality),
        environment=describe_environment(),
    )


def _choose_settings(options: BenchOptions, bundle: Bundle) -> list[_Setting]:
    facts = bundle.manifest.graph
    tokens = options.tokens or [size for size in DEFAULT_TOKENS if size <= facts.max_tokens] or [facts.max_tokens]
    steps = options.steps or [step for step in DEFAULT_STEPS if step < facts.steps] + [facts.steps]
    return [_Setting(*values) for values in product(options.batches, sorted(set(tokens)), sorted(set(steps)))]


def _check(options: BenchOptions, bundles: Sequence[Bundle], settings: Sequence[_Setting]) -> None:
    facts = bundles[0].manifest.graph
    for name, values, low, high in (
        ("--batch", options.batches, 1, 4096),
        ("--tokens", [setting.tokens for setting in settings], 1, facts.max_tokens),
        ("--steps", [setting.steps for setting in settings], 0, facts.steps),
        ("--repeats", [options.repeats], MIN_REPEATS, 10000),
        ("--threads", [1 if options.threads is None else options.threads], 1, 4096),
    ):
        for value in values:
            if not low <= value <= high:
                raise ValueError(f"{name}: {value} | {low} to {high} | choose values in this range")
    if options.gguf is not None and not options.gguf.is_file():
        raise MeasurementError(f"--gguf {options.gguf}: no such file | a GGUF file | check the path")
    for bundle in bundles[1:]:
        if bundle.manifest.graph.vocab_size != facts.vocab_size:
            raise MeasurementError(
                f"{bundle.directory}: {bundle.manifest.graph.vocab_size} tokens | {facts.vocab_size}, as "
                f"{bundles[0].directory} has | compare bundles of one model"
            )


def _check_names(specs: Sequence[BackendSpec]) -> None:
    names = [spec.name for spec in specs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"sides: two called {name} | a name for each | rename one of the bundle directories")


def _run_backends(
    specs: Sequence[BackendSpec],
    settings: Sequence[_Setting],
    options: BenchOptions,
    bandwidth: float,
    progress: StageProgress,
) -> tuple[list[BackendCost], list[Latency]]:
    """Load every side, run all of them at every setting, and see what each has cost."""
    latencies: list[Latency] = []
    cosines = {spec.name: 1.0 for spec in specs}
    with ExitStack() as opened:
        workers, loads = [], []
        for spec in specs:
            with progress.stage(f"load {spec.name}, {LOADS} times"):
                worker, seconds = _load(spec)
                workers.append(opened.enter_context(worker))
                loads.append(_spread(seconds))
        with progress.stage(f"run {len(specs)} sides at {len(settings)} settings", total=len(settings)) as advance:
            for setting in settings:
                runs = _run_setting(setting, workers, options, cosines=cosines)
                latencies += [_latency(setting, spec, seconds, bandwidth) for spec, seconds in runs]
                advance(1)
        costs = [
            BackendCost(spec.name, load, worker.peak_bytes(), _model_bytes(spec), cosines[spec.name])
            for spec, load, worker in zip(specs, loads, workers, strict=True)
        ]
    return costs, latencies


def _bundle_specs(
    options: BenchOptions, bundles: Sequence[Bundle], settings: Sequence[_Setting], threads: int
) -> list[BackendSpec]:
    specs = []
    for path, bundle in zip(options.bundles, bundles, strict=True):
        on_cpu = options.provider is Provider.CPU
        able = [
            name
            for name, variant in bundle.manifest.variants.items()
            if (precision_spec(name).cpu or not on_cpu) and options.layout in (None, *variant.graphs)
        ]
        for precision in options.precisions or able or bundle.manifest.variants:
            bundle.graph(precision, bundle.layout(precision, options.layout))
            place = "" if on_cpu else f" on {options.provider}"
            spec = _spec(f"{bundle.directory.name}:{precision}{place}", Kind.BUNDLE, path, precision, settings, threads)
            specs.append(replace(spec, layout=options.layout, provider=options.provider))
    return specs


def _baseline_specs(
    options: BenchOptions, bundle: Bundle, settings: Sequence[_Setting], threads: int
) -> list[BackendSpec]:
    specs = []
    for peer in dict.fromkeys(Kind(name) for name in options.against):
        precision = "Q8_0" if peer is Kind.LLAMA_CPP else options.dtype
        place = f" on {options.device}" if peer is Kind.TORCH and options.device != "cpu" else ""
        spec = _spec(f"{peer} {precision}{place}", peer, options.bundles[0], precision, settings, threads)
        spec = replace(spec, device=options.device)
        if peer is Kind.LLAMA_CPP:
            from gircse.evaluation.bench.gguf import gguf_of

            path = options.gguf or gguf_of(source_checkpoint(bundle.manifest))
            spec = replace(spec, gguf=path, name=f"{peer} {path.stem}" if options.gguf else spec.name)
        specs.append(spec)
    return specs


def _spec(
    name: str, kind: Kind, bundle: Path, precision: str, settings: Sequence[_Setting], threads: int
) -> BackendSpec:
    return BackendSpec(
        name=name,
        kind=kind,
        bundle=bundle,
        precision=precision,
        threads=threads,
        batch=max(setting.batch for setting in settings),
        tokens=max(setting.tokens for setting in settings),
        steps=max(setting.steps for setting in settings),
    )


def _load(spec: BackendSpec) -> tuple[Worker, list[float]]:
    """Load a side several times, each in a fresh process, and keep the last."""
    seconds = []
    for _ in range(LOADS - 1):
        with Worker(spec) as worker:
            seconds.append(worker.load_s)
    worker = Worker(spec)
    return worker, [*seconds, worker.load_s]


def _run_setting(
    setting: _Setting,
    workers: Sequence[Worker],
    options: BenchOptions,
    *,
    cosines: dict[str, float],
) -> list[tuple[BackendSpec, list[float]]]:
    """Run every side that can in turn; ``cosines`` keeps the worst agreement of each with the first."""
    able = [worker for worker in workers if _runs(worker.spec, setting.steps)]
    seconds: list[list[float]] = [[] for _ in able]
    input_ids = _input_ids(setting, Bundle.open(workers[0].spec.bundle))
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


def _runs(spec: BackendSpec, steps: int) -> bool:
    """Whether a side can stop after so many steps: an unrolled graph always runs K, llama.cpp at least one."""
    if spec.kind is not Kind.BUNDLE:
        return steps > 0 or spec.kind is Kind.TORCH
    bundle = Bundle.open(spec.bundle)
    stepwise = bundle.layout(spec.precision, spec.layout) is Layout.STEPWISE
    most = bundle.manifest.graph.steps
    return steps == most or (stepwise and steps < most)


def _input_ids(setting: _Setting, bundle: Bundle) -> Int64:
    """Return the same tokens (batch, tokens) int64 for every side: running prose, each row from another word on.

    Not random tokens: how flat the softmax over the vocabulary is decides what a soft token costs in INT8 variants.
    """
    tokenizer = load_tokenizer(bundle.file("tokenizer.json"))
    prose = np.array(tokenizer.encode(PROSE, add_special_tokens=False).ids, np.int64)
    starts = np.arange(setting.batch)[:, None] * len(prose) // setting.batch
    picked: Int64 = prose[(starts + np.arange(setting.tokens)) % len(prose)]
    return picked


def _latency(setting: _Setting, spec: BackendSpec, seconds: Sequence[float], bandwidth: float) -> Latency:
    spread = _spread(seconds)
    roofline = None
    if spec.kind is Kind.BUNDLE and spec.provider is Provider.CPU:
        read = weight_bytes_read(Bundle.open(spec.bundle), spec.precision, layout=spec.layout, steps=setting.steps)
        roofline = read / bandwidth
    return Latency(
        side=spec.name,
        batch=setting.batch,
        tokens=setting.tokens,
        steps=setting.steps,
        seconds=spread,
        texts_per_s=setting.batch / spread.median,
        roofline_s=roofline,
    )


def _spread(seconds: Sequence[float]) -> Spread:
    return Spread(
        median=float(np.median(seconds)),
        p95=float(np.percentile(seconds, 95)),
        low=min(seconds),
        high=max(seconds),
        repeats=len(seconds),
    )


def _model_bytes(spec: BackendSpec) -> int:
    """Return the size of the files that a side loads."""
    bundle = Bundle.open(spec.bundle)
    if spec.gguf is not None:
        return spec.gguf.stat().st_size
    if spec.kind is Kind.BUNDLE:
        variant = bundle.manifest.variants[spec.precision]
        names = [variant.weights, variant.graphs[bundle.layout(spec.precision, spec.layout)].path]
        return sum(bundle.manifest.files[name].bytes for name in names)
    checkpoint = source_checkpoint(bundle.manifest)
    paths = [*checkpoint.shards]
    if checkpoint.adapter_directory is not None:
        paths.append(checkpoint.adapter_directory / "adapter_model.safetensors")
    return sum(path.stat().st_size for path in paths)


def _measure_quality(spec: BackendSpec, tasks: Sequence[Task], progress: StageProgress) -> Iterator[Quality]:
    bundle = Bundle.open(spec.bundle)
    for task in tasks:
        side = BundleBackend(bundle, spec.precision, layout=spec.layout, provider=spec.provider, threads=spec.threads)
        token_ids = tokenize_prompts(open_tokenizer(bundle), task.prompts)
        with progress.stage(
            f"embed {len(token_ids)} texts of {task.name}: {spec.name}", total=len(token_ids)
        ) as advance:
            vectors = side.embed(token_ids, advance)
        yield Quality(spec.name, task.name, task.metric, score_steps(task, vectors))
