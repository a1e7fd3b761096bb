"""Parity and latency of every provider on this machine's GPU, against PyTorch on the same card, within a time limit.

    pip install ".[demo,evaluation,export,gpu,tensorrt]" pytest     # or tensorrt-rtx
    python benchmarks/gpu.py                                        # the demo
    python benchmarks/gpu.py MODEL --export-flags="--adapter A" --minutes 60
    python benchmarks/gpu.py qwen2.5-7b --precision fp16,bf16       # random weights in that shape
    python benchmarks/gpu.py --providers cpu --device cpu           # a rehearsal without a GPU

First comes a small model: if the first provider does not give its vectors, nothing else runs. Then the export, parity
of the first provider, its latency, the other providers, and the rest. Every result has a file in the folder of results,
and the same command goes on where the last run ended; delete a file to measure again. Ends with one table, which
results.md and results.json there have too.
"""

import argparse
import contextlib
import ctypes
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from gpu_report import write_report
from timed_commands import Command, Status, run_commands

from gircse.evaluation.environment import describe_environment
from gircse.runtime.command import comma_separated
from gircse.runtime.errors import ProviderError
from gircse.runtime.manifest import Layout
from gircse.runtime.ort_session import import_onnxruntime
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
    def first(self) -> Provider:
        """The provider without which there is nothing to measure."""
        return self.providers[0]

    def precisions_of(self, provider: Provider) -> list[str]:
        """Return what a provider is measured in; engines are for FP16 and BF16."""
        return [
            name for name in self.precisions if runs_on(name, provider) and not (provider in MODULES and name == "fp32")
        ]


def main() -> int:
    """Measure and print the table; returns 0 if all that is installed was measured, 2 if the first provider is not."""
    options = parse_options()
    deadline = time.monotonic() + 60 * options.minutes
    if reason := why_missing(options.first):
        print(reason, file=sys.stderr)
        return 2
    options.results.mkdir(parents=True, exist_ok=True)
    if not of_this_machine(options.results):
        print(
            f"{options.results} has results of another machine, driver or version: choose another --results.",
            file=sys.stderr,
        )
        return 2
    try:
        outcomes = run_commands(list(commands(options)), options.results, deadline=deadline)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130
    print(f"\n{write_report(outcomes, options.results, options.bundle)}")
    return 0 if all(outcome.status in (Status.DONE, Status.SKIPPED) for outcome in outcomes) else 1


def parse_options(argv: Sequence[str] | None = None) -> Options:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--export-flags", default="", metavar="FLAGS", help="further flags of gircse-export")
    parser.add_argument("--results", type=Path, metavar="DIR", help="default: gircse-gpu-MODEL")
    parser.add_argument(
        "--minutes",
        type=float,
        default=float(os.environ.get("GIRCSE_GPU_MINUTES", "20")),
        help="ends after this time (default: $GIRCSE_GPU_MINUTES, else 20)",
    )
    parser.add_argument("--providers", type=comma_separated(Provider), default=PROVIDERS, metavar="P,...")
    parser.add_argument("--device", default="cuda", help="of PyTorch (default: cuda)")
    parser.add_argument(
        "--precision",
        dest="precisions",
        type=comma_separated(str),
        default=("fp32", "fp16", "bf16"),
        metavar="P,...",
        help="of the bundle; latency is first measured in fp16 (default: fp32,fp16,bf16)",
    )
    parser.add_argument("--steps", type=int, default=8, metavar="K")
    parser.add_argument("--batch", dest="batches", default="1,8,32", metavar="N,...")
    parser.add_argument("--tokens", default="24,128", metavar="N,...")
    args = parser.parse_args(argv)
    args.results = (args.results or Path(f"gircse-gpu-{Path(args.model).name}")).resolve()
    return Options(**vars(args))


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
    for provider in others:
        yield from self_tests(options, provider, why_missing(provider))
        yield from fidelity_and_speed(options, provider)
    yield from the_rest(options, first)
    yield from cpp_runtime(options)
    tests = (sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "gpu", str(ROOT / "tests" / "test_gpu.py"))
    yield Command("tests", tests, 300, (ready,), None if find_spec("pytest") else "pytest is not installed")


def of_this_machine(results: Path) -> bool:
    """Note machine and versions in a new folder of results; return whether those of an old one are the same."""
    path = results / "environment.json"
    if path.is_file():
        return bool(json.loads(path.read_text(encoding="utf-8")) == describe_environment())
    path.write_text(json.dumps(describe_environment(), indent=1), encoding="utf-8")
    return True


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
    model = options.model
    if model == RANDOM_MODEL:
        model = str(options.results / "model")
        make = (sys.executable, "-c", MAKE_RANDOM_MODEL, str(ROOT / "benchmarks"), model)
        yield Command("model", make, 900, (ready,))
        ready = "model"
    precisions = ",".join(options.precisions)
    flags = ("--steps", str(options.steps), "--precision", precisions, "--output", str(options.bundle), "--force")
    argv = ("gircse-export", "--model", model, *flags, *shlex.split(options.export_flags))
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
    argv = ("gircse-parity", str(options.bundle), *flags, "--report", str(options.results / name))
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
    against = ("--against", "torch", "--device", options.device, "--dtype", "fp16") if "fp16" in precisions else ()
    few = ("--repeats", "5", "--setting-seconds", "3", "--report", str(options.results / name))
    argv = ("gircse-bench", str(options.bundle), *flags, *sizes, *against, *few)
    return Command(name, argv, 600, needs, writes=options.results / name / "bench.json")


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


if __name__ == "__main__":
    sys.exit(main())
