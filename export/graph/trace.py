"""Trace a decoder from its config alone: Hugging Face's own forward, on fake weights, to one ONNX graph.

The one graph serves both the prompt and the refinement step; it takes S new positions and P past ones::

    inputs_embeds  (batch, S, hidden)                 past.i.key, past.i.value  (batch, P, kv_size)
    attention_bias (batch, 1, S, P + S), additive     position_ids              (batch, S) int64
    -> hidden      (batch, S, hidden), after the final norm
       present.i.key, present.i.value  (batch, P + S, kv_size)

Its weights are initializers named as in the checkpoint, without values, and the residual stream after layer i is the
inner value ``layer.i``. Three replacements make it compact standard
opset-23: attention and rotary become the ONNX operators (heads folded into the last axis, so the KV cache needs no
transposes), and RMSNorm becomes ``RMSNormalization``.
"""

import contextlib
import functools
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import onnx_ir as ir
import torch
import torch.nn.functional as F
from onnxscript import opset23 as op
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from gircse.export.graph.architecture import DecoderShape
from gircse.runtime import tensor_names
from gircse.runtime.errors import ExportError, GircseError, reason_of

OPSET = 23

INPUTS_EMBEDS = "inputs_embeds"
ATTENTION_BIAS = "attention_bias"
POSITION_IDS = "position_ids"

ROTARY_PREFIX = "rotary."
"""Starts the names of the rotary tables: ``rotary.cos``, or ``rotary.full_attention.cos`` where layers differ."""

RotaryTables = Mapping[str, tuple[Tensor, Tensor]]

_ATTENTION_NAME = "gircse_onnx"
# Example sizes: all different from each other and from 0 and 1, so that no dimension is mistaken for another.
_BATCH, _NEW, _PAST = 2, 3, 5


def trace_decoder(config: Any, shape: DecoderShape, *, positions: int) -> ir.Graph:
    """Trace the decoder of a config.

    Args:
        config: a ``transformers`` config of a supported architecture; it is changed (attention implementation).
        shape: its sizes.
        positions: rows of the rotary tables, max_tokens + K.

    Returns:
        The graph described in the module text. Its initializers carry no values, except the rotary tables:
        (positions, rotary_dim / 2) float32 each.

    Raises:
        ExportError: the model computes something that the graphs do not, or cannot be traced.
    """
    try:
        program, tables = _traced(config, shape, positions)
    except GircseError:
        raise
    except Exception as err:  # what torch and transformers raise at a model of impossible sizes
        raise ExportError(
            "config.json",
            f"describes a model that cannot be traced: {reason_of(err)}",
            None,
            "Check that its numbers are those of the checkpoint.",
        ) from err
    graph = program.model.graph
    _rename_io(graph, shape.num_layers)
    for value in graph.initializers.values():
        value.const_value = None
    for kind, pair in tables.items():
        for part, table in zip(("cos", "sin"), pair, strict=True):
            path = f"{kind}.{part}" if kind else part
            value = graph.initializers[f"model.rotary_emb.{path}"]
            value.name = ROTARY_PREFIX + path
            value.const_value = ir.tensor(table.numpy(), name=value.name)
    return graph


def _traced(config: Any, shape: DecoderShape, positions: int) -> tuple[torch.onnx.ONNXProgram, RotaryTables]:
    """Return the traced program, and the rotary tables that its initializers stand for."""
    from transformers import AttentionInterface, AutoModelForCausalLM

    AttentionInterface.register(_ATTENTION_NAME, onnx_attention)
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    with fake_mode:
        causal_lm = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=_ATTENTION_NAME
        ).eval()
    _check_vocabulary(causal_lm, shape)
    tables = rotary_tables(causal_lm.model, positions)
    with fake_mode, torch.no_grad(), _onnx_operators(causal_lm.model):
        causal_lm.model.rotary_emb = _rotary_lookup(tables)
        exported = torch.export.export(
            _CachedDecoder(causal_lm.model),
            _example_inputs(shape),
            dynamic_shapes=_dynamic_shapes(shape.num_layers),
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )
    with _quiet_exporter():
        # The ONNX optimizer folds constants, which fake weights cannot survive; simplify.py does the rest.
        program = torch.onnx.export(
            exported,
            dynamo=True,
            opset_version=OPSET,
            optimize=False,
            verbose=False,
            custom_translation_table={
                torch.ops.aten.slice.Tensor: _onnx_slice,
                torch.ops.aten.split.Tensor: _onnx_split,
            },
        )
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    return program, tables


