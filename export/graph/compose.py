"""Compose the traced decoder into the graphs of a bundle: unrolled, or stepwise.

``unrolled`` has K + 1 copies of the decoder: one call, all steps. ``stepwise`` has one, for the prompt pass and every
step alike, each weight read by one node. Empty tensors choose between the two::

    prompt pass   input_ids (batch, tokens)   hidden (batch, 0, hidden)   past (batch, 0, kv_size)
    step          input_ids (batch, 0)        hidden (batch, 1, hidden)   past (batch, past, kv_size)

Four small pieces around the decoder are written directly in ONNX operators::

    inputs            ids, mask -> attention bias, positions; left and right padding give the same vectors
    last_state        -> h_0, the state of each prompt's last real token
    vocabulary        ids -> rows of E, and h -> softmax(lm_head(h) / T) @ E; INT8 variants bring their own
    pool              h_1..h_K -> z_1..z_K

Attention is masked by a finite additive bias, never by ``is_causal``, on which execution providers disagree when
there are more keys than queries (microsoft/onnxruntime#29020); finite, so that a fully masked row stays finite.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import onnx_ir as ir

from gircse.checkpoint.tensor_naming import EMBEDDING_TABLE, LM_HEAD
from gircse.export.graph.architecture import DecoderShape
from gircse.export.graph.builder import MASKED, GraphBuilder, RefinementSettings
from gircse.runtime import tensor_names
from gircse.runtime.manifest import Layout, Pooling

LAST = (1 << 31) - 1
"""End of a slice that takes everything to the end."""


class Vocabulary(Protocol):
    """How a graph reads the embedding table and makes soft tokens; INT8 variants have their own for each runtime."""

    def embed(self, g: GraphBuilder, input_ids: ir.Value) -> ir.Value:
        """(batch, tokens) int64 -> rows of E (batch, tokens, hidden) float32."""

    def soft_token(self, g: GraphBuilder, prefix: str, hidden: ir.Value) -> ir.Value:
        """(rows, hidden) -> softmax(lm_head(h) / T) @ E (rows, hidden) float32; ``prefix`` names the step."""


class FloatVocabulary:
    """Embedding table and vocabulary projection in float, as they are in the checkpoint."""

    def embed(self, g: GraphBuilder, input_ids: ir.Value) -> ir.Value:
        """Look the rows up in the table."""
        rows, scale = g.op("Gather", g.weight(EMBEDDING_TABLE), input_ids), g.shape.embedding_scale
        return rows if scale == 1.0 else g.op("Mul", rows, g.number(scale))

    def soft_token(self, g: GraphBuilder, prefix: str, hidden: ir.Value) -> ir.Value:
        """Sum all rows of E, weighted by the probabilities.

        The vocabulary matrices are left operands, (vocab, hidden) @ (hidden, rows), because ONNX Runtime keeps a
        packed copy of every constant right operand: two more copies of the largest weight. The Squeeze after the
        Transpose keeps the two apart from the MatMul, which reads a plain column fastest.
        """
        table = g.weight(EMBEDDING_TABLE)
        head = table if g.shape.tied else g.weight(LM_HEAD)
        row = g.op("Unsqueeze", hidden, g.indices([1]))
        column = g.op("Squeeze", g.op("Transpose", row, perm=[2, 1, 0]), g.indices([1]))
        logits = g.temper(g.softcap(g.op("MatMul", head, column)))
        probabilities = g.op("Softmax", logits, axis=0)  # (vocab, rows)
        probabilities.name = prefix + tensor_names.PROBABILITIES
        return g.op("Transpose", g.op("Gemm", table, probabilities, transA=1), perm=[1, 0])


def compose_graph(
    decoder: ir.Graph,
    shape: DecoderShape,
    settings: RefinementSettings,
    *,
    layout: Layout,
    vocabulary: Vocabulary | None = None,
) -> ir.Model:
    """Build the graph of a layout.

    Args:
        decoder: the simplified graph of ``trace_decoder``.
        shape: sizes of the decoder.
        settings: K, pooling, temperature.
        layout: ``unrolled`` or ``stepwise``.
        vocabulary: how it reads the vocabulary; None is ``FloatVocabulary``.

    Returns:
        The graph in FP32. Weights are initializers without usable values, one for each tensor of the checkpoint.
    """
    g = GraphBuilder(decoder, shape, settings)
    (_unrolled if layout is Layout.UNROLLED else _stepwise)(g, vocabulary or FloatVocabulary())
    return g.model()


def _unrolled(g: GraphBuilder, vocabulary: Vocabulary) -> None:
    hidden_size, steps = g.shape.hidden_size, g.settings.steps
    input_ids, mask = g.prompt()
    prompt = _inputs(g, input_ids, mask, start=None)
    embeds = _embed(g, vocabulary, input_ids)
    states, cache = g.decode(tensor_names.PROMPT_PREFIX, embeds, prompt.bias, prompt.positions, None)
    hidden = g.op("Squeeze", _last_state(g, states, mask, prompt.position), g.indices([1]))
    hidden.name = tensor_names.PROMPT_PREFIX + tensor_names.STATE
    prompt_embedding = g.l2_normalize(hidden)
    tokens = g.op("ReduceSum", mask, g.indices([1]), keepdims=1)
    visible, key_bias = g.zeros_of_batch(tokens), prompt.key_bias
    outputs = []
    for k in range(steps):
        key_bias = g.op("Concat", key_bias, visible, axis=-1)
        positions = g.op("Add", tokens, g.indices([k]))
        prefix = tensor_names.step_prefix(k + 1)
        soft_token = g.op("Unsqueeze", vocabulary.soft_token(g, prefix, hidden), g.indices([1]))
        soft_token.name = prefix + tensor_names.SOFT_TOKEN
        output, cache = g.decode(prefix, soft_token, key_bias, positions, cache)
        output.name = prefix + tensor_names.STATE
        outputs.append(output)
        hidden = g.op("Squeeze", output, g.indices([1]))
    if outputs:
        embeddings = _pool(g, outputs)
        last = g.op("Gather", embeddings, g.index(steps - 1), axis=1)
        g.output(last, tensor_names.EMBEDDING, ["batch", hidden_size])
        g.output(embeddings, tensor_names.STEP_EMBEDDINGS, ["batch", steps, hidden_size])
    else:
        g.output(g.op("Identity", prompt_embedding), tensor_names.EMBEDDING, ["batch", hidden_size])
    g.output(prompt_embedding, tensor_names.PROMPT_EMBEDDING, ["batch", hidden_size])


def _stepwise(g: GraphBuilder, vocabulary: Vocabulary) -> None:
    shape = g.shape
    input_ids, mask = g.prompt(mask_width="total")
    width = shape.hidden_size
    hidden = g.input(tensor_names.HIDDEN, ir.DataType.FLOAT, ["batch", "soft", width]) if g.settings.steps else None
    past = [
        g.input(name, ir.DataType.FLOAT, ["batch", "past", shape.kv_size])
        for name in tensor_names.cache_names("past", shape.num_layers)
    ]
    start = g.op("Shape", past[0], start=1, end=2)
    inputs = _inputs(g, input_ids, mask, start=start)
    embeds = _embed(g, vocabulary, input_ids)
    if hidden is not None:
        prefix = tensor_names.step_prefix(None)
        # Explicit shapes: in the prompt pass there are no rows, which leaves nothing to infer a -1 from.
        rows = g.op("Mul", g.op("Shape", hidden, start=0, end=1), g.op("Shape", hidden, start=1, end=2))
        flat = g.op("Reshape", hidden, g.op("Concat", rows, g.indices([width]), axis=0), allowzero=1)
        soft_token = g.op("Reshape", vocabulary.soft_token(g, prefix, flat), g.op("Shape", hidden), allowzero=1)
        soft_token.name = prefix + tensor_names.SOFT_TOKEN
        embeds = g.op("Concat", embeds, soft_token, axis=1)
    states, cache = g.decode(tensor_names.DECODER_PREFIX, embeds, inputs.bias, inputs.positions, past)
    last = _last_state(g, states, g.op("Slice", mask, start, g.indices([LAST]), g.indices([1])), inputs.position)
    g.output(last, tensor_names.NEXT_HIDDEN, ["batch", 1, width])
    for value, name in zip(cache, tensor_names.cache_names("present", shape.num_layers), strict=True):
        g.output(value, name, ["batch", "total", shape.kv_size])


def _embed(g: GraphBuilder, vocabulary: Vocabulary, input_ids: ir.Value) -> ir.Value:
    embeds = vocabulary.embed(g, input_ids)
    embeds.name = tensor_names.PROMPT_PREFIX + tensor_names.EMBEDDINGS
    return embeds


class _Inputs(NamedTuple):
    """What the decoder reads besides embeddings, and what it is made of.

    Attributes:
        bias: (batch, 1, new, keys) float32.
        positions: (batch, new) int64.
        key_bias: (batch, 1, 1, keys) float32, the part of the bias that hides padding.
        position: (new,) int64, 0 for the first new token.
    """

    bias: ir.Value
    positions: ir.Value
    key_bias: ir.Value
    position: ir.Value


def _inputs(g: GraphBuilder, input_ids: ir.Value, mask: ir.Value, *, start: ir.Value | None) -> _Inputs:
    """Derive attention bias and positions from the mask (batch, keys); ``start`` (1,) is the length of the past."""
    # Positions count real tokens, so that padding does not shift the rotary phase.
    positions = g.op("Max", g.op("Sub", g.op("CumSum", mask, g.index(1)), g.index(1)), g.index(0))
    key_bias = g.key_bias(mask)
    total = g.op("Shape", mask, start=1, end=2)
    query = position = key = _count(g, total)
    if start is not None:
        positions = g.op("Slice", positions, start, g.indices([LAST]), g.indices([1]))
        query = g.op("Slice", key, start, g.indices([LAST]), g.indices([0]))
        # Counted anew, not query - start: sizes are computed on the host, which a GPU's tensor would have to wait for.
        position = _count(g, g.op("Sub", total, start))
    future = g.op("Less", g.op("Unsqueeze", query, g.indices([1])), g.op("Unsqueeze", key, g.indices([0])))
    causal_bias = g.op("Mul", g.op("Cast", future, to=ir.DataType.FLOAT), g.number(MASKED))
    # Min, not Add: two masks at once would leave the range of FP16.
    return _Inputs(g.op("Min", key_bias, causal_bias), positions, key_bias, position)


def _count(g: GraphBuilder, size: ir.Value) -> ir.Value:
    """Return 0, 1, ... below a size that is given as (1,) int64."""
    return g.op("Range", g.index(0), g.op("Squeeze", size, g.indices([0])), g.index(1))


def _last_state(g: GraphBuilder, states: ir.Value, mask: ir.Value, position: ir.Value) -> ir.Value:
    """Return the state (batch, 1, hidden) of each row's last real token; ``mask``, ``position`` cover the new ones."""
    last = g.op("ReduceMax", g.op("Mul", mask, position), g.indices([1]), keepdims=1)
    at = g.op("Unsqueeze", last, g.indices([2]))
    return g.op("GatherND", states, at, batch_dims=1)


def _pool(g: GraphBuilder, states: Sequence[ir.Value]) -> ir.Value:
    """Return z_1..z_K (batch, K, hidden) of the states (batch, 1, hidden)."""
    stacked = g.op("Concat", *states, axis=1)
    if g.settings.pooling is Pooling.LAST:
        return g.l2_normalize(stacked)
    counts = np.arange(1, len(states) + 1, dtype=np.float32)[:, None]
    sums = g.op("CumSum", stacked, g.index(1))
    return g.l2_normalize(g.op("Div", sums, g.constant("counts", counts)))


def weight_initializers(models: Iterable[ir.Model]) -> dict[str, ir.Value]:
    """Return one initializer of each name that a checkpoint has to fill, sorted by name."""
    found = {
        name: value for model in models for name, value in model.graph.initializers.items() if value.const_value is None
    }
    return dict(sorted(found.items()))
