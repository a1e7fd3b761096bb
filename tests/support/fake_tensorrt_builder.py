"""A simulated ``tensorrt`` module, as far as a build needs it: 10.15 or later, 11."""

from enum import Enum, IntEnum
from types import SimpleNamespace
from typing import Any

import onnx


class DTypeFlag(IntEnum):
    EXPLICIT_BATCH = 0
    STRONGLY_TYPED = 1


class NoFlag(IntEnum):
    """What TensorRT 11 may leave of the flags."""

    EXPLICIT_BATCH = 0


class IAttentionInputLayer:
    pass


class FakeProfile:
    def __init__(self, module: "FakeBuilderModule") -> None:
        self.module = module
        self.shapes: dict[str, tuple[Any, ...]] = {}

    def set_shape(self, name: str, low: Any, expected: Any, high: Any) -> None:
        if self.module.shape_error:
            raise self.module.shape_error
        self.shapes[name] = (low, expected, high)


class FakeConfig:
    """``IBuilderConfig``; takes timings of this GPU only, and knows no compute capabilities."""

    __slots__ = ("builder_optimization_level", "cache", "flags", "limits", "module", "profiles", "progress_monitor")

    def __init__(self, module: "FakeBuilderModule") -> None:
        self.module = module
        self.builder_optimization_level = 3
        self.flags = {"TF32"}  # which is on by default
        self.cache: Any = None
        self.limits: dict[str, int] = {}
        self.profiles: list[FakeProfile] = []
        self.progress_monitor: Any = None

    def set_flag(self, flag: str) -> None:
        self.flags.add(flag)

    def clear_flag(self, flag: str) -> None:
        self.flags.discard(flag)

    def set_memory_pool_limit(self, pool: str, size: int) -> None:
        self.limits[pool] = size

    def add_optimization_profile(self, profile: FakeProfile) -> int:
        if "add_optimization_profile" in self.module.refuse:
            return -1
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def create_timing_cache(self, content: bytes) -> bytes:
        self.module.read_caches.append(content)
        return content

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        assert ignore_mismatch is False
        if "set_timing_cache" in self.module.refuse or not (cache == b"" or cache.startswith(b"8.9")):
            return False
        self.cache = cache
        return True

    def get_timing_cache(self) -> Any:
        return SimpleNamespace(serialize=lambda: (self.cache or b"8.9") + b" timed")


class FakeBuilderModule:
    """The module ``tensorrt`` as far as a build needs it.

    Attributes:
        refuse: names of the calls that fail.
        messages: what it logs as errors when a build fails.
        flags: the network flags, one after the other.
        configs: every configuration.
        read_caches: content of every timing cache that was made.
    """

    class ILogger:
        def __init__(self) -> None:
            self.ready = True

    class IProgressMonitor:
        def __init__(self) -> None:
            self.ready = True

    BuilderFlag = SimpleNamespace(DISABLE_TIMING_CACHE="off", TF32="TF32", WEIGHT_STREAMING="streaming")
    MemoryPoolType = SimpleNamespace(WORKSPACE="workspace")
    NetworkDefinitionCreationFlag: Any = DTypeFlag
    LayerType: Any = SimpleNamespace(ATTENTION_INPUT="attention")
    IAttentionInputLayer = IAttentionInputLayer

    def __init__(self, version: str = "11.1.0") -> None:
        self.__version__ = version
        self.refuse: set[str] = set()
        self.messages: list[str] = []
        self.shape_error: Exception | None = None
        self.flags: list[int] = []
        self.configs: list[FakeConfig] = []
        self.read_caches: list[bytes] = []
        self.layers: list[Any] = []
        self.inputs: list[str] | None = None

    def Builder(self, logger: Any) -> Any:
        assert logger.ready

        def create_network(flags: int) -> Any:
            self.flags.append(flags)
            return SimpleNamespace(num_layers=0, num_inputs=0)

        def create_builder_config() -> FakeConfig:
            self.configs.append(FakeConfig(self))
            return self.configs[-1]

        def build_serialized_network(network: Any, config: FakeConfig) -> bytes | None:
            monitor = config.progress_monitor
            assert monitor.ready
            monitor.phase_start("build", None, 2)
            assert monitor.step_complete("build", 0)
            monitor.phase_finish("build")
            if "build_serialized_network" in self.refuse:
                for message in self.messages:
                    logger.log(Severity.ERROR, message)
                return None
            return b"engine of " + str(len(self.configs)).encode()

        return SimpleNamespace(
            create_network=create_network,
            create_builder_config=create_builder_config,
            create_optimization_profile=lambda: FakeProfile(self),
            build_serialized_network=build_serialized_network,
        )

    def OnnxParser(self, network: Any, logger: Any) -> Any:
        def parse_from_file(path: str) -> bool:
            names = self.inputs or [node.name for node in onnx.load(path, load_external_data=False).graph.input]
            network.num_layers, network.num_inputs = len(self.layers), len(names)
            network.get_input = lambda index: SimpleNamespace(name=names[index])
            network.get_layer = lambda index: self.layers[index]
            return "parse_from_file" not in self.refuse

        errors = [("Unique", "a/b", "no importer"), ("Det", "", "only float")]

        def get_error(index: int) -> Any:
            operator, name, text = errors[index]
            return SimpleNamespace(node_operator=lambda: operator, node_name=lambda: name, desc=lambda: text)

        return SimpleNamespace(parse_from_file=parse_from_file, num_errors=2, get_error=get_error)


class Severity(Enum):
    ERROR = 1


class Layer:
    def __init__(self, kind: str) -> None:
        self.type = kind
        self.attention = SimpleNamespace(decomposable=False)
