"""What each pass of an engine binds: shapes, and where every tensor lies in the device buffers. Pure arithmetic.

An unrolled engine runs one pass. A stepwise engine runs pass 0, the prompt, and then passes 1..steps; four buffers
serve them all, so that nothing but ids, masks and states ever crosses the bus:

    inputs   input_ids (batch, tokens) or less, then the attention mask of every pass, pass k's (batch, tokens + k)
    outputs  h_0..h_K, (batch, hidden) float32 each: pass k reads h_(k-1) and writes h_k
    cache 0  the keys and values that even passes write and odd passes read
    cache 1  the other way round

Where prompts begin with a prefix, its keys and values are put into cache 1 beforehand, once for every row, and
``tokens`` counts it: pass 0 takes the ids of what comes after it and the mask of all.

An empty tensor still gets an address of its own inside a buffer, because TensorRT requires every tensor's address to be
non-null and different from all others. Every tensor starts at a multiple of 256 bytes, which TensorRT requires too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

import numpy as np

from gircse.runtime import tensor_names
from gircse.runtime.manifest import GraphFacts, Layout
from gircse.runtime.numerics import Float32, Int64
from gircse.runtime.session import StepOutputs, step_outputs
from gircse.runtime.trt.cuda import HostBytes
from gircse.runtime.trt.engine_manifest import Shape

ALIGNMENT = 256
INT64_BYTES = 8
FLOAT32_BYTES = 4


class Buffer(Enum):
    """The device buffers of an execution slot."""

    INPUTS = "inputs"
    OUTPUTS = "outputs"
    CACHE_0 = "cache 0"
    CACHE_1 = "cache 1"


@dataclass(frozen=True)
class TensorPlacement:
    """Where a tensor lies: bytes from the start of a buffer."""

    buffer: Buffer
    offset: int


@dataclass(frozen=True)
class StepBindings:
    """One pass of an engine.

    Attributes:
        inputs: shape of every input.
        outputs: shape of every output.
        places: where each of them lies.
    """

    inputs: Mapping[str, Shape]
    outputs: Mapping[str, Shape]
    places: Mapping[str, TensorPlacement]


@dataclass(frozen=True)
class MemoryLayout:
    """Computes what the passes of one engine bind.

    Attributes:
        facts: what the graph computes.
        layout: which graph the engine was built from.
        cache_item_bytes: size of one number in the KV cache; the unrolled layout has none.
        layer_outputs: whether the engine shows the values between its layers, and lets them be replaced. A session does
            not run such an engine, so these have shapes but no places.
    """

    facts: GraphFacts
    layout: Layout
    cache_item_bytes: int
    layer_outputs: bool = False

    @property
    def last_pass(self) -> int:
        """Largest number of a pass: K, or 0 for the unrolled layout."""
        return self.facts.steps if self.layout is Layout.STEPWISE else 0

    def pass_count(self, steps: int) -> int:
        """Passes of a run of ``steps`` refinement steps."""
        return min(steps, self.last_pass) + 1

    def input_shapes(self, batch: int, tokens: int, number: int, *, prefix: int = 0) -> dict[str, Shape]:
        """Return the shape of every input in pass ``number``; ``prefix`` of the tokens lie in the cache beforehand."""
        prompt = number == 0
        shapes: dict[str, Shape] = {
            tensor_names.INPUT_IDS: (batch, tokens - prefix if prompt else 0),
            tensor_names.ATTENTION_MASK: (batch, tokens + number),
        }
        if self.layout is Layout.UNROLLED:
            return shapes
        if self.facts.steps:
            shapes[tensor_names.HIDDEN] = (batch, 0 if prompt else 1, self.facts.hidden_size)
        past = (batch, prefix if prompt else tokens + number - 1, self.facts.kv_size)
        shapes |= dict.fromkeys(tensor_names.cache_names("past", self.facts.num_layers), past)
        if self.layer_outputs:
            shapes[tensor_names.FORCE] = (1, 1, 1)
            layers = self._layer_shapes(shapes)
            shapes |= {name + tensor_names.FORCED: shape for name, shape in layers.items()}
        return shapes

    def output_shapes(self, batch: int, tokens: int, number: int) -> dict[str, Shape]:
        """Return the shape of every output in pass ``number``."""
        facts = self.facts
        vectors = (batch, facts.hidden_size)
        if self.layout is Layout.STEPWISE:
            present = (batch, tokens + number, facts.kv_size)
            cache = dict.fromkeys(tensor_names.cache_names("present", facts.num_layers), present)
            layers = self._layer_shapes(self.input_shapes(batch, tokens, number)) if self.layer_outputs else {}
            return {tensor_names.NEXT_HIDDEN: (batch, 1, facts.hidden_size), **cache, **layers}
        steps: dict[str, Shape] = {tensor_names.STEP_EMBEDDINGS: (batch, facts.steps, facts.hidden_size)}
        return {tensor_names.EMBEDDING: vectors, tensor_names.PROMPT_EMBEDDING: vectors} | (
            steps if facts.steps else {}
        )

    def bindings(self, batch: int, tokens: int, number: int, *, prefix: int = 0) -> StepBindings:
        """Return what pass ``number`` of a batch binds; ``prefix`` as in :meth:`input_shapes`."""
        places = {
            tensor_names.INPUT_IDS: TensorPlacement(Buffer.INPUTS, 0),
            tensor_names.ATTENTION_MASK: TensorPlacement(Buffer.INPUTS, self.mask_offset(batch, tokens, number)),
        }
        if self.layout is Layout.UNROLLED:
            places |= self._unrolled_outputs(batch)
        else:
            places |= self._states(batch, number) | self._cache(batch, tokens, number)
        inputs = self.input_shapes(batch, tokens, number, prefix=prefix)
        return StepBindings(inputs, self.output_shapes(batch, tokens, number), places)

    def prefix_shape(self, tokens: int) -> Shape:
        """Return the shape of the bytes of one tensor of a prefix: (1, tokens, bytes of a token)."""
        return (1, tokens, self.facts.kv_size * self.cache_item_bytes)

    def mask_offset(self, batch: int, tokens: int, number: int) -> int:
        """Return where the mask of pass ``number`` starts in the input buffer; that of pass K + 1 is the end."""
        widths = [tokens, *range(tokens, tokens + number)]
        return sum(aligned(batch * width * INT64_BYTES) for width in widths)

    def buffer_bytes(self, max_batch: int, max_tokens: int) -> dict[Buffer, int]:
        """Return the size of every buffer that batches up to these sizes need."""
        sizes = {
            Buffer.INPUTS: self.mask_offset(max_batch, max_tokens, self.last_pass + 1),
            # z_1..z_K of an unrolled engine lie in one block, no longer than K states; one more is z_K alone.
            Buffer.OUTPUTS: (self.facts.steps + 2) * self._state_bytes(max_batch),
        }
        if self.layout is Layout.STEPWISE:
            cache = 2 * self.facts.num_layers * self._cache_bytes(max_batch, max_tokens + self.facts.steps)
            sizes |= {Buffer.CACHE_0: cache, Buffer.CACHE_1: cache}
        return sizes

    def write_inputs(self, host: HostBytes, input_ids: Int64, attention_mask: Int64, *, steps: int) -> int:
        """Lay out the inputs of all passes of a run as in the input buffer; return how many bytes they take.

        Args:
            host: a copy of the input buffer in host memory.
            input_ids: (batch, tokens) int64, without those of a prefix.
            attention_mask: (batch, tokens) int64, with them.
            steps: refinement steps of the run; every soft token's place in the mask is a 1.
        """
        batch, tokens = attention_mask.shape
        _write(host, 0, input_ids)
        count = self.pass_count(steps)
        mask = np.pad(attention_mask, ((0, 0), (0, count - 1)), constant_values=1)
        for number in range(count):
            _write(host, self.mask_offset(batch, tokens, number), mask[:, : tokens + number])
        return self.mask_offset(batch, tokens, count)

    def output_bytes(self, batch: int, steps: int) -> int:
        """Return how much of the output buffer's start holds the results of a run."""
        return (steps + 1 if self.layout is Layout.STEPWISE else self.facts.steps + 1) * self._state_bytes(batch)

    def read_outputs(self, host: HostBytes, *, batch: int, steps: int) -> StepOutputs:
        """Read the results of a run from a copy of the output buffer; the arrays returned are copies."""
        hidden, size = self.facts.hidden_size, self._state_bytes(batch)
        if self.layout is Layout.STEPWISE:
            states = np.empty((batch, steps + 1, hidden), np.float32)
            for number in range(steps + 1):
                states[:, number] = _read(host, number * size, (batch, hidden))
            return step_outputs(states, self.facts.pooling)
        vectors = _read(host, size, (batch, self.facts.steps, hidden))
        return StepOutputs(_read(host, 0, (batch, hidden)).copy(), vectors[:, :steps].copy())

    def _layer_shapes(self, inputs: Mapping[str, Shape]) -> dict[str, Shape]:
        """Return the shape of every value between the layers in a pass with these inputs."""
        facts = self.facts
        batch, rows = inputs[tensor_names.INPUT_IDS]
        soft = inputs[tensor_names.HIDDEN][1] if facts.steps else 0
        names = tensor_names.layer_inputs(facts.num_layers, prompt=True, step=facts.steps > 0)
        first = [rows, soft] if facts.steps else [rows]
        sizes = [*first, *[rows + soft] * facts.num_layers]
        return {name: (batch, size, facts.hidden_size) for name, size in zip(names, sizes, strict=True)}

    def _state_bytes(self, batch: int) -> int:
        return aligned(batch * self.facts.hidden_size * FLOAT32_BYTES)

    def _cache_bytes(self, batch: int, total: int) -> int:
        return aligned(batch * total * self.facts.kv_size * self.cache_item_bytes)

    def _unrolled_outputs(self, batch: int) -> dict[str, TensorPlacement]:
        size = self._state_bytes(batch)
        names = [tensor_names.PROMPT_EMBEDDING, tensor_names.STEP_EMBEDDINGS, tensor_names.EMBEDDING]
        offsets = [0, size, (self.facts.steps + 1) * size]
        places = {name: TensorPlacement(Buffer.OUTPUTS, offset) for name, offset in zip(names, offsets, strict=True)}
        if not self.facts.steps:
            del places[tensor_names.STEP_EMBEDDINGS]
        return places

    def _states(self, batch: int, number: int) -> dict[str, TensorPlacement]:
        size = self._state_bytes(batch)
        places = {tensor_names.NEXT_HIDDEN: TensorPlacement(Buffer.OUTPUTS, number * size)}
        if self.facts.steps:
            # The prompt has no soft token to read: its empty tensor lies where the first step will write h_1.
            places[tensor_names.HIDDEN] = TensorPlacement(Buffer.OUTPUTS, (number - 1 if number else 1) * size)
        return places

    def _cache(self, batch: int, tokens: int, number: int) -> dict[str, TensorPlacement]:
        # As wide as the last step needs, so that one run's layout is the same in every pass.
        stride = self._cache_bytes(batch, tokens + self.facts.steps)
        write, read = (Buffer.CACHE_0, Buffer.CACHE_1) if number % 2 == 0 else (Buffer.CACHE_1, Buffer.CACHE_0)
        places = {}
        for prefix, buffer in (("past", read), ("present", write)):
            for index, name in enumerate(tensor_names.cache_names(prefix, self.facts.num_layers)):
                places[name] = TensorPlacement(buffer, index * stride)
        return places


def aligned(size: int) -> int:
    """Round a size in bytes up to the alignment of a tensor, and to at least one aligned block."""
    return max(1, -(-size // ALIGNMENT)) * ALIGNMENT


def _write(host: HostBytes, offset: int, array: Int64) -> None:
    host[offset : offset + array.nbytes].view(np.int64).reshape(array.shape)[:] = array


def _read(host: HostBytes, offset: int, shape: Shape) -> Float32:
    size = int(np.prod(shape)) * FLOAT32_BYTES
    return host[offset : offset + size].view(np.float32).reshape(shape)
