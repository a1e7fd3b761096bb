"""ONNX Runtime sessions for both layouts. Safe to call from several threads: a run keeps all its state local."""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gircse.runtime import tensor_names
from gircse.runtime.bundle import Bundle
from gircse.runtime.device_rows import DeviceTensor, RowExpander
from gircse.runtime.errors import BundleError, OptionError, ProviderError
from gircse.runtime.integer_products import integer_option
from gircse.runtime.manifest import GraphFacts, Layout
from gircse.runtime.node_placement import RECORD_PLACEMENT, warn_of_fallback
from gircse.runtime.numerics import Int64
from gircse.runtime.ort_package import EXECUTION_PROVIDERS, check_release, import_onnxruntime
from gircse.runtime.precision import CPU_ORDER, multiplies_integers
from gircse.runtime.prefix_cache import KeysAndValues
from gircse.runtime.provider import Provider
from gircse.runtime.session import Session, StepOutputs, step_outputs

_OPTIONS = {"CUDAExecutionProvider": {"use_tf32": "0"}}
"""By default the CUDA provider computes FP32 products in TF32, whose vectors are not those of FP32."""

_FOLD_ANY_SIZE = ("optimization.constant_folding_max_output_size_in_bytes", str(1 << 40))
"""By default a weight above 1 GiB in FP32, the vocabulary of a 7B, is converted in every pass and not once."""

_WEIGHT_COPIES = ["ConstantFolding", "FuseFp16InitializerToFp32NodeTransformer", "CommonSubexpressionElimination"]
"""Optimizers that put FP32 copies of FP16 weights into a graph, or convert one for several uses."""

_LIBRARIES = {Provider.CUDA: "CUDA and cuDNN", Provider.ORT_TENSORRT: "CUDA, cuDNN and TensorRT"}

_ONNX_TYPES = {"tensor(float)": 1, "tensor(float16)": 10, "tensor(bfloat16)": 16}
"""Numbers of the types that a KV cache can have; numpy knows no bfloat16."""


class UnrolledSession:
    """One graph with all K steps; a run costs K steps whatever ``steps`` asks for."""

    def __init__(self, graph: Any) -> None:
        """Take an ``onnxruntime.InferenceSession`` of the unrolled graph."""
        self._graph = graph
        self._outputs = [output.name for output in graph.get_outputs() if output.name != tensor_names.EMBEDDING]

    def run(self, input_ids: Int64, attention_mask: Int64, *, steps: int) -> StepOutputs:
        """Embed one batch; (batch, tokens) int64 each."""
        graph = _still_open(self._graph)
        with run_errors(input_ids):
            values = graph.run(
                self._outputs, {tensor_names.INPUT_IDS: input_ids, tensor_names.ATTENTION_MASK: attention_mask}
            )
        outputs = dict(zip(self._outputs, values, strict=True))
        prompt = outputs[tensor_names.PROMPT_EMBEDDING]
        nothing = np.empty((len(prompt), 0, prompt.shape[1]), np.float32)
        return StepOutputs(prompt, outputs.get(tensor_names.STEP_EMBEDDINGS, nothing)[:, :steps])

    def max_batch(self, tokens: int) -> int | None:
        """Return None: any batch that fits in memory."""
        return None

    def close(self) -> None:
        """Release the graph and its weights."""
        self._graph = None


