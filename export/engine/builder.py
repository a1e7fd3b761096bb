"""Build a TensorRT engine from a variant of a bundle: parse, check, announce the cost, build, write plan and JSON.

Works with ``tensorrt`` 10.15 or later and 11, which need the GPU that the engine is for, and with ``tensorrt_rtx``,
which needs none. Networks are strongly typed: the precision is that of the graph.
"""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from gircse.checkpoint.available_memory import available_memory
from gircse.export.engine.profiles import (
    DEFAULT_BATCH,
    DEFAULT_TOKENS,
    ProfileSpec,
    SizeRange,
    default_specs,
    engine_profiles,
)
from gircse.export.engine.tensorrt_builder import TensorRtBuilder
from gircse.reporting.progress import StageProgress
from gircse.reporting.sizes import gib
from gircse.runtime import tensor_names
from gircse.runtime.atomic_file import atomic_write
from gircse.runtime.bundle import Bundle
from gircse.runtime.errors import ExportError, OptionError, OutputError, ProviderError
from gircse.runtime.manifest import Layout
from gircse.runtime.precision import GPU_ORDER, SPECS, precision_spec
from gircse.runtime.provider import Provider
from gircse.runtime.trt.engine_manifest import (
    ENGINE_SCHEMA_VERSION,
    ENGINES_FOLDER,
    BuildRequest,
    EngineManifest,
    EngineProfile,
)
from gircse.runtime.trt.library import MODULES, import_tensorrt

LAYER_PAIR_SECONDS = 1.1e-6
"""Build time of TensorRT for RTX divided by profiles and the square of the layers (measured at 2,400 to 6,100 layers;
beyond that it grows faster; 8,061 layers of an FP8 graph take half of it)."""

SLOW_BUILD_SECONDS = 60.0
"""Above this estimate, the user is told of the layout that builds in seconds."""

BUILD_BYTES, LAYER_BYTES = 1 << 29, 1 << 18
"""Memory of a build beyond three times its weights, and of each layer (measured with TensorRT for RTX, demo, FP16: 1.4
GiB for 2,400 layers, 4.1 GiB for 17,600)."""

MAX_WORKSPACE_GIB = 1 << 20


@dataclass(frozen=True)
class BuildOptions:
    """What to build; the fields are the flags of ``gircse-build``.

    Attributes:
        bundle: bundle directory.
        precision: variant; None takes the first of ``GPU_ORDER`` that the bundle has.
        provider: which TensorRT; None takes the one that is installed.
        layout: graph to build from.
        batch: texts of a run.
        tokens: tokens of a prompt; None goes up to the bundle's ``max_tokens``.
        profiles: named profiles in place of the default ones, ``NAME=BATCH`` or ``NAME=BATCHxTOKENS``.
        capabilities: compute capabilities to build for; empty takes that of the GPU.
        timing_cache: file of kernel timings that speeds up later builds (not RTX, which times nothing); None is one
            next to the plan.
        workspace_gib: maximum workspace of a kernel; None leaves it to TensorRT.
        weight_streaming: let weights that the GPU has no room for stay in main memory.
        layer_outputs: show the values between the layers, and let them be replaced.
    """

    bundle: Path
    precision: str | None = None
    provider: Provider | None = None
    layout: Layout = Layout.STEPWISE
    batch: SizeRange = DEFAULT_BATCH
    tokens: SizeRange | None = None
    profiles: Sequence[str] = ()
    capabilities: Sequence[str] = ()
    timing_cache: Path | None = None
    workspace_gib: float | None = None
    weight_streaming: bool = False
    layer_outputs: bool = False

    def __post_init__(self) -> None:
        """Refuse a workspace that is not a size, and layers of a layout that has several copies of each."""
        if self.workspace_gib is not None and not 0 < self.workspace_gib <= MAX_WORKSPACE_GIB:
            raise OptionError(
                "--workspace-gib",
                f"is {self.workspace_gib}",
                f"it can be above 0, up to {MAX_WORKSPACE_GIB}",
                "Leave it out for TensorRT's default limit.",
            )
        if self.layer_outputs and self.layout is not Layout.STEPWISE:
            raise OptionError("--layer-outputs", f"is for the {Layout.STEPWISE} layout", f"--layout is {self.layout}")


