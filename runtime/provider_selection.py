"""Open a bundle on the provider that was asked for, or on the best one for ``auto``.

An explicit provider never falls back to another. ``auto`` tries them in the order of ``AUTO_ORDER`` and logs which one
it took, and why not those before it.
"""

import functools
import importlib
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from gircse.runtime.bundle import Bundle, Layout, Precision
from gircse.runtime.errors import BundleError, EngineMismatchError, ProviderError
from gircse.runtime.ort_session import Session, open_session
from gircse.runtime.provider import Provider
from gircse.runtime.trt.engine_manifest import Flavour, select_engine

logger = logging.getLogger(__name__)

AUTO_ORDER = (Provider.TENSORRT, Provider.TENSORRT_RTX, Provider.CUDA, Provider.CPU)
"""Engines first, because they exist only where somebody built them. ONNX Runtime's TensorRT provider builds its own
engines when it loads, which takes minutes: only on request."""

CPU_PRECISIONS = (Precision.FP32, Precision.FP16, Precision.INT8, Precision.INT8_WEIGHTS)
GPU_PRECISIONS = (Precision.FP16, Precision.BF16, Precision.FP32, Precision.INT8, Precision.INT8_WEIGHTS)
"""Which variant is taken when none is named. FP16 is the slower one on a CPU, which computes it in FP32. INT8 costs
accuracy, so it comes last, and first of its kinds the one that multiplies integers."""

MODULES = {Flavour.TENSORRT: "tensorrt", Flavour.TENSORRT_RTX: "tensorrt_rtx"}


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
        precision: variant; None takes the first of ``CPU_PRECISIONS`` or ``GPU_PRECISIONS`` that the bundle has.
        layout: graph; None takes the variant's default, or any engine.
        threads: threads of one run on the CPU; None takes the physical cores.
        verify: compare the SHA-256 of the files with the manifest.
    """

    precision: str | None = None
    layout: Layout | None = None
    threads: int | None = None
    verify: bool = True


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
        return opened
    _log_skipped(skipped[:-1], logging.WARNING)
    raise skipped[-1]


def _log_skipped(skipped: Sequence[ProviderError], level: int) -> None:
    for err in skipped:
        # Somebody built an engine and expects it to run.
        severity = logging.WARNING if isinstance(err, EngineMismatchError) else level
        logger.log(severity, "provider auto: passed over: %s", err)


def _open(bundle: Bundle, provider: Provider, options: SessionOptions) -> SessionHandle:
    if provider in (Provider.TENSORRT, Provider.TENSORRT_RTX):
        return _open_engine(bundle, Flavour(provider), options)
    preferred = CPU_PRECISIONS if provider is Provider.CPU else GPU_PRECISIONS
    precision = options.precision or bundle.default_precision(preferred)
    open_it = functools.partial(
        open_session, bundle, precision, layout=options.layout, provider=provider, threads=options.threads
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


def _open_engine(bundle: Bundle, flavour: Flavour, options: SessionOptions) -> SessionHandle:
    from gircse.runtime.trt.cuda import open_cuda
    from gircse.runtime.trt.session import open_tensorrt_session

    module = import_tensorrt(flavour)
    cuda = open_cuda()
    plan, path = select_engine(
        bundle,
        flavour=flavour,
        version=module.__version__,
        capability=cuda.compute_capability(),
        precisions=(options.precision,) if options.precision else GPU_PRECISIONS,
        layout=options.layout,
        verify=options.verify,
    )
    if options.verify:
        bundle.verify(None)  # tokenizer and golden vectors; the engine holds weights of its own
    session = open_tensorrt_session(bundle, plan, path, module=module, cuda=cuda)
    return SessionHandle(session, Provider(flavour), plan.precision)


def import_tensorrt(flavour: Flavour) -> Any:
    """Import the Python module of a TensorRT.

    Raises:
        ProviderError: it is not installed.
    """
    name = MODULES[flavour]
    try:
        return importlib.import_module(name)
    except ImportError as err:
        raise ProviderError(
            f"{flavour}: {name} is not installed ({err}) | TensorRT's Python package | "
            f"pip install 'gircse-deploy[{flavour}]'"
        ) from err
