"""The module ``onnxruntime`` with any execution providers, all of which are the CPU."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import onnxruntime as real_onnxruntime

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"


class StubOnnxRuntime(ModuleType):
    """The module ``onnxruntime`` with any providers; what it runs, it runs on the CPU.

    Attributes:
        sessions: every session that was opened.
        asked: the providers that each was asked for, with their options.
        preloaded: how often CUDA's libraries were preloaded.
        falls_back: sessions go on with the CPU alone, as ONNX Runtime does where a GPU fails.
        left_to_cpu: operators for which the first provider has no kernel.
    """

    OrtValue = real_onnxruntime.OrtValue
    SessionOptions = real_onnxruntime.SessionOptions
    __version__ = "1.99"

    def __init__(self, *available: str, falls_back: bool = False) -> None:
        super().__init__("onnxruntime")
        self.available, self.falls_back = list(available), falls_back
        self.preloaded = 0
        self.left_to_cpu: set[str] = set()
        self.sessions: list[StubSession] = []
        self.asked: list[list[tuple[str, dict[str, str]]]] = []

    def get_available_providers(self) -> list[str]:
        return self.available

    def preload_dlls(self) -> None:
        self.preloaded += 1
        sys.stdout.write("Failed to load libcublas.so.13\n")

    def InferenceSession(
        self, path: str | bytes, options: Any, *, providers: list[tuple[str, dict[str, str]]]
    ) -> "StubSession":
        self.asked.append(providers)
        names = [name for name, _ in providers]
        self.sessions.append(StubSession(path, options, [CPU] if self.falls_back else names, self.left_to_cpu))
        return self.sessions[-1]


class StubSession:
    """A session that says it runs on a GPU and records what is bound to it."""

    def __init__(self, path: str | bytes, options: Any, providers: list[str], left_to_cpu: set[str]) -> None:
        self._left_to_cpu = left_to_cpu
        self.path, self.providers = path if isinstance(path, bytes) else Path(path), providers
        # A GPU runs BF16; the CPU that stands for it does not.
        runnable = path.replace("/bf16/", "/fp32/") if isinstance(path, str) and providers != [CPU] else path
        self._session = real_onnxruntime.InferenceSession(runnable, options, providers=[CPU])
        self.bindings: list[StubBinding] = []

    def get_providers(self) -> list[str]:
        return self.providers

    def get_provider_graph_assignment_info(self) -> list[Any]:
        """Return what the real session recorded, as if only the operators left to it ran on the CPU."""
        return [
            SimpleNamespace(
                ep_name=CPU if node.op_type in self._left_to_cpu else self.providers[0],
                get_nodes=lambda node=node: [node],
            )
            for subgraph in self._session.get_provider_graph_assignment_info()
            for node in subgraph.get_nodes()
        ]

    def io_binding(self) -> "StubBinding":
        self.bindings.append(StubBinding(self._session.io_binding()))
        return self.bindings[-1]

    def run_with_iobinding(self, binding: "StubBinding") -> None:
        self._session.run_with_iobinding(binding.real)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)


class StubBinding:
    """Records what is bound: arrays of the host, values of the device, and where the outputs go."""

    def __init__(self, real: Any) -> None:
        self.real = real
        self.arrays: list[str] = []
        self.values: dict[str, Any] = {}
        self.outputs: dict[str, str] = {}
        self.results: list[Any] = []

    def bind_cpu_input(self, name: str, array: Any) -> None:
        self.arrays.append(name)
        self.real.bind_cpu_input(name, array)

    def bind_ortvalue_input(self, name: str, value: Any) -> None:
        self.values[name] = value
        self.real.bind_ortvalue_input(name, value)

    def bind_output(self, name: str, device: str) -> None:
        self.outputs[name] = device
        self.real.bind_output(name, "cpu")

    def get_outputs(self) -> list[Any]:
        self.results = self.real.get_outputs()
        return self.results
