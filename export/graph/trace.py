"""Trace a decoder from its config alone: Hugging Face's own forward, on fake weights, to one ONNX graph.

The one graph serves both the prompt and the refinement step; it takes S new positions and P past ones::

    inputs_embeds  (batch, S, hidden)                 past.i.key, past.i.value  (batch, P, kv_size)
    attention_bias (batch, 1, S, P + S), additive     position_ids              (batch, S) int64
    -> hidden      (batch, S, hidden), after the final norm
       present.i.key, present.i.value  (batch, P + S, kv_size)

Its weights are initializers named as in the checkpoint, without values. Three replacements make it compact standard
opset-23: attention and rotary become the ONNX operators (heads folded into the last axis, so the KV cache needs no
transposes), and RMSNorm becomes ``RMSNormalization``.
"""

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from gircse.export.graph.architecture import DecoderShape
from gircse.runtime import tensor_names

OPSET = 23

INPUTS_EMBEDS = "inputs_embeds"
ATTENTION_BIAS = "attention_bias"
POSITION_IDS = "position_ids"

ROTARY_COS = "rotary.cos"
ROTARY_SIN = "rotary.sin"

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
        (positions, head_dim / 2) float32 each.
    """
    from transformers import AttentionInterface, AutoModelForCausalLM

    AttentionInterface.register(_ATTENTION_NAME, _onnx_attention)
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    with fake_mode:
        causal_lm = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=_ATTENTION_NAME
        ).eval()
    tables = rotary_tables(causal_lm.model, positions)
    with fake_mode, torch.no_grad(), _onnx_operators(causal_lm.model):
        causal_lm.model.rotary_emb = _RotaryLookup(*(torch.zeros_like(table) for table in tables))
        exported = torch.export.export(
            _CachedDecoder(causal_lm.model),
            _example_inputs(shape),
            dynamic_shapes=_dynamic_shapes(shape.num_layers),
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )
    with _quiet_exporter():
        # The ONNX optimizer folds constants, which fake weights cannot survive; simplify.py does the rest.
        program = torch.onnx.export(exported, dynamo=True, opset_version=OPSET, optimize=False, verbose=False)
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    graph = program.model.graph
    _rename_io(graph, shape.num_layers)
    for value in graph.initializers.values():
        value.const_value = None
    for name, table in zip((ROTARY_COS, ROTARY_SIN), tables, strict=True):
        value = graph.initializers[f"model.rotary_emb.{name.removeprefix('rotary.')}"]
        value.name = name
        value.const_value = ir.tensor(table.numpy(), name=name)
    return graph


def rotary_tables(decoder: Any, positions: int) -> tuple[Tensor, Tensor]:
    """Compute the cosines and sines of all positions with the model's own rotary module.

    Args:
        decoder: the ``transformers`` decoder (``causal_lm.model``), whose weights may be fake.
        positions: number of positions.

    Returns:
        Two tensors (positions, head_dim / 2) float32, the scaling factor of the config included.
    """
    rotary = type(decoder.rotary_emb)(config=decoder.config)  # its few buffers, this time with real values
    cos, sin = rotary(torch.zeros(1), torch.arange(positions)[None])
    half = cos.shape[-1] // 2  # Hugging Face repeats each half
    return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()


class _CachedDecoder(nn.Module):
    """The decoder with its KV cache as plain inputs and outputs."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.model = decoder  # so that parameters are named model.*, as in the checkpoint

    def forward(
        self, inputs_embeds: Tensor, attention_bias: Tensor, position_ids: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        cache = _ConcatCache(past)
        hidden = self.model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_bias,
            position_ids=position_ids,
            cache=cache,
            use_cache=True,
        ).last_hidden_state
        return (hidden, *cache.present)


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


def _onnx_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    rotate = torch.onnx.ops.rotary_embedding
    return (
        rotate(_fold_heads(q), cos, sin, num_heads=q.shape[1]),
        rotate(_fold_heads(k), cos, sin, num_heads=k.shape[1]),
    )


def _onnx_attention(
    module: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor, *, scaling: float, **_: Any
) -> tuple[Tensor, None]:
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
        stack.enter_context(mock.patch.object(modeling, "apply_rotary_pos_emb", _onnx_rotary))
        for module in decoder.modules():
            if type(module).__name__.endswith("RMSNorm"):
                norm: Any = module
                stack.enter_context(mock.patch.object(norm, "forward", _RmsNorm(norm)))
        yield


class _RmsNorm:
    """``F.rms_norm`` in place of the five operators that Hugging Face writes it with."""

    def __init__(self, norm: Any) -> None:
        self.norm = norm

    def __call__(self, hidden: Tensor) -> Tensor:
        weight = self.norm.weight
        return F.rms_norm(hidden, weight.shape, weight, self.norm.variance_epsilon)


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
    outputs = [tensor_names.HIDDEN, *tensor_names.cache_names("present", num_layers)]
    for values, names in ((graph.inputs, inputs), (graph.outputs, outputs)):
        for value, name in zip(values, names, strict=True):
            value.name = name


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