def build_engine(options: BuildOptions, *, progress: StageProgress | None = None) -> Path:
    """Build one engine.

    Args:
        options: what to build.
        progress: where to show the stages; None makes one on stderr.

    Returns:
        The path of the plan; its JSON lies next to it.

    Raises:
        BundleError: the bundle cannot be used.
        OptionError: an option does not fit the bundle or this TensorRT.
        ProviderError: TensorRT is not installed, or there is no GPU to build on.
        ExportError: TensorRT refuses the graph or a profile, or cannot build it, or there is too little memory.
        OutputError: the engine cannot be written, or there is too little room on the disk.
    """
    progress = progress or StageProgress()
    bundle = Bundle.open(options.bundle)
    provider = options.provider or _installed_provider()
    module = import_tensorrt(provider)
    precision = options.precision or bundle.default_precision(GPU_ORDER)
    bundle.variant(precision)
    if not precision_spec(precision).tensorrt:
        raise OptionError(
            f"--precision {precision}",
            "is made for ONNX Runtime, with products that TensorRT does not have",
            f"engines are built from {', '.join(name for name, spec in SPECS.items() if spec.tensorrt)}",
        )
    profiles = _profiles(options, bundle, provider)
    capabilities = _capabilities(options, module, provider)
    _check_capabilities(capabilities, precision)
    with progress.stage(f"check the files of {bundle.directory.name}:{precision}"):
        bundle.verify(precision)
    builder = TensorRtBuilder(module, provider)
    with progress.stage(f"parse the {options.layout} {precision} graph"):
        builder.parse(bundle.engine_graph(precision, options.layout))
        if options.layer_outputs:
            facts = bundle.manifest.graph
            builder.show_values(tensor_names.layer_inputs(facts.num_layers, prompt=True, step=facts.steps > 0))
    _announce_cost(builder, bundle, precision, profiles, provider, progress, layout=options.layout)
    builder.configure(
        profiles,
        capabilities,
        workspace_gib=options.workspace_gib,
        weight_streaming=options.weight_streaming,
    )
    folder = bundle.directory / ENGINES_FOLDER
    cache = None if provider is Provider.TENSORRT_RTX else options.timing_cache or folder / "timing.cache"
    try:
        folder.mkdir(exist_ok=True)
        builder.use_timing_cache(cache)
        start = time.perf_counter()
        title = f"build for {provider} {module.__version__}, compute capability {', '.join(capabilities)}"
        with progress.stage(title, total=1.0) as advance:
            serialized = builder.build(advance)
        manifest = EngineManifest(
            schema_version=ENGINE_SCHEMA_VERSION,
            bundle_sha256=bundle.manifest_sha256(),
            precision=precision,
            layout=options.layout,
            provider=provider,
            version=str(module.__version__),
            compute_capabilities=tuple(capabilities),
            profiles=tuple(profiles),
            request=BuildRequest(
                batch=options.batch,
                tokens=options.tokens,
                profiles=tuple(options.profiles),
                workspace_gib=options.workspace_gib,
                weight_streaming=options.weight_streaming,
                layer_outputs=options.layer_outputs,
            ),
            settings=builder.settings,
            build_seconds=round(time.perf_counter() - start, 1),
            plan_bytes=serialized.nbytes,
            plan_sha256=hashlib.sha256(serialized).hexdigest(),
        )
        with progress.stage(f"write {serialized.nbytes / 1e6:.0f} MB"):
            return _write(folder, manifest, serialized)
    except OSError as err:
        raise OutputError(
            str(err.filename or folder),
            f"cannot be written: {err.strerror or err}",
            "nothing was left behind",
            "Free some space, or check the permissions.",
        ) from err


def _installed_provider() -> Provider:
    for provider in MODULES:
        try:
            import_tensorrt(provider)
        except ProviderError:
            continue
        return provider
    raise ProviderError(
        "TensorRT",
        f"is not installed, neither {' nor '.join(MODULES.values())}",
        None,
        "Install it: " + " or ".join(f"pip install 'gircse-deploy[{provider}]'" for provider in MODULES),
    )


def _profiles(options: BuildOptions, bundle: Bundle, provider: Provider) -> list[EngineProfile]:
    facts = bundle.manifest.graph
    tokens = options.tokens or SizeRange(1, min(DEFAULT_TOKENS, facts.max_tokens), facts.max_tokens)
    specs = [ProfileSpec.parse(text, tokens=tokens) for text in options.profiles]
    specs = specs or default_specs(provider, options.batch, tokens)
    return engine_profiles(specs, facts, layout=options.layout, provider=provider, layer_outputs=options.layer_outputs)