def rotary_tables(decoder: Any, positions: int) -> RotaryTables:
    """Compute the cosines and sines of all positions with the model's own rotary module.

    Args:
        decoder: the ``transformers`` decoder (``causal_lm.model``), whose weights may be fake.
        positions: number of positions.

    Returns:
        Two tensors (positions, rotary_dim / 2) float32, the scaling factor of the config included, by the type of the
        layers that they belong to; ``""`` where all layers have the same.

    Raises:
        ExportError: an angle is not finite.
    """
    rotary = type(decoder.rotary_emb)(config=decoder.config)  # its few buffers, this time with real values
    tables = {}
    for kind in getattr(rotary, "layer_types", [""]):
        cos, sin = rotary(torch.zeros(1), torch.arange(positions)[None], *([kind] if kind else []))
        half = cos.shape[-1] // 2  # Hugging Face repeats each half
        tables[kind] = cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()
        if not (cos.isfinite().all() and sin.isfinite().all()):
            raise ExportError(
                "config.json", "has a rotary scaling with angles that are not finite", None, "Correct rope_theta."
            )
    return tables


def _check_vocabulary(causal_lm: Any, shape: DecoderShape) -> None:
    """Refuse a model whose embedding or lm_head is another function than the one that ``compose.py`` writes.

    Raises:
        ExportError: it is.
    """
    embedding, head = causal_lm.get_input_embeddings(), causal_lm.lm_head
    plain = type(embedding) is nn.Embedding
    scale = 1.0 if plain else getattr(embedding, "scalar_embed_scale", None)
    if scale != shape.embedding_scale or type(head) is not nn.Linear or head.bias is not None:
        raise ExportError(
            f"the {shape.architecture} model of this transformers",
            f"has the embedding {embedding} and the lm_head {head}",
            f"the graphs compute rows * {shape.embedding_scale:g} and a product without a bias",
            "Install the version of transformers that pip install 'gircse-deploy[export]' chooses.",
        )


