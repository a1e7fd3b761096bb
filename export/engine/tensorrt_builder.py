"""TensorRT's builder behind one class: ``tensorrt`` 10 and 11 and ``tensorrt_rtx``, every refusal an error."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gircse.export.engine.progress import progress_monitor
from gircse.runtime.atomic_file import atomic_write
from gircse.runtime.errors import ExportError, ProviderError
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
        except (RuntimeError, TypeError) as err:  # pybind11's way to say that CUDA could not be started
            raise ProviderError(
                f"{provider}: {self._logger.drain() or err} | a TensorRT that can start its builder | check nvidia-smi"
            ) from err
        # TensorRT 11 knows strongly typed networks only and may drop the flag.
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
        """Parse a graph, weights included; the parser names every operator that it refuses.

        Args:
            path: the graph; its weights are found beside it.
            graph: ONNX to parse in its place.
        """
        if self._parser.parse_from_file(str(path)) if graph is None else self._parser.parse(graph, str(path)):
            self._allow_decomposition()
            return
        refused = refused_operators(self._parser)
        raise ExportError(
            f"{path}: TensorRT refuses {'; '.join(refused)} | operators that {self._provider} {self._trt.__version__} "
            "takes | report this graph, and use ONNX Runtime (--provider cuda) until then"
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

    def configure(
        self, profiles: Sequence[EngineProfile], capabilities: Sequence[str], *, workspace_gib: float | None
    ) -> None:
        """Set profiles, targets and the most scratch memory of a kernel."""
        for index, profile in enumerate(profiles):
            self._add_profile(index, profile)
        if self._provider is Provider.TENSORRT_RTX:
            self._config.num_compute_capabilities = len(capabilities)
            for index, capability in enumerate(capabilities):
                target = getattr(self._trt.ComputeCapability, f"SM{capability.replace('.', '')}")
                self._check(self._config.set_compute_capability(target, index), f"--sm {capability}")
        if workspace_gib is not None:
            limit = int(workspace_gib * 2**30)
            self._config.set_memory_pool_limit(self._trt.MemoryPoolType.WORKSPACE, limit)
        self.settings = {
            "strongly_typed": True,
            "builder_optimization_level": int(self._config.builder_optimization_level),
            "workspace_gib": workspace_gib,
        }

    def _add_profile(self, index: int, profile: EngineProfile) -> None:
        made = self._builder.create_optimization_profile()
        inputs = {self._network.get_input(i).name for i in range(self._network.num_inputs)}
        if inputs != set(profile.shapes):
            raise ExportError(
                f"profile {profile.name}: shapes for {sorted(profile.shapes)} | the inputs {sorted(inputs)} | "
                "the graph is not one of this version: export again"
            )
        for name, shape in profile.shapes.items():
            try:
                made.set_shape(name, shape.min, shape.opt, shape.max)
            except (RuntimeError, TypeError, ValueError) as err:  # which of them depends on the TensorRT
                raise ExportError(
                    f"profile {profile.name}, {name}: {str(err).splitlines()[0]} | {shape} | check --batch and --tokens"
                ) from err
        self._check(self._config.add_optimization_profile(made) == index, f"profile {profile.name} ({profile.stage})")

    def use_timing_cache(self, path: Path | None) -> None:
        """Start from the timings of earlier builds; None switches the cache off."""
        self.settings["timing_cache"] = path is not None
        self._timing_path = path
        if path is None:
            self._config.set_flag(self._trt.BuilderFlag.DISABLE_TIMING_CACHE)
            return
        if not path.parent.is_dir():
            raise ExportError(f"--timing-cache {path}: no such folder | a file in an existing one | make {path.parent}")
        cache = self._config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
        if not self._config.set_timing_cache(cache, False):
            logger.warning("%s: timings of another GPU or TensorRT, not used; they will be replaced", path)
            cache = self._config.create_timing_cache(b"")
            self._check(self._config.set_timing_cache(cache, False), "a new timing cache")

    def _check(self, succeeded: Any, what: str) -> None:
        """TensorRT's setters report a refusal by their result, not by an exception."""
        if not succeeded:
            raise ExportError(
                f"{what}: {self._logger.drain() or 'refused by TensorRT'} | a setting that it takes | change or leave it out"
            )

    def build(self, advance: Callable[[float], None]) -> memoryview:
        """Build the engine and return its bytes; ``advance`` is told the growth of the share done, of 1."""
        self._config.progress_monitor = progress_monitor(self._trt, advance)
        serialized = self._builder.build_serialized_network(self._network, self._config)
        if serialized is None:
            raise ExportError(
                f"{self._provider} {self._trt.__version__}: the build failed: {self._logger.drain() or 'no reason given'} | "
                "an engine | --workspace-gib, --batch and --tokens change what it needs"
            )
        if self._timing_path is not None:
            with atomic_write(self._timing_path) as file:
                file.write(memoryview(self._config.get_timing_cache().serialize()))
        return memoryview(serialized)


def refused_operators(parser: Any) -> list[str]:
    """Return every operator that a parser refused: its type, the node's name and the reason."""
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    return [f"{error.node_operator()} ({error.node_name()}): {error.desc()}" for error in errors] or ["the file"]
