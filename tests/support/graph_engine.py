"""An engine with layer outputs on the simulated GPU that runs the same graph in ONNX Runtime."""

from typing import Any

import numpy as np

from gircse.evaluation.parity.graph_probe import InnerNames, ProbedGraph
from gircse.runtime import tensor_names
from gircse.runtime.bundle import Bundle
from gircse.runtime.manifest import GraphFacts, Layout
from gircse.runtime.tensor_names import FORCE, FORCED
from gircse.runtime.trt.engine_manifest import EngineManifest
from support.fake_cuda import FakeCuda
from support.fake_tensorrt import DataType, FakeContext, FakeEngine, FakeRuntime, FakeTensorRt, ILogger


def layer_values(facts: GraphFacts) -> list[str]:
    return tensor_names.layer_inputs(facts.num_layers, prompt=True, step=facts.steps > 0)


class GraphTensorRt(FakeTensorRt):
    """The module whose engines compute what a variant's stepwise graph computes; its KV cache is FP32."""

    def __init__(self, cuda: FakeCuda, bundle: Bundle, manifest: EngineManifest, *, rtx: bool = False) -> None:
        facts = bundle.manifest.graph
        super().__init__(cuda, facts, manifest, cache_type="FLOAT", rtx=rtx)
        self.__version__ = manifest.version
        inner = InnerNames(switched=set(layer_values(facts)), read=set())
        self.graph = ProbedGraph(bundle, manifest.precision, layout=Layout.STEPWISE, threads=2).open(inner)

    def Runtime(self, logger: ILogger) -> "GraphRuntime":
        super().Runtime(logger)
        return GraphRuntime(self, logger)


class GraphRuntime(FakeRuntime):
    module: GraphTensorRt

    def deserialize_cuda_engine(self, content: Any) -> "GraphEngine":
        assert bytes(memoryview(content)) == b"plan"
        return GraphEngine(self.module)


class GraphEngine(FakeEngine):
    module: GraphTensorRt

    def __init__(self, module: GraphTensorRt) -> None:
        super().__init__(module)
        names = layer_values(self.facts)
        self.inputs += [FORCE, *(name + FORCED for name in names)]
        self.outputs += names
        self.num_io_tensors = len(self.inputs) + len(self.outputs)

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType.BOOL if name == FORCE else super().get_tensor_dtype(name)

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name == FORCE:
            return (1, 1, 1)
        return (-1, -1, self.facts.hidden_size) if "/" in name else super().get_tensor_shape(name)

    def create_execution_context(self, argument: Any) -> FakeContext:
        return GraphContext(self, replays=False)


class GraphContext(FakeContext):
    module: GraphTensorRt

    def compute(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        tensors = {name: self._tensor(name, shapes[name], addresses[name]) for name in shapes}
        feed = {name: tensors[name].copy() for name in self.engine.inputs}
        for name, value in zip(self.engine.outputs, self.module.graph.run(self.engine.outputs, feed), strict=True):
            tensors[name][...] = value

    def _output_shape(self, name: str) -> tuple[int, ...]:
        forced = self.shapes.get(name + FORCED)
        return super()._output_shape(name) if forced is None else forced

    def _tensor(self, name: str, shape: tuple[int, ...], address: int) -> Any:
        if name != FORCE:
            return super()._tensor(name, shape, address)
        return self.cuda.view(address, 1).view(np.bool_).reshape(shape)
