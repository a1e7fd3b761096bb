"""What gpu.py runs: the commands in their order, and what each of them needs."""

import contextlib
import ctypes
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from timed_commands import Command

from gircse.runtime.errors import ProviderError
from gircse.runtime.manifest import Layout
from gircse.runtime.ort_package import import_onnxruntime
from gircse.runtime.precision import runs_on
from gircse.runtime.provider import Provider
from gircse.runtime.trt.library import MODULES, import_tensorrt

ROOT = Path(__file__).resolve().parents[1]
PROVIDERS = (Provider.CUDA, Provider.TENSORRT, Provider.TENSORRT_RTX, Provider.ORT_TENSORRT)
SMOKE_SECONDS = 60
RANDOM_MODEL = "qwen2.5-7b"

MAKE_SMALL_MODEL = """
import sys
from pathlib import Path
sys.path.append(sys.argv[1])
from support.small_models import SmallModels
SmallModels(Path(sys.argv[2])).checkpoint("llama")
"""
MAKE_RANDOM_MODEL = """
import shutil, sys
from pathlib import Path
sys.path.append(sys.argv[1])
from seven_b_checkpoint import make_checkpoint
for directory in (sys.argv[2], f"{sys.argv[2]}.unfinished"):
    shutil.rmtree(directory, ignore_errors=True)
make_checkpoint("qwen-7b", Path(sys.argv[2]))
"""
MEASURE_BANDWIDTH = """
import sys, time, torch
wait = (lambda: None) if sys.argv[1] == "cpu" else torch.cuda.synchronize
source = torch.ones(2**28, device=sys.argv[1])
target = source.clone()
seconds = []
for _ in range(10):
    wait()
    start = time.perf_counter()
    target.copy_(source)
    wait()
    seconds.append(time.perf_counter() - start)
print(2 * source.nbytes / min(seconds))
"""
"""Bytes read and written by a copy, per second."""


@dataclass(frozen=True)
class Options:
    """The command line; ``results`` is the folder of results, ``steps`` is K."""

    model: str
    adapter: str | None
    export_flags: str
    results: Path
    minutes: float
    providers: tuple[Provider, ...]
    device: str
    precisions: tuple[str, ...]
    steps: int
    batches: str
    tokens: str

    @property
    def bundle(self) -> Path:
        """What is measured."""
        return self.results / "bundle"

    @property
    def checkpoint(self) -> str:
        """The model: a name, or the absolute path of its folder."""
        if self.model == RANDOM_MODEL:
            return str(self.results / "model")
        return str(Path(self.model).resolve()) if Path(self.model).is_dir() else self.model

    @property
    def local_sources(self) -> tuple[str, ...]:
        """Flags that say where model and adapter are; a bundle knows local ones by the names of their folders only."""
        flags = ("--model", self.checkpoint) if Path(self.checkpoint).is_absolute() else ()
        local = self.adapter is not None and Path(self.adapter).is_dir()
        return (*flags, "--adapter", str(Path(self.adapter or "").resolve())) if local else flags

    @property
    def first(self) -> Provider:
        """The provider without which there is nothing to measure."""
        return self.providers[0]

    def precisions_of(self, provider: Provider) -> list[str]:
        """Return what a provider is measured in; engines are for FP16 and BF16."""
        return [
            name for name in self.precisions if runs_on(name, provider) and not (provider in MODULES and name == "fp32")
        ]


def commands(options: Options) -> Iterator[Command]:
    """Yield what to run, the most valuable first."""
    first, *others = options.providers
    yield from small_model(options)
    yield from self_tests(options, first, None)
    ready = self_tests_name(first)
    yield from export(options, ready)
    yield from fidelity_and_speed(options, first)
    bandwidth = (sys.executable, "-c", MEASURE_BANDWIDTH, options.device)
    yield Command("bandwidth", bandwidth, 60, (ready,))
    yield torch_steps(options)
    for provider in others:
        yield from self_tests(options, provider, why_missing(provider))
        yield from fidelity_and_speed(options, provider)
    for provider in options.providers:
        yield from layers_of_engine(options, provider)
    yield from the_rest(options, first)
    yield from cpp_runtime(options)
    tests = (sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "gpu", str(ROOT / "tests" / "test_gpu.py"))
    yield Command("tests", tests, 300, (ready,), None if find_spec("pytest") else "pytest is not installed")


def why_missing(provider: Provider) -> str | None:
    """Return why a provider cannot run here, as far as its packages and libraries tell; None if they are there."""
    try:
        if provider in MODULES:
            import_tensorrt(provider)
        else:
            import_onnxruntime(provider)
        if provider is Provider.ORT_TENSORRT:
            load_onnxruntime_tensorrt()
    except (ProviderError, OSError) as err:
        return str(err)
    return None


