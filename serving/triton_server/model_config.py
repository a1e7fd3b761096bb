"""``config.pbtxt``, Triton's description of a model, in protobuf's text format."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

DATA_TYPES = {"int64": "TYPE_INT64", "int32": "TYPE_INT32", "float32": "TYPE_FP32", "string": "TYPE_STRING"}


@dataclass(frozen=True)
class TensorConfig:
    """An input or output.

    Attributes:
        name: of the tensor.
        dtype: a key of ``DATA_TYPES``.
        shape: without the batch; -1 is a dimension of any size.
        optional: whether a request may leave it out.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    optional: bool = False


@dataclass(frozen=True)
class ModelConfig:
    """What Triton has to know of a model.

    Attributes:
        name: of the model, which is that of its folder.
        platform: field and value that name the backend, such as ``("backend", "python")``.
        max_batch_size: most rows of a batch.
        inputs: its inputs.
        outputs: its outputs.
        on_gpu: whether its one instance is on GPU 0 or on the CPU.
        profile: index of the optimization profile that an engine runs in.
        files: name of the model's file by compute capability, where it depends on that.
        parameters: settings of the backend.
    """

    name: str
    platform: tuple[str, str]
    max_batch_size: int
    inputs: Sequence[TensorConfig]
    outputs: Sequence[TensorConfig]
    on_gpu: bool
    profile: int | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    parameters: Mapping[str, str] = field(default_factory=dict)

    def to_pbtxt(self) -> str:
        """Return the content of ``config.pbtxt``."""
        return "\n".join(self._lines()) + "\n"

    def _lines(self) -> Iterator[str]:
        key, value = self.platform
        yield f"name: {_quoted(self.name)}"
        yield f"{key}: {_quoted(value)}"
        yield f"max_batch_size: {self.max_batch_size}"
        for kind, tensors in (("input", self.inputs), ("output", self.outputs)):
            for tensor in tensors:
                dims = ", ".join(map(str, tensor.shape))
                optional = ", optional: true" if tensor.optional else ""
                yield f"{kind} {{ name: {_quoted(tensor.name)}, data_type: {DATA_TYPES[tensor.dtype]}, " + (
                    f"dims: [ {dims} ]{optional} }}"
                )
        where = "kind: KIND_GPU, gpus: [ 0 ]" if self.on_gpu else "kind: KIND_CPU"
        profile = "" if self.profile is None else f', profile: [ "{self.profile}" ]'
        yield f"instance_group {{ count: 1, {where}{profile} }}"
        yield "dynamic_batching { }"  # while a batch runs, the next one gathers; nothing waits for company
        for capability, file in self.files.items():
            yield f"cc_model_filenames {{ key: {_quoted(capability)}, value: {_quoted(file)} }}"
        for name, setting in self.parameters.items():
            yield f"parameters {{ key: {_quoted(name)}, value: {{ string_value: {_quoted(setting)} }} }}"


def _quoted(text: str) -> str:
    """Return a string literal of protobuf's text format."""
    escapes = {"\\": r"\\", '"': r"\"", "\n": r"\n", "\r": r"\r", "\0": r"\000"}
    return f'"{"".join(escapes.get(character, character) for character in text)}"'
