"""The models of a bundle for Triton: what their configurations say, and which files they consist of."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from gircse.runtime.bundle import Bundle
from gircse.runtime.errors import OptionError, ProviderError
from gircse.runtime.manifest import Layout, TensorSpec
from gircse.runtime.precision import CPU_ORDER, GPU_ORDER, runs_on
from gircse.runtime.provider import Provider
from gircse.runtime.tensor_names import INPUT_IDS
from gircse.runtime.trt.engine_manifest import EngineManifest, read_engines, select_engine
from gircse.runtime.trt.library import MODULES
from gircse.serving.triton_server.model_config import ModelConfig, TensorConfig

TEXT_INPUTS = (
    TensorConfig("TEXT", "string", (1,)),
    TensorConfig("STEPS", "int32", (1,), optional=True),
    TensorConfig("INSTRUCTION", "string", (1,), optional=True),
)


class ModelKind(StrEnum):
    """What a model takes and runs: texts in the Python backend, or token ids in ONNX Runtime or TensorRT."""

    TEXT = "text"
    ONNX = "onnx"
    PLAN = "plan"


@dataclass(frozen=True)
class ModelOptions:
    """How models run.

    Attributes:
        name: of the text model; the others append their kind.
        provider: where they run; never ``auto``.
        precision: variant; None takes the one that suits the provider.
        layout: graph or engine of the text model; None takes the one that suits the provider.
        threads: of the CPU; None takes the physical cores.
        max_batch_size: most texts of a batch.
        verify: compare hashes: of graphs and engines now, of the bundle whenever the text model is loaded.
    """

    name: str
    provider: Provider
    precision: str | None
    layout: Layout | None
    threads: int | None
    max_batch_size: int
    verify: bool

    @property
    def on_gpu(self) -> bool:
        """Whether the instances are on the GPU."""
        return self.provider is not Provider.CPU


@dataclass(frozen=True)
class RepositoryModel:
    """A model to write.

    Attributes:
        config: its configuration.
        summary: what it is, in a few words.
        source: folder of the bundle that its version is; None for a version that holds ``model.py``.
        files: names of the files of that folder that it needs.
    """

    config: ModelConfig
    summary: str
    source: Path | None = None
    files: Sequence[str] = ()


def text_model(bundle: Bundle, options: ModelOptions, *, location: str) -> RepositoryModel:
    """Return the model that embeds texts with ``Embedder``.

    Args:
        bundle: an opened bundle.
        options: how to run it.
        location: path of the bundle, absolute or relative to the folder of the model.

    Raises:
        BundleError: the bundle does not have the precision or the layout.
        ProviderError: the provider does not run the precision.
    """
    parameters = {"bundle": location, "provider": options.provider, "verify": str(options.verify).lower()}
    precision, layout = options.precision, options.layout
    if options.provider not in MODULES:  # of engines, only the server can say which one fits
        precision = _graph_precision(bundle, options.provider, options.precision)
        layout = bundle.layout(precision, options.provider, options.layout)
        bundle.graph(precision, layout)
    if precision is not None:
        bundle.variant(precision)
        parameters["precision"] = precision
    if layout is not None:
        parameters["layout"] = layout
    if options.threads is not None:
        parameters["threads"] = str(options.threads)
    config = ModelConfig(
        name=options.name,
        platform=("backend", "python"),
        max_batch_size=options.max_batch_size,
        inputs=TEXT_INPUTS,
        outputs=[TensorConfig("EMBEDDING", "float32", (bundle.manifest.graph.hidden_size,))],
        on_gpu=options.on_gpu,
        parameters=parameters,
    )
    runs = " ".join(filter(None, (precision, layout)))
    return RepositoryModel(config, f"texts to vectors, {f'{runs} on' if runs else 'on'} {options.provider}")


def onnx_model(bundle: Bundle, options: ModelOptions) -> RepositoryModel:
    """Return the unrolled graph as a model of the ONNX Runtime backend.

    Raises:
        BundleError: the bundle has no unrolled graph of the precision, or a file of it has changed.
        ProviderError: the provider does not run the precision.
    """
    provider = Provider.CUDA if options.provider in MODULES else options.provider
    precision = _graph_precision(bundle, provider, options.precision)
    path = bundle.graph(precision, Layout.UNROLLED)
    if options.verify:
        bundle.verify(precision)
    variant = bundle.variant(precision)
    graph = variant.graphs[Layout.UNROLLED]
    config = ModelConfig(
        name=f"{options.name}_{ModelKind.ONNX}",
        platform=("platform", "onnxruntime_onnx"),
        max_batch_size=options.max_batch_size,
        inputs=_tensors(graph.inputs),
        outputs=_tensors(graph.outputs),
        on_gpu=options.on_gpu,
        parameters={} if options.threads is None else {"intra_op_thread_count": str(options.threads)},
    )
    files = [path.name, *(bundle.file(weights).name for weights in variant.weight_files)]
    return RepositoryModel(config, f"token ids to vectors, {precision}", path.parent, files)


def plan_model(bundle: Bundle, options: ModelOptions) -> RepositoryModel:
    """Return the unrolled engines as a model of the TensorRT backend, which takes the one of its GPU.

    Raises:
        OptionError: several engines are for the same GPU.
        ProviderError: there is no unrolled engine of TensorRT.
        BundleError: an engine was built from another export, or has changed.
    """
    engines = _engines(bundle, options)
    files: dict[str, str] = {}
    for engine in engines:
        for capability in engine.compute_capabilities:
            if capability in files:
                both = f"{files[capability]} and {engine.name}.plan"
                hint = "Delete one of them with its .json."
                raise OptionError(
                    "the bundle", f"has two engines for compute capability {capability}: {both}", hint=hint
                )
            _, path = select_engine(
                bundle,
                provider=Provider.TENSORRT,
                version=engine.version,
                capability=capability,
                precisions=(engine.precision,),
                layout=Layout.UNROLLED,
                verify=options.verify,
            )
            files[capability] = path.name
    profile, most = _largest_profile(engines)
    graph = bundle.variant(engines[0].precision).graphs[Layout.UNROLLED]
    config = ModelConfig(
        name=f"{options.name}_{ModelKind.PLAN}",
        platform=("platform", "tensorrt_plan"),
        max_batch_size=min(options.max_batch_size, most),
        inputs=_tensors(graph.inputs),
        outputs=_tensors(graph.outputs),
        on_gpu=True,
        profile=profile,
        files=files,
    )
    summary = f"token ids to vectors, {engines[0].precision}, TensorRT {engines[0].version}"
    return RepositoryModel(config, summary, path.parent, list(dict.fromkeys(files.values())))


def _engines(bundle: Bundle, options: ModelOptions) -> list[EngineManifest]:
    """Return the unrolled engines of the precision that is wanted, or else of the best that there is."""
    unrolled = [
        engine
        for engine, _ in read_engines(bundle)
        if engine.layout is Layout.UNROLLED and engine.provider is Provider.TENSORRT
    ]
    for precision in (options.precision,) if options.precision else GPU_ORDER:
        if found := [engine for engine in unrolled if engine.precision == precision]:
            return found
    wanted = f" of {options.precision}" if options.precision else ""
    raise ProviderError(
        str(bundle.directory),
        f"has no unrolled engine{wanted} for Triton's TensorRT backend",
        "it takes those of the provider tensorrt",
        f"Build one: gircse-build {bundle.directory} --provider tensorrt --layout unrolled",
    )


def _largest_profile(engines: Sequence[EngineManifest]) -> tuple[int, int]:
    """Return the index of the profile of the largest batches, and how large they are in every engine.

    Triton would choose among several profiles, but each of them has to take ``max_batch_size``.

    Raises:
        OptionError: it is not the same profile in every engine.
    """
    sizes = [[profile.shapes[INPUT_IDS].max[0] for profile in engine.profiles] for engine in engines]
    indices = {batches.index(max(batches)) for batches in sizes}
    if len(indices) > 1:
        names = ", ".join(engine.name for engine in engines)
        raise OptionError(
            f"the engines {names}", "have different profiles", None, "Build them with the same --profiles."
        )
    return indices.pop(), min(map(max, sizes))


def _graph_precision(bundle: Bundle, provider: Provider, wanted: str | None) -> str:
    """Return the variant whose graph runs: that of ``Embedder``."""
    precision = wanted or bundle.default_precision(CPU_ORDER if provider is Provider.CPU else GPU_ORDER)
    bundle.variant(precision)
    if not runs_on(precision, provider):
        raise ProviderError(
            f"provider {provider}", f"does not run {precision}", None, "Choose another precision or provider."
        )
    return precision


def _tensors(specs: Sequence[TensorSpec]) -> list[TensorConfig]:
    """Return a graph's inputs or outputs without the batch, which Triton adds itself."""
    return [
        TensorConfig(spec.name, spec.dtype, tuple(size if isinstance(size, int) else -1 for size in spec.shape[1:]))
        for spec in specs
    ]