def _capabilities(options: BuildOptions, module: Any, provider: Provider) -> list[str]:
    """Return the compute capabilities to build for; only TensorRT for RTX builds for another GPU than that here."""
    from gircse.runtime.trt.cuda import open_cuda

    wanted = list(dict.fromkeys(options.capabilities))
    if provider is Provider.TENSORRT_RTX:
        return _rtx_capabilities(wanted, module)
    found = open_cuda().compute_capability()
    if wanted not in ([], [found]):
        raise OptionError(
            "--sm",
            f"has {', '.join(map(repr, wanted))}",
            f"{provider} builds only for the GPU of this machine, {found}",
            "Build on the machine that will run the engine, or use --provider tensorrt-rtx.",
        )
    return [found]


def _rtx_capabilities(wanted: list[str], module: Any) -> list[str]:
    """Check the compute capabilities that were named; where there are none, return that of the GPU."""
    from gircse.runtime.trt.cuda import open_cuda

    known = [_dotted(name) for name in module.ComputeCapability.__members__ if name.startswith("SM")]
    builds_for = f"this {Provider.TENSORRT_RTX} {module.__version__} builds for {', '.join(known)}"
    for capability in wanted:
        if capability not in known:
            hint = "Choose from these, or use --provider tensorrt on the GPU itself."
            raise OptionError("--sm", f"has {capability!r}", builds_for, hint)
    if wanted:
        return wanted
    try:
        found = open_cuda().compute_capability()
    except ProviderError as err:
        hint = "To build for the GPU of another machine, name it: --sm 8.9"
        raise ProviderError(err.where, err.got, err.expected, hint) from err
    if found not in known:
        hint = "Use --provider tensorrt here, or name the GPU of another machine: --sm 8.9"
        raise ProviderError("this machine's GPU", f"has compute capability {found}", builds_for, hint)
    return [found]


def _check_capabilities(capabilities: Sequence[str], precision: str) -> None:
    """Refuse GPUs that have no instructions for a precision; TensorRT's own refusal comes late and names no GPU."""
    lowest = precision_spec(precision).min_capability
    for capability in capabilities:
        if tuple(map(int, capability.split("."))) < lowest:
            raise OptionError(
                f"--precision {precision}",
                f"cannot run on compute capability {capability}",
                f"it takes {'.'.join(map(str, lowest))} or higher",
                "Build from int8 or fp16 for this GPU.",
            )


def _dotted(name: str) -> str:
    digits = name.removeprefix("SM")
    return f"{digits[:-1]}.{digits[-1]}"


def _announce_cost(
    builder: TensorRtBuilder,
    bundle: Bundle,
    precision: str,
    profiles: Sequence[EngineProfile],
    provider: Provider,
    progress: StageProgress,
    *,
    layout: Layout,
) -> None:
    """Say what the build will need, and refuse what cannot fit."""
    weights = bundle.manifest.weight_bytes(precision)
    needed = BUILD_BYTES + 3 * weights + LAYER_BYTES * builder.num_layers
    free = available_memory()
    disk = psutil.disk_usage(str(bundle.directory)).free
    seconds = LAYER_PAIR_SECONDS * len(profiles) * builder.num_layers**2
    duration = (
        f"about {seconds:.0f} s" if provider is Provider.TENSORRT_RTX else "minutes, because it times its kernels"
    )
    names = ", ".join(dict.fromkeys(profile.name for profile in profiles))
    progress.note(
        f"  {builder.num_layers} layers, profiles: {names}; takes {duration}, about {gib(needed)} of memory "
        f"({gib(free)} available) and {gib(2 * weights)} of disk ({gib(disk)} free)"
    )
    if seconds > SLOW_BUILD_SECONDS and layout is Layout.UNROLLED:
        progress.note("  build time grows with the square of the layers: --layout stepwise builds fast whatever K is")
    if needed > free:
        raise ExportError(
            "the build", f"needs about {gib(needed)} of memory", f"{gib(free)} are available", "Close other programs."
        )
    if weights > disk:
        raise OutputError(
            str(bundle.directory),
            f"has {gib(disk)} of free disk space",
            f"the engine needs at least {gib(weights)}",
            "Free some space.",
        )


def _write(folder: Path, manifest: EngineManifest, serialized: memoryview) -> Path:
    """Write plan and JSON, both or none; the JSON comes last, because it says that the plan is there."""
    path = folder / f"{manifest.name}.plan"
    with atomic_write(path.with_suffix(".json")) as json_file, atomic_write(path) as file:
        json_file.write(manifest.to_json())
        json_file.flush()  # a full disk shows before the plan is there
        file.write(serialized)
    return path