def load_onnxruntime_tensorrt() -> None:
    """Load what ONNX Runtime loads for its TensorRT provider, which its packages list whether TensorRT is there or not.

    Raises:
        OSError: a library is missing; the message names it.
    """
    import onnxruntime

    with contextlib.redirect_stdout(sys.stderr):
        onnxruntime.preload_dlls()
    folder = Path(onnxruntime.__file__).parent / "capi"
    for name in ("shared", "tensorrt"):
        ctypes.CDLL(str(folder / f"libonnxruntime_providers_{name}.so"))


def small_model(options: Options) -> Iterator[Command]:
    """Yield the making of a two-layer model and its bundle with one step."""
    folder = options.results / "small"
    make = (sys.executable, "-c", MAKE_SMALL_MODEL, str(ROOT / "tests"), str(folder))
    yield Command("small-model", make, SMOKE_SECONDS)
    flags = ("--steps", "1", "--max-tokens", "96", "--precision", "fp32,fp16", "--output", str(folder / "bundle"))
    export = ("gircse-export", "--model", str(folder / "llama"), *flags, "--force")
    yield Command("small-export", export, SMOKE_SECONDS, ("small-model",))


def self_tests(options: Options, provider: Provider, missing: str | None) -> Iterator[Command]:
    """Yield self-tests on the small bundle; the last one is what everything else on the provider needs."""
    bundle = str(options.results / "small" / "bundle")
    needs = "small-export"
    if provider in MODULES:
        build = ("gircse-build", bundle, "--provider", provider, "--precision", "fp16", "--batch", "1:2:16")
        yield Command(f"small-build-{provider}", build, SMOKE_SECONDS, (needs,), missing)
        needs = f"small-build-{provider}"
    for precision in small_precisions(provider):
        test = ("gircse-embed", bundle, "--self-test", "--provider", provider, "--precision", precision)
        yield Command(f"small-{provider}-{precision}", test, SMOKE_SECONDS, (needs,), missing)
        needs = f"small-{provider}-{precision}"


def self_tests_name(provider: Provider) -> str:
    """Return the name of a provider's last self-test."""
    return f"small-{provider}-{small_precisions(provider)[-1]}"


def small_precisions(provider: Provider) -> tuple[str, ...]:
    """Return the precisions of the self-tests: what has to build an engine first takes one."""
    return ("fp16",) if provider in (*MODULES, Provider.ORT_TENSORRT) else ("fp32", "fp16")


def export(options: Options, ready: str) -> Iterator[Command]:
    """Yield the export of what is measured."""
    model = options.checkpoint
    if options.model == RANDOM_MODEL:
        make = (sys.executable, "-c", MAKE_RANDOM_MODEL, str(ROOT / "benchmarks"), model)
        yield Command("model", make, 900, (ready,))
        ready = "model"
    precisions = ",".join(options.precisions)
    flags = ("--steps", str(options.steps), "--precision", precisions, "--output", str(options.bundle), "--force")
    source = ("--model", model, *(("--adapter", options.adapter) if options.adapter else ()))
    argv = ("gircse-export", *source, "--device", options.device, *flags, *shlex.split(options.export_flags))
    yield Command("export", argv, 1800, (ready,))


def fidelity_and_speed(options: Options, provider: Provider) -> Iterator[Command]:
    """Yield parity in every precision, and latency in FP16 beside PyTorch in FP16."""
    needs: tuple[str, ...] = (self_tests_name(provider), "export")
    precisions = options.precisions_of(provider)
    if provider in MODULES:
        builds = {f"build-{provider}-{name}": name for name in precisions}
        for name, precision in builds.items():
            build = ("gircse-build", str(options.bundle), "--provider", provider, "--precision", precision)
            yield Command(name, build, 600, needs)
        needs = tuple(builds)
    yield parity(options, provider, Layout.STEPWISE, needs)
    for layout in (Layout.STEPWISE,) if provider in MODULES else (Layout.UNROLLED, Layout.STEPWISE):
        yield latency(options, provider, layout, ["fp16"], needs)


def layers_of_engine(options: Options, provider: Provider) -> Iterator[Command]:
    """Yield the comparison of an engine's layers with those in FP32, of the small bundle: whether it runs at all."""
    if provider not in MODULES:
        return
    bundle = str(options.results / "small" / "bundle")
    flags = ("--provider", provider, "--precision", "fp16")
    build = ("gircse-build", bundle, *flags, "--batch", "1:2:16", "--layer-outputs")
    yield Command(f"small-build-layers-{provider}", build, SMOKE_SECONDS, (self_tests_name(provider),))
    name = f"small-locate-{provider}"
    report = ("--report", str(options.results / name))
    argv = ("gircse-parity", bundle, "--reference", f"{bundle}:fp32", *flags, "--locate", *report)
    needs = (f"small-build-layers-{provider}",)
    yield Command(name, argv, 300, needs, verdicts=(1,), writes=options.results / name / "parity.json")