class _CachedDecoder(nn.Module):
    """The decoder with its KV cache as plain inputs and outputs."""

    def __init__(self, decoder: Any) -> None:
        super().__init__()
        self.model = decoder  # so that parameters are named model.*, as in the checkpoint

    def forward(
        self, inputs_embeds: Tensor, attention_bias: Tensor, position_ids: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        cache, streams = _ConcatCache(past), list[Tensor]()
        with contextlib.ExitStack() as hooks:
            for layer in self.model.layers:
                hook = layer.register_forward_hook(lambda _module, _inputs, output: streams.append(output))
                hooks.callback(hook.remove)
            hidden = self.model(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_bias,
                position_ids=position_ids,
                cache=cache,
                use_cache=True,
            ).last_hidden_state
        return (hidden, *cache.present, *streams)


class _ConcatCache:
    """The part of ``transformers.Cache`` that a decoder calls; heads stay folded into the last axis."""

    def __init__(self, past: Sequence[Tensor]) -> None:
        self.past = past
        self.present = list(past)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.past[2 * layer_idx].shape[1]

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append (batch, S, kv_size) keys, already folded by the rotary, and (batch, kv_heads, S, head_dim) values."""
        at = 2 * layer_idx
        self.present[at] = torch.cat([self.past[at], key], dim=1)
        self.present[at + 1] = torch.cat([self.past[at + 1], _fold_heads(value)], dim=1)
        return self.present[at], self.present[at + 1]


def _rotary_lookup(tables: RotaryTables) -> nn.Module:
    """Return what stands in for the rotary module while it is traced; its tables hold zeros."""
    lookups = {kind: _RotaryLookup(torch.zeros_like(cos), torch.zeros_like(sin)) for kind, (cos, sin) in tables.items()}
    return lookups[""] if "" in lookups else _RotaryLookupOfLayerType(lookups)


class _RotaryLookupOfLayerType(nn.ModuleDict):
    """The tables of a decoder whose layers rotate in more than one way."""

    def forward(self, hidden: Tensor, position_ids: Tensor, layer_type: str) -> tuple[Tensor, Tensor]:
        rows: tuple[Tensor, Tensor] = self[layer_type](hidden, position_ids)
        return rows


class _RotaryLookup(nn.Module):
    """Stands in for the rotary module: rows of a table instead of cosines computed in the graph."""

    cos: Tensor
    sin: Tensor

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        super().__init__()
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)

    def forward(self, _: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return F.embedding(position_ids, self.cos), F.embedding(position_ids, self.sin)


def _fold_heads(x: Tensor) -> Tensor:
    """(batch, heads, S, head_dim) -> (batch, S, heads * head_dim)."""
    return x.transpose(1, 2).flatten(2)


def onnx_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Stand for ``apply_rotary_pos_emb``.

    Args:
        q: (batch, heads, S, head_dim).
        k: (batch, kv_heads, S, head_dim).
        cos: (batch, S, rotary_dim / 2) of ``rotary_tables``, and so ``sin``.
        sin: see ``cos``.

    Returns:
        Both rotated, heads folded into the last axis.
    """
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (batch, heads, S, head_dim); the part of a head that is wider than the tables passes through (Phi)."""
    rotary_dim = 2 * cos.shape[-1]
    return torch.onnx.ops.rotary_embedding(
        _fold_heads(x),
        cos,
        sin,
        num_heads=x.shape[1],
        rotary_embedding_dim=rotary_dim if rotary_dim < x.shape[-1] else 0,
    )


_HARMLESS_ARGUMENTS = {
    "cache_position",  # the cache here is a concatenation
    "position_ids",  # for kernels that take several texts in one row
    "sliding_window",  # check_limits refuses prompts that it would cut
    "use_cache",
}
"""Arguments of an attention function that change nothing here; any other that is not empty is refused."""


def onnx_attention(
    module: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention_mask: Tensor,
    *,
    scaling: float,
    is_causal: bool = True,
    **others: object,
) -> tuple[Tensor, None]:
    """Stand for an attention function of ``transformers``.

    Args:
        module: the attention module.
        q: (batch, S, heads * head_dim).
        k: (batch, P + S, kv_size).
        v: (batch, P + S, kv_size).
        attention_mask: (batch, 1, S, P + S), additive.
        scaling: factor of the scores.
        is_causal: must be true, as must the module's own.
        others: must be empty, unless it is known that they change nothing.

    Returns:
        (batch, S, heads * head_dim), and None for the weights.

    Raises:
        ExportError: an argument asks for what the graphs do not compute.
    """
    refused = {
        name: value
        for name, value in others.items()
        if name not in _HARMLESS_ARGUMENTS and (isinstance(value, Tensor) or value)
    }
    if not (is_causal and getattr(module, "is_causal", True)):
        refused["is_causal"] = False
    if refused:
        name, value = min(refused.items())
        raise ExportError(
            f"the attention of {type(module).__name__}",
            f"takes {name} = {value}, which the graphs do not compute",
            "they have causal attention with a scale, and nothing else",
            "Export a model whose config.json leaves it out.",
        )
    heads = q.shape[-1] // module.head_dim
    output, *_unused = torch.onnx.ops.attention(
        q,
        k,
        v,
        attn_mask=attention_mask,
        q_num_heads=heads,
        kv_num_heads=heads // module.num_key_value_groups,
        scale=float(scaling),
    )
    return output, None


@contextlib.contextmanager
def _onnx_operators(decoder: nn.Module) -> Iterator[None]:
    """Make the decoder's code call ONNX operators while it is traced."""
    modeling = sys.modules[type(decoder).__module__]
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(modeling, "apply_rotary_pos_emb", onnx_rotary))
        # Gemma 3 loops over a set of strings, whose order differs from process to process, and so would the graph's.
        stack.enter_context(mock.patch.object(modeling, "set", dict.fromkeys, create=True))
        for module in decoder.modules():
            if (formula := NORMS.get(type(module).__name__)) is not None:
                stack.enter_context(mock.patch.object(module, "forward", functools.partial(formula, module)))
        yield


