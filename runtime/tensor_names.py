"""The one place for tensor names, shared by the graphs that export writes and the sessions that run them.

``unrolled`` graph, inputs and outputs:
    input_ids         (batch, tokens) int64
    attention_mask    (batch, tokens) int64, 1 for a real token; left or right padding
    embedding         (batch, hidden) float32, z_K
    step_embeddings   (batch, K, hidden) float32, z_1..z_K (absent when K = 0)
    prompt_embedding  (batch, hidden) float32, h_0 normalized: the classic encoder-only embedding

``stepwise`` graph, run once for the prompt and once a step; what does not apply is empty:
    input_ids       (batch, tokens) int64, the prompt; (batch, 0) in a step
    hidden          (batch, soft, hidden) float32, soft = 0 with the prompt; h_{k-1} in a step, soft = 1 (absent when
                    K = 0)
    attention_mask  (batch, total) int64, the prompt's mask, then a 1 for every soft token, the new one included
    past.i.key, past.i.value        (batch, past, kv_heads * head_dim), past = 0 with the prompt; float32, or the
                                    type of an FP16 or BF16 graph
    next_hidden     (batch, 1, hidden) float32: h_0 of the prompt, h_k of a step
    present.i.key, present.i.value  (batch, total, kv_heads * head_dim)

Inner values that keep their names in every precision, so that a probe can read and replace them (prefix ``stepk/`` in
the unrolled graph, ``step/`` in the stepwise one):
    step/probabilities  (vocab, rows), softmax(lm_head(h_{k-1}) / T)
    step/logits         (rows, vocab), lm_head(h_{k-1}) / T, in INT8 variants
    step/soft_token     (batch, 1, hidden), s_k
    stepk/state         (batch, 1, hidden), h_k; ``prompt/state`` (batch, hidden), h_0 (unrolled only)
    prompt/embeddings   (batch, tokens, hidden), rows of E: what the first layer reads of the prompt
    stepk/layer.i       (batch, new, hidden), residual stream after decoder layer i; ``prompt/layer.i`` (unrolled) and
                        ``decoder/layer.i`` (stepwise, in every pass)

A graph or an engine that was opened for a probe has the values between its layers as outputs in float32, and of each an
input that replaces it:
    force           (1, 1, 1) bool, whether the computation goes on with the replacements
    NAME.forced     float32, the shape of NAME
"""

import re

INPUT_IDS = "input_ids"
ATTENTION_MASK = "attention_mask"

EMBEDDING = "embedding"
STEP_EMBEDDINGS = "step_embeddings"
PROMPT_EMBEDDING = "prompt_embedding"

PROMPT_PREFIX = "prompt/"
DECODER_PREFIX = "decoder/"
PROBABILITIES = "probabilities"
LOGITS = "logits"
SOFT_TOKEN = "soft_token"
STATE = "state"
EMBEDDINGS = "embeddings"

HIDDEN = "hidden"
NEXT_HIDDEN = "next_hidden"

FORCE = "force"
FORCED = ".forced"

GRAPH_IDENTITY_KEY = "gircse"
"""Key of the ONNX metadata entry that repeats the manifest's identity (see ``GraphFacts.identity``)."""

SIZE_NODES_KEY = "gircse.size_nodes"
"""Key of the ONNX metadata entry that lists, separated by commas, the nodes that read nothing but sizes of tensors."""


def cache_names(prefix: str, num_layers: int) -> list[str]:
    """Names of the KV cache tensors, key before value, layer by layer.

    Args:
        prefix: ``"past"`` or ``"present"``.
        num_layers: number of decoder layers.
    """
    return [f"{prefix}.{layer}.{kind}" for layer in range(num_layers) for kind in ("key", "value")]


def layer_names(num_layers: int) -> list[str]:
    """Names of the residual stream after each decoder layer, without the prefix of their copy of the decoder."""
    return [f"layer.{layer}" for layer in range(num_layers)]


def layer_inputs(num_layers: int, *, prompt: bool, step: bool) -> list[str]:
    """Names of what the layers of the stepwise graph read and make: the prompt's rows, the soft token, each layer's.

    Args:
        num_layers: number of decoder layers.
        prompt: with the rows that the first layer reads of the prompt.
        step: with the soft token, which it reads in a step.
    """
    rows = [PROMPT_PREFIX + EMBEDDINGS] if prompt else []
    soft_token = [step_prefix(None) + SOFT_TOKEN] if step else []
    return [*rows, *soft_token, *(DECODER_PREFIX + layer for layer in layer_names(num_layers))]


def is_cache(name: str) -> bool:
    """Whether a graph's input or output of this name is part of the KV cache, past or present."""
    return re.fullmatch(r"(past|present)\.\d+\.(key|value)", name) is not None


def step_prefix(step: int | None) -> str:
    """Prefix of the inner names of a refinement step: k in the unrolled graph, None in the step graph."""
    return "step/" if step is None else f"step{step}/"