def the_rest(options: Options, provider: Provider) -> Iterator[Command]:
    """Yield the other precisions, fewer steps, and the parity of the other layout."""
    needs = (self_tests_name(provider), "export")
    others = [name for name in options.precisions_of(provider) if name != "fp16"]
    for layout in (Layout.UNROLLED, Layout.STEPWISE) if others else ():
        yield latency(options, provider, layout, others, needs)
    for steps in sorted({1, 4} & set(range(options.steps))):
        yield latency(options, provider, Layout.STEPWISE, ["fp16"], needs, steps=steps)
    yield parity(options, provider, Layout.UNROLLED, needs)


def parity(options: Options, provider: Provider, layout: Layout, needs: tuple[str, ...]) -> Command:
    """Return the comparison with PyTorch in FP32 on the same device; a gate that is not passed is a result."""
    name = f"parity-{provider}-{layout}"
    precisions = ("--precision", ",".join(options.precisions_of(provider)))
    flags = ("--provider", provider, "--layout", layout, *precisions, "--device", options.device)
    report = ("--report", str(options.results / name))
    argv = ("gircse-parity", str(options.bundle), *options.local_sources, *flags, *report)
    return Command(name, argv, 600, needs, verdicts=(1,), writes=options.results / name / "parity.json")


def latency(
    options: Options,
    provider: Provider,
    layout: Layout,
    precisions: Sequence[str],
    needs: tuple[str, ...],
    *,
    steps: int | None = None,
) -> Command:
    """Return a measurement of the time: FP16 beside PyTorch in FP16, the others alone."""
    name = f"latency-{provider}-{layout}-{'-'.join(precisions)}" + (f"-{steps}" if steps else "")
    flags = ("--provider", provider, "--layout", layout, "--precision", ",".join(precisions))
    sizes = ("--batch", options.batches, "--tokens", options.tokens, "--steps", str(steps or options.steps))
    against = ("--against", "torch", "--device", options.device, "--dtype", "fp16", *options.local_sources)
    few = ("--repeats", "5", "--setting-seconds", "3", "--report", str(options.results / name))
    argv = ("gircse-bench", str(options.bundle), *flags, *sizes, *(against if "fp16" in precisions else ()), *few)
    return Command(name, argv, 600, needs, writes=options.results / name / "bench.json")


def torch_steps(options: Options) -> Command:
    """Return the measurement of the official loop in PyTorch and of its parts."""
    output = options.results / "torch-steps" / "steps.json"
    sizes = ("--batch", options.batches, "--tokens", options.tokens, "--steps", str(options.steps))
    flags = ("--device", options.device, "--dtype", "fp16", *options.local_sources, *sizes, "--output", str(output))
    argv = (sys.executable, str(ROOT / "benchmarks" / "torch_steps.py"), str(options.bundle), *flags)
    return Command("torch-steps", argv, 300, ("export",), writes=output)


def cpp_runtime(options: Options) -> Iterator[Command]:
    """Yield self-tests of the C++ command, see docs/cpp.md."""
    libraries = onnxruntime_libraries()
    missing = None
    if not shutil.which("gircse-embed-cpp"):
        missing = "gircse-embed-cpp is not installed (docs/cpp.md)"
    elif not libraries:
        missing = "the package onnxruntime has no libonnxruntime.so"
    environment = {} if missing else {"GIRCSE_ONNXRUNTIME": str(libraries[0]), "LD_LIBRARY_PATH": cuda_search_path()}
    for provider in (name for name in options.providers if name not in MODULES):
        needs = (self_tests_name(provider), "export")
        for precision in options.precisions_of(provider):
            flags = ("--provider", provider, "--precision", precision, "--self-test")
            argv = ("gircse-embed-cpp", str(options.bundle), *flags)
            yield Command(f"cpp-{provider}-{precision}", argv, 300, needs, missing, environment=environment)


def onnxruntime_libraries() -> list[Path]:
    """Return the C libraries of the package onnxruntime, one at most."""
    import onnxruntime

    return list((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*"))


def cuda_search_path() -> str:
    """Return LD_LIBRARY_PATH with CUDA and cuDNN from pip, where the loader does not look."""
    nvidia = find_spec("nvidia")
    roots = (nvidia and nvidia.submodule_search_locations) or []
    folders = [str(path) for root in roots for path in Path(root).glob("*/lib")]
    return ":".join([*folders, *filter(None, [os.environ.get("LD_LIBRARY_PATH")])])
