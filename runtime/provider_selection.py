"""Open a bundle on the provider that was asked for, or for ``auto`` on the best one.

An explicit provider never falls back to another. ``auto`` tries them in the order of ``AUTO_ORDER`` and logs which one
runs, and why those before it do not.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from gircse.runtime.bundle import Bundle
from gircse.runtime.errors import BundleError, EngineMismatchError, OptionError, ProviderError
from gircse.runtime.manifest import Layout
from gircse.runtime.ort_package import import_onnxruntime
from gircse.runtime.ort_session import open_session
from gircse.runtime.precision import CPU_ORDER, GPU_ORDER, runs_on
from gircse.runtime.provider import Provider
from gircse.runtime.session import Session
from gircse.runtime.trt.engine_manifest import select_engine
from gircse.runtime.trt.library import MODULES, import_tensorrt

logger = logging.getLogger(__name__)

AUTO_ORDER = (Provider.TENSORRT, Provider.TENSORRT_RTX, Provider.CUDA, Provider.CPU)
"""Engines come first, because they exist only where somebody built them. ONNX Runtime's TensorRT provider runs only on
request: it builds engines when it loads, which takes minutes."""


@dataclass(frozen=True)
class SessionHandle:
    """A session and what it runs.

    Attributes:
        session: ready to run.
        provider: where it runs; never ``auto``.
        precision: the variant that it runs.
    """

    session: Session
    provider: Provider
    precision: str


@dataclass(frozen=True)
class SessionOptions:
    """What to load.

    Attributes:
        precision: variant; None takes the first that suits the provider.
        layout: graph; None takes the one that suits the provider, or any engine.
        threads: threads of one run on the CPU; None takes the physical cores, or one with several streams.
        streams: batches that run at once on the CPU.
        verify: compare the SHA-256 of the files with the manifest.
    """

    precision: str | None = None
    layout: Layout | None = None
    threads: int | None = None
    streams: int = 1
    verify: bool = True

    def __post_init__(self) -> None:
        """Refuse numbers that there cannot be."""
        if self.threads is not None and self.threads < 1:
            hint = "Leave it out to use every physical core."
            raise OptionError("threads", f"is {self.threads}", "it has to be at least 1", hint)
        if self.streams < 1:
            raise OptionError("streams", f"is {self.streams}", "it has to be at least 1")

    @property
    def run_threads(self) -> int | None:
        """Threads of one run on the CPU; None takes the physical cores."""
        return 1 if self.threads is None and self.streams > 1 else self.threads


def open_provider(bundle: Bundle, provider: Provider, options: SessionOptions) -> SessionHandle:
    """Load a variant of a bundle on a provider.

    Raises:
        ProviderError: the provider is not installed or not usable, or there is no engine that fits.
        BundleError: the bundle has no such variant or layout, or a file of it does not load.
    """
    if options.precision is not None:
        bundle.variant(options.precision)
    if provider is not Provider.AUTO:
        return _open(bundle, provider, options)
    skipped: list[ProviderError] = []
    for candidate in AUTO_ORDER:
        try:
            opened = _open(bundle, candidate, options)
        except ProviderError as err:
            skipped.append(err)
            continue
        logger.info("provider auto: runs on %s in %s", opened.provider, opened.precision)
        _log_skipped(skipped, logging.INFO)
        skipped.clear()  # their tracebacks hold this frame and, through it, the embedder that is being made
        return opened
    _log_skipped(skipped[:-1], logging.WARNING)
    raise skipped[-1]


def _log_skipped(skipped: Sequence[ProviderError], level: int) -> None:
    for err in skipped:
        # Somebody built an engine and expects it to run.
        severity = logging.WARNING if isinstance(err, EngineMismatchError) else level
        logger.log(severity, "provider auto: skipped: %s", err)


def _open(bundle: Bundle, provider: Provider, options: SessionOptions) -> SessionHandle:
    if provider in MODULES:
        return _open_engine(bundle, provider, options)
    on_cpu = provider is Provider.CPU
    precision = options.precision or bundle.default_precision(CPU_ORDER if on_cpu else GPU_ORDER)
    if not on_cpu and not runs_on(precision, provider):
        able = [name for name in GPU_ORDER if runs_on(name, provider)]
        engine = ", or build an engine from it: gircse-build" if runs_on(precision, Provider.TENSORRT) else ""
        raise ProviderError(
            f"provider {provider}",
            f"does not run {precision}",
            f"its graph is made for the CPU; ONNX Runtime on a GPU runs {', '.join(able)}",
            f"Choose another precision or provider{engine}.",
        )
    import_onnxruntime(provider)  # before any file is hashed: `auto` may have to pass over it
    open_it = functools.partial(
        open_session, bundle, precision, layout=options.layout, provider=provider, threads=options.run_threads
    )
    session = _while_verifying(bundle, precision, open_it) if options.verify else open_it()
    return SessionHandle(session, provider, precision)


def _while_verifying(bundle: Bundle, precision: str, open_it: Callable[[], Session]) -> Session:
    """Load the graphs while a second thread hashes the files; a wrong hash explains a failed load, so it wins."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        verification = pool.submit(bundle.verify, precision)
        try:
            session = open_it()
        except BundleError:
            verification.result()
            raise
        verification.result()
    return session


def _open_engine(bundle: Bundle, provider: Provider, options: SessionOptions) -> SessionHandle:
    from gircse.runtime.trt.cuda import open_cuda
    from gircse.runtime.trt.session import open_tensorrt_session

    module = import_tensorrt(provider)
    cuda = open_cuda()
    manifest, path = select_engine(
        bundle,
        provider=provider,
        version=module.__version__,
        capability=cuda.compute_capability(),
        precisions=(options.precision,) if options.precision else GPU_ORDER,
        layout=options.layout,
        verify=options.verify,
    )
    if options.verify:
        bundle.verify(None)  # tokenizer and golden vectors; the engine has its own copy of the weights
    session = open_tensorrt_session(bundle, manifest, path, module=module, cuda=cuda)
    return SessionHandle(session, provider, manifest.precision)