class StepwiseSession:
    """One graph, run once for the prompt and once per step; a run costs only the steps that it is asked for.

    Attributes:
        takes_prefixes: on the CPU, and with an expander.
        on_gpu: whether it runs on one.
    """

    def __init__(
        self, graph: Any, facts: GraphFacts, *, device: str = "cpu", expander: RowExpander | None = None
    ) -> None:
        """Take an ``onnxruntime.InferenceSession`` of the stepwise graph.

        Args:
            graph: the session.
            facts: what it computes.
            device: ONNX Runtime's name of its device.
            expander: spreads prefixes on a GPU.
        """
        self.on_gpu = device != "cpu"
        self.takes_prefixes, self._expander = expander is not None or not self.on_gpu, expander
        self._graph, self._facts, self._device = graph, facts, device
        self._past = tensor_names.cache_names("past", facts.num_layers)
        self._present = tensor_names.cache_names("present", facts.num_layers)
        self._cache_type = next(_ONNX_TYPES[spec.type] for spec in graph.get_inputs() if spec.name == self._past[0])

    def run(self, input_ids: Int64, attention_mask: Int64, *, steps: int) -> StepOutputs:
        """Embed one batch; (batch, tokens) int64 each. State and KV cache stay on the device from step to step."""
        return self.run_after((), input_ids, attention_mask, steps=steps)

    def run_after(self, prefix: KeysAndValues, input_ids: Int64, attention_mask: Int64, *, steps: int) -> StepOutputs:
        """Embed one batch of prompts that begin with what ``compute_prefix`` was given; the arrays hold the rest."""
        states = np.empty((len(input_ids), steps + 1, self._facts.hidden_size), np.float32)
        for k, (hidden,) in enumerate(self.passes(input_ids, attention_mask, steps=steps, prefix=prefix)):
            states[:, k] = hidden[:, 0]
        return step_outputs(states, self._facts.pooling)

    def compute_prefix(self, token_ids: Sequence[int]) -> KeysAndValues:
        """Return keys and values (1, tokens, kv) of the beginning of a prompt, where the graph computes them."""
        graph, ids = _still_open(self._graph), np.array([token_ids], np.int64)
        arrays, kept = self._no_past(ids)
        arrays[tensor_names.ATTENTION_MASK] = np.ones_like(ids)
        with run_errors(ids):
            values = self._run_once(graph, arrays, kept, self._present)
        return tuple(map(DeviceTensor.of, values) if self.on_gpu else values)

    def passes(
        self,
        input_ids: Int64,
        attention_mask: Int64,
        *,
        steps: int,
        prefix: KeysAndValues = (),
        inputs_of: Callable[[int], Mapping[str, Any]] = lambda _: {},
        outputs_of: Callable[[int], Sequence[str]] = lambda _: (),
    ) -> Iterator[list[Any]]:
        """Run the graph on the prompts of one batch, then once a step.

        Args:
            input_ids: (batch, tokens) int64.
            attention_mask: the same.
            steps: how often to run it after the prompt.
            prefix: keys and values (1, prefix tokens, kv) of what every prompt begins with, before its padding.
            inputs_of: further inputs of an edited graph, by step, 0 being the prompt.
            outputs_of: further outputs of an edited graph, by step.

        Yields:
            h_k (batch, 1, hidden) float32, and the further outputs as arrays.
        """
        graph = _still_open(self._graph)  # kept for all passes, should another thread close the session meanwhile
        arrays, kept = self._no_past(input_ids)
        if prefix:
            repeat = self._expander or functools.partial(np.repeat, axis=0)
            with run_errors(input_ids):
                kept = {name: repeat(value, len(input_ids)) for name, value in zip(self._past, prefix, strict=True)}
        before = prefix[0].shape[1] if prefix else 0
        mask = np.pad(attention_mask, ((0, 0), (before, steps)), constant_values=1)
        tokens = before + input_ids.shape[1]
        for k in range(steps + 1):
            arrays[tensor_names.ATTENTION_MASK] = np.ascontiguousarray(mask[:, : tokens + k])
            read = [tensor_names.NEXT_HIDDEN, *outputs_of(k)]
            names = [*read, *(self._present if k < steps else ())]
            with run_errors(input_ids):
                values = self._run_once(graph, {**arrays, **inputs_of(k)}, kept, names)
            yield [value if isinstance(value, np.ndarray) else value.numpy() for value in values[: len(read)]]
            arrays = {tensor_names.INPUT_IDS: input_ids[:, :0]}
            cache = zip(self._past, values[len(read) :], strict=False)  # none at the end
            kept = {tensor_names.HIDDEN: values[0], **dict(cache)}

    def _no_past(self, input_ids: Int64) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the inputs of a pass over whole prompts but for the mask: arrays, and an empty cache."""
        from onnxruntime import OrtValue

        arrays: dict[str, Any] = {tensor_names.INPUT_IDS: input_ids}
        if self._facts.steps:
            arrays[tensor_names.HIDDEN] = np.empty((len(input_ids), 0, self._facts.hidden_size), np.float32)
        no_past = OrtValue.ortvalue_from_shape_and_type((len(input_ids), 0, self._facts.kv_size), self._cache_type)
        return arrays, dict.fromkeys(self._past, no_past)

    def max_batch(self, tokens: int) -> int | None:
        """Return None: any batch that fits in memory."""
        return None

    def close(self) -> None:
        """Release the graph and its weights."""
        self._graph = None

    def _run_once(self, graph: Any, arrays: dict[str, Any], kept: dict[str, Any], names: Sequence[str]) -> Any:
        run = self._run_on_device if self.on_gpu else self._run_on_cpu
        return run(graph, arrays, kept, names)

    def _run_on_cpu(self, graph: Any, arrays: dict[str, Any], kept: dict[str, Any], names: Sequence[str]) -> Any:
        """Run the graph on arrays and values of an earlier run; the outputs are arrays, and nothing is copied.

        A binding would do the same with one call for each of the many cache tensors: 1 to 2 ms more per embedding.
        """
        return graph.run(names, {**arrays, **kept})

    def _run_on_device(self, graph: Any, arrays: dict[str, Any], kept: dict[str, Any], names: Sequence[str]) -> Any:
        """Run the graph on arrays of the host and values of an earlier run; the outputs stay on the device."""
        binding = graph.io_binding()
        for name, array in arrays.items():
            binding.bind_cpu_input(name, array)
        for name, value in kept.items():
            binding.bind_ortvalue_input(name, value)
        for name in names:
            binding.bind_output(name, self._device)
        graph.run_with_iobinding(binding)
        return binding.get_outputs()


@contextlib.contextmanager
def run_errors(input_ids: Int64) -> Iterator[None]:
    """Turn what ONNX Runtime raises in a run, above all for want of memory, into an error of ours.

    Args:
        input_ids: (batch, tokens) int64 of the prompts, for the message.

    Raises:
        ProviderError: the run failed.
    """
    try:
        yield
    except Exception as err:  # onnxruntime raises its own exceptions, which share only Exception
        batch, tokens = input_ids.shape
        raise ProviderError(
            "ONNX Runtime",
            f"failed in a batch of {batch} texts of {tokens} tokens: {_first_line(str(err))}",
            None,
            "If memory ran out, use smaller batches (batch_size, batch_tokens).",
        ) from err


def _still_open(graph: Any) -> Any:
    if graph is None:
        raise OptionError("session", "is closed", None, "Open the bundle again.")
    return graph


def open_session(
    bundle: Bundle,
    precision: str,
    *,
    layout: Layout | None = None,
    provider: Provider = Provider.CPU,
    threads: int | None = None,
    content: bytes | None = None,
    copy_weights: bool = True,
) -> Session:
    """Load the graph of one precision.

    Args:
        bundle: an opened bundle.
        precision: name of one of its variants.
        layout: which of its graphs; None is the one that suits the provider.
        provider: one of ONNX Runtime's.
        threads: threads of one run; None lets ONNX Runtime take the physical cores.
        content: an edited graph to load in place of the file's own content.
        copy_weights: see ``load_graph``.

    Raises:
        ProviderError: onnxruntime is not installed, cannot use the provider, or is of a release that runs the precision
            wrong.
        BundleError: the variant has no such layout, or its graph does not load or belongs to another bundle.
    """
    facts = bundle.manifest.graph
    layout = bundle.layout(precision, provider, layout)
    path = bundle.graph(precision, layout)
    if provider is Provider.CPU:
        check_release(import_onnxruntime(provider), precision)
    graph = load_graph(
        path,
        provider=provider,
        threads=threads,
        content=content,
        copy_weights=copy_weights,
        integer_products=multiplies_integers(precision),
    )
    found = graph.get_modelmeta().custom_metadata_map.get(tensor_names.GRAPH_IDENTITY_KEY)
    if found != facts.identity:
        raise BundleError(
            str(path),
            f"belongs to another bundle: it computes {found}",
            f"the manifest describes {facts.identity}",
            "Export the bundle again.",
        )
    if layout is Layout.UNROLLED:
        return UnrolledSession(graph)
    device, expander = ort_device(provider), None
    if provider is Provider.CUDA:
        expander = RowExpander(functools.partial(load_graph, path, provider=provider), device)
    return StepwiseSession(graph, facts, device=device, expander=expander)


def ort_device(provider: Provider) -> str:
    """Return ONNX Runtime's name of the device that a provider computes on."""
    return "cpu" if provider is Provider.CPU else "cuda"