def rms_norm(norm: Any, hidden: Tensor) -> Tensor:
    """Return ``F.rms_norm``, which is one operator, in place of the five that Hugging Face writes it with."""
    return F.rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)


def centered_rms_norm(norm: Any, hidden: Tensor) -> Tensor:
    """Return the same for a norm whose weight is stored as its difference from 1."""
    return F.rms_norm(hidden, norm.weight.shape, 1.0 + norm.weight, norm.eps)


NORMS: Mapping[str, Callable[[Any, Tensor], Tensor]] = {
    "LlamaRMSNorm": rms_norm,
    "MistralRMSNorm": rms_norm,
    "Qwen2RMSNorm": rms_norm,
    "Qwen3RMSNorm": rms_norm,
    "Phi3RMSNorm": rms_norm,
    "Gemma3RMSNorm": centered_rms_norm,
}
"""What replaces each norm. A norm of another class is traced as it is written: more nodes, the same vectors."""


def _onnx_slice(x: Any, dim: int, start: int, end: int) -> Any:
    """Cut the outputs of a fused projection apart; torch.onnx computes the constant bounds in nine nodes."""
    bounds: list[Any] = [op.Constant(value_ints=[value]) for value in (start, min(end, x.shape[dim]), dim)]
    return op.Slice(x, *bounds)


def _onnx_split(x: Any, size: int, dim: int) -> Any:
    """Cut in equal parts; torch.onnx makes a sequence of them, which has no symbolic shape."""
    parts = x.shape[dim] // size
    return op.Split(x, axis=dim, num_outputs=parts)


def _example_inputs(shape: DecoderShape) -> tuple[Any, ...]:
    return (
        torch.zeros(_BATCH, _NEW, shape.hidden_size),
        torch.zeros(_BATCH, 1, _NEW, _PAST + _NEW),
        torch.zeros(_BATCH, _NEW, dtype=torch.int64),
        [torch.zeros(_BATCH, _PAST, shape.kv_size) for _ in range(2 * shape.num_layers)],
    )


def _dynamic_shapes(num_layers: int) -> tuple[Any, ...]:
    batch, new, past = (torch.export.Dim(name) for name in ("batch", "new", "past"))
    return (
        {0: batch, 1: new},
        {0: batch, 2: new, 3: torch.export.Dim.AUTO},
        {0: batch, 1: new},
        [{0: batch, 1: past} for _ in range(2 * num_layers)],
    )


def _rename_io(graph: ir.Graph, num_layers: int) -> None:
    inputs = [INPUTS_EMBEDS, ATTENTION_BIAS, POSITION_IDS, *tensor_names.cache_names("past", num_layers)]
    layers = tensor_names.layer_names(num_layers)
    outputs = [tensor_names.HIDDEN, *tensor_names.cache_names("present", num_layers), *layers]
    for values, names in ((graph.inputs, inputs), (graph.outputs, outputs)):
        for value, name in zip(values, names, strict=True):
            value.name = name
    del graph.outputs[-num_layers:]  # an output only to be found and named


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence the exporter's notes about packages that are not used here."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)
