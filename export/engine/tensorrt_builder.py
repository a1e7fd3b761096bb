"""TensorRT's builder as one class, for ``tensorrt`` 10 and 11 and ``tensorrt_rtx``."""

import logging
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from gircse.export.engine.progress import progress_monitor
from gircse.runtime import tensor_names
from gircse.runtime.atomic_file import atomic_write
from gircse.runtime.errors import ExportError, OptionError, ProviderError
from gircse.runtime.provider import Provider
from gircse.runtime.trt.engine_manifest import EngineProfile
from gircse.runtime.trt.library import tensorrt_logger

logger = logging.getLogger(__name__)


class TensorRtBuilder:
    """TensorRT's builder, network and configuration, with every refusal turned into an error."""

    def __init__(self, module: Any, provider: Provider) -> None:
        """Take the Python module of a TensorRT."""
        self._trt, self._provider = module, provider
        self.settings: dict[str, str | int | float | bool | None] = {}
        self._logger = tensorrt_logger(module)
        try:
            self._builder = module.Builder(self._logger)
        except (RuntimeError, TypeError) as err:  # what pybind11 raises where CUDA cannot be started
            reason = self._logger.drain() or err
            raise ProviderError(
                str(provider), f"cannot start its builder: {reason}", None, "Check nvidia-smi."
            ) from err
        # TensorRT 11 has only strongly typed networks and may drop the flag.
        flag = getattr(module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        self._network = self._builder.create_network(0 if flag is None else 1 << int(flag))
        self._parser = module.OnnxParser(self._network, self._logger)
        self._config = self._builder.create_builder_config()
        self._config.clear_flag(module.BuilderFlag.TF32)  # FP32 means FP32, as in the reference
        self._timing_path: Path | None = None

    @property
    def num_layers(self) -> int:
        """Layers of the parsed network."""
        return int(self._network.num_layers)

    def parse(self, path: Path, graph: bytes | None = None) -> None:
        """Parse a graph, weights included.

        Args:
            path: the graph; its weights lie next to it.
            graph: ONNX to parse in its place.

        Raises:
            ExportError: the parser refuses operators; every one is named.
        """
        if self._parser.parse_from_file(str(path)) if graph is None else self._parser.parse(graph, str(path)):
            self._allow_decomposition()
            return
        raise ExportError(
            str(path),
            f"is refused by {self._provider} {self._trt.__version__}: {', '.join(refused_operators(self._parser))}",
            None,
            "Report this graph, and use ONNX Runtime (--provider cuda) until then.",
        )

    def _allow_decomposition(self) -> None:
        """Let attention without a fused kernel (all of FP32) be built from smaller ones instead of failing."""
        kind = getattr(self._trt.LayerType, "ATTENTION_INPUT", None)
        if kind is None:
            return
        for index in range(self._network.num_layers):
            layer = self._network.get_layer(index)
            if layer.type == kind:
                layer.__class__ = self._trt.IAttentionInputLayer  # the Python API's way to narrow a layer
                layer.attention.decomposable = True

    def show_values(self, names: Sequence[str]) -> None:
        """Make inner values outputs in FP32, each with an input that replaces it where it is read.

        The names and types of these inputs are those of ``tensor_names``. It is the edit that ``gircse-parity`` makes
        to a graph for ONNX Runtime, made to the network.

        Args:
            names: of values of the graph, (batch, positions, hidden) each.

        Raises:
            ExportError: the network lacks a value, or TensorRT refuses the edit.
        """
        network, types = self._network, self._trt.DataType
        layers = [network.get_layer(index) for index in range(network.num_layers)]
        values, readers = self._values_and_readers(layers, set(names))
        if missing := [name for name in names if name not in values]:
            raise ExportError(
                "the graph",
                f"has no value {missing[0]}",
                "--layer-outputs finds the layers by the names of their values",
                "Export the bundle again with this version.",
            )
        force = network.add_input(tensor_names.FORCE, types.BOOL, (1, 1, 1))
        for name in names:
            computed = shown = values[name]
            forced = network.add_input(name + tensor_names.FORCED, types.FLOAT, computed.shape)
            if computed.dtype != types.FLOAT:
                computed.name = f"{name}.low"
                forced = self._output_of(network.add_cast(forced, computed.dtype), name)
                shown = self._output_of(network.add_cast(computed, types.FLOAT), name)
                shown.name = name
            chosen = self._output_of(network.add_select(force, forced, computed), name)
            for layer, index in readers[name]:
                layer.set_input(index, chosen)
            network.mark_output(shown)

    @staticmethod
    def _values_and_readers(
        layers: Sequence[Any], names: Collection[str]
    ) -> tuple[dict[str, Any], dict[str, list[tuple[Any, int]]]]:
        """Return the tensors of some names, and who reads them: layers, and which of their inputs."""
        values: dict[str, Any] = {}
        readers: dict[str, list[tuple[Any, int]]] = {name: [] for name in names}
        for layer in layers:
            outputs = (layer.get_output(index) for index in range(layer.num_outputs))
            values |= {tensor.name: tensor for tensor in outputs if tensor.name in names}
            for index in range(layer.num_inputs):
                tensor = layer.get_input(index)  # None: an optional one that is not there
                if tensor is not None and tensor.name in names:
                    readers[tensor.name].append((layer, index))
        return values, readers

    def _output_of(self, layer: Any, name: str) -> Any:
        self._check(layer is not None, f"the switch of {name}")
        return layer.get_output(0)

    def configure(
        self,
        profiles: Sequence[EngineProfile],
        capabilities: Sequence[str],
        *,
        workspace_gib: float | None,
        weight_streaming: bool,
    ) -> None:
        """Set profiles, targets, the maximum workspace of a kernel, and whether weights can stay in main memory.

        Raises:
            ExportError: TensorRT refuses one of them.
            OptionError: this TensorRT cannot stream weights.
        """
        for index, profile in enumerate(profiles):
            self._add_profile(index, profile)
        if self._provider is Provider.TENSORRT_RTX:
            self._config.num_compute_capabilities = len(capabilities)
            for index, capability in enumerate(capabilities):
                target = getattr(self._trt.ComputeCapability, f"SM{capability.replace('.', '')}")
                self._check(self._config.set_compute_capability(target, index), f"--sm {capability}")
        if workspace_gib is not None:
            self._config.set_memory_pool_limit(self._trt.MemoryPoolType.WORKSPACE, int(workspace_gib * 2**30))
        if weight_streaming:
            flag = getattr(self._trt.BuilderFlag, "WEIGHT_STREAMING", None)
            if flag is None:
                raise OptionError("--weight-streaming", f"is unknown to {self._provider} {self._trt.__version__}")
            self._config.set_flag(flag)
        self.settings = {
            "strongly_typed": True,
            "weight_streaming": weight_streaming,
            "builder_optimization_level": int(self._config.builder_optimization_level),
        }

    def _add_profile(self, index: int, profile: EngineProfile) -> None:
        made = self._builder.create_optimization_profile()
        inputs = {self._network.get_input(i).name for i in range(self._network.num_inputs)}
        if inputs != set(profile.shapes):
            raise ExportError(
                "the graph",
                f"has the inputs {sorted(inputs)}",
                f"this gircse-deploy builds from {sorted(profile.shapes)}",
                "Export the bundle again.",
            )
        for name, shape in profile.shapes.items():
            try:
                made.set_shape(name, shape.min, shape.opt, shape.max)
            except (RuntimeError, TypeError, ValueError) as err:  # which of them depends on the TensorRT
                raise ExportError(
                    f"profile {profile.name}",
                    f"is refused for {name}: {str(err).splitlines()[0]}",
                    f"its shapes are {shape.min}, {shape.opt} and {shape.max}",
                    "Check --batch and --tokens.",
                ) from err
        self._check(self._config.add_optimization_profile(made) == index, f"profile {profile.name} ({profile.stage})")

    def use_timing_cache(self, path: Path | None) -> None:
        """Start from the timings of earlier builds; None turns the cache off.

        Raises:
            OptionError: it is not a file in an existing folder.
        """
        self.settings["timing_cache"] = path is not None
        self._timing_path = path
        if path is None:
            self._config.set_flag(self._trt.BuilderFlag.DISABLE_TIMING_CACHE)
            return
        if path.is_dir():
            raise OptionError(f"--timing-cache {path}", "is a folder", "it has to be a file")
        if not path.parent.is_dir():
            raise OptionError(f"--timing-cache {path}", f"is in {path.parent}, which is not a folder")
        cache = self._config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
        if not self._config.set_timing_cache(cache, False):
            logger.warning(
                "%s has the timings of another GPU or TensorRT; they are not used and will be replaced", path
            )
            cache = self._config.create_timing_cache(b"")
            self._check(self._config.set_timing_cache(cache, False), "a new timing cache")

    def _check(self, succeeded: Any, what: str) -> None:
        """Raise an error where a setter of TensorRT, which raises none, has returned that it failed."""
        if not succeeded:
            raise ExportError(what, f"is refused by TensorRT: {self._logger.drain() or 'it gives no reason'}")

    def build(self, advance: Callable[[float], None]) -> memoryview:
        """Build the engine and return its bytes.

        Args:
            advance: called with the fraction of 1 just done.

        Raises:
            ExportError: the build failed.
        """
        self._config.progress_monitor = progress_monitor(self._trt, advance)
        serialized = self._builder.build_serialized_network(self._network, self._config)
        if serialized is None:
            raise ExportError(
                f"{self._provider} {self._trt.__version__}",
                f"cannot build the engine: {self._logger.drain() or 'it gives no reason'}",
                None,
                "Change what the build needs with --workspace-gib, --batch and --tokens.",
            )
        if self._timing_path is not None:
            with atomic_write(self._timing_path) as file:
                file.write(memoryview(self._config.get_timing_cache().serialize()))
        return memoryview(serialized)


def refused_operators(parser: Any) -> list[str]:
    """Return every operator that a parser refused: its type, the node's name and the reason."""
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    return [f"{error.node_operator()} ({error.node_name()}): {error.desc()}" for error in errors] or [
        "it is not an ONNX file"
    ]