def load_graph(
    path: Path,
    *,
    provider: Provider = Provider.CPU,
    threads: int | None = None,
    content: bytes | None = None,
    copy_weights: bool = True,
    integer_products: bool = False,
) -> Any:
    """Load one graph of a bundle as an ``onnxruntime.InferenceSession``; warn of nodes that a GPU leaves to the CPU.

    Args:
        path: the graph's file, beside its weights.
        provider: one of ONNX Runtime's.
        threads: threads of one run; None lets ONNX Runtime take the physical cores.
        content: an edited graph to load in place of the file's own content.
        copy_weights: let the CPU keep copies of the weights, packed for its products, and FP16 and BF16 ones in FP32.
            Without, the file stays mapped and each weight is converted where it is used: a fraction of the memory, and
            slower. A converted weight is held from its first use to its last, so ``content`` has to have an initializer
            or a Cast for each.
        integer_products: the graph multiplies 8-bit integers, which has to be exact on every CPU.

    Raises:
        ProviderError: onnxruntime is not installed, or cannot use the provider.
        BundleError: the graph does not load.
    """
    ort = import_onnxruntime(provider)
    wanted = EXECUTION_PROVIDERS[provider]
    options = ort.SessionOptions()
    if provider is not Provider.CPU:
        # CUDA and cuDNN from pip lie where the loader does not look. What it misses it prints, which is not for stdout.
        with contextlib.redirect_stdout(sys.stderr):
            ort.preload_dlls()
        options.add_session_config_entry(*RECORD_PLACEMENT)
    # The planner that reuses activation buffers is quadratic in nodes (minutes for an unrolled graph); the arena
    # recycles the buffers anyway, so without it load is linear at the same speed and the same memory.
    options.enable_mem_reuse = False
    options.add_session_config_entry(*_FOLD_ANY_SIZE)
    if option := integer_option(ort, provider, integer_products=integer_products):
        options.add_session_config_entry(*option)
    if threads is not None:
        options.intra_op_num_threads = threads
    if content is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    if not copy_weights:
        options.add_session_config_entry("session.disable_prepacking", "1")
        # What a converted weight took is free again after its product, not kept for the next run; and none is converted
        # before its turn, as all are in the default order.
        options.enable_cpu_mem_arena = options.enable_mem_pattern = False
        options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    providers = [(name, _OPTIONS.get(name, {})) for name in wanted]
    disabled = {} if copy_weights else {"disabled_optimizers": _WEIGHT_COPIES}
    try:
        session = ort.InferenceSession(content or str(path), options, providers=providers, **disabled)
    except Exception as err:  # onnxruntime raises its own exceptions, which share only Exception
        reason = _first_line(str(err))
        if "NOT_IMPLEMENTED" in reason:
            raise ProviderError(
                f"provider {provider}",
                f"cannot run {path}: {reason}",
                f"the CPU has kernels for {', '.join(CPU_ORDER)}",
                "Choose another precision or provider.",
            ) from err
        raise BundleError(str(path), f"cannot be loaded by ONNX Runtime: {reason}", None, "Export again.") from err
    started = session.get_providers()[0]
    if started != wanted[0]:  # ONNX Runtime only warns and continues with what is left
        raise ProviderError(
            f"provider {provider}",
            f"did not start: ONNX Runtime could not start {wanted[0]} and fell back to {started}",
            f"onnxruntime {ort.__version__} needs a GPU with its driver and {_LIBRARIES[provider]}",
            "Fix the installation, or choose another provider.",
        )
    if provider is not Provider.CPU:
        warn_of_fallback(session, str(path))
    return session


def _first_line(text: str) -> str:
    lines: Iterable[str] = (line.strip() for line in text.splitlines())
    return next((line for line in lines if line), "unknown error")
