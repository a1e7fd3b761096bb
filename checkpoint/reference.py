"""The PyTorch reference: defines what the vectors should be.

K soft tokens with a KV cache on Hugging Face's own model (arXiv 2509.24291; repository Roytsai27/GIRCSE)::

    h_0 = state of the prompt's last token (after the final norm)
    s_k = softmax(lm_head(h_{k-1}) / T) @ E
    h_k = state of the model fed s_k as the next input embedding
    z_k = normalized mean of h_1..h_k, or normalized h_k

Unlike the official code it passes explicit position ids, so padding does not shift the rotary phase, and it runs
K vocabulary projections, not K + 1.
"""

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gircse.checkpoint.silence import quiet_transformers
from gircse.checkpoint.source import Checkpoint
from gircse.runtime.errors import CheckpointError
from gircse.runtime.precision import SPECS, Precision

SoftTokenFunction = Callable[[Tensor, Tensor], Tensor]
"""Makes soft tokens (batch, hidden) of probabilities (batch, vocab) and the embedding table E (vocab, hidden)."""


@dataclass(frozen=True)
class RefinementState:
    """State of the loop after the prompt (step 0) or after a refinement step.

    Attributes:
        hidden: (batch, hidden), h_k.
        probabilities: (batch, vocab), softmax that the soft token was made of; None for the prompt.
        soft_token: (batch, hidden), s_k, which was fed in; None for the prompt.
    """

    hidden: Tensor
    probabilities: Tensor | None = None
    soft_token: Tensor | None = None


def load_reference(checkpoint: Checkpoint, *, device: str = "cpu", precision: Precision = Precision.FP32) -> Any:
    """Load the causal LM in FP32, merge its adapter with PEFT, then move it to its device and precision.

    Args:
        checkpoint: model and adapter.
        device: a torch device, such as ``cpu`` or ``cuda``.
        precision: type of weights and arithmetic: FP32, FP16 or BF16.

    Returns:
        A ``transformers`` causal LM in eval mode.

    Raises:
        CheckpointError: transformers or PEFT cannot read the checkpoint.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    read = checkpoint.directory
    try:
        with quiet_transformers():
            model: Any = AutoModelForCausalLM.from_pretrained(
                checkpoint.directory, dtype=torch.float32, attn_implementation="sdpa", use_safetensors=True
            )
            if checkpoint.adapter_directory is not None:
                read = checkpoint.adapter_directory
                model = PeftModel.from_pretrained(model, checkpoint.adapter_directory).merge_and_unload()
    except Exception as err:  # both raise whatever a damaged file leads them to
        raise CheckpointError(
            str(read), f"cannot be loaded by PyTorch: {type(err).__name__}: {err}", None, "Check the checkpoint."
        ) from err
    return model.to(device=device, dtype=getattr(torch, SPECS[precision].dtype)).eval()


def step_states(model: Any, input_ids: Tensor, attention_mask: Tensor, *, steps: int, temperature: float) -> Tensor:
    """Return the states of every step of one batch.

    Args:
        model: a ``transformers`` causal LM.
        input_ids: (batch, tokens) int64, padded on the left.
        attention_mask: (batch, tokens) int64.
        steps: K.
        temperature: T.

    Returns:
        (batch, K + 1, hidden): h_0..h_K, not normalized, in the model's precision.
    """
    states = refine(model, input_ids, attention_mask, steps=steps, temperature=temperature)
    return torch.stack([state.hidden for state in states], dim=1)


def refine(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    steps: int,
    temperature: float,
    embed_soft_token: SoftTokenFunction = operator.matmul,
) -> Iterator[RefinementState]:
    """Run the prompt and K refinement steps of one batch.

    Args:
        model: a ``transformers`` causal LM.
        input_ids: (batch, tokens) int64, padded on the left.
        attention_mask: (batch, tokens) int64.
        steps: K.
        temperature: T.
        embed_soft_token: exactly the product, unless an INT8 variant is emulated, which approximates it.

    Yields:
        The state after the prompt and after each step, K + 1 in all.
    """
    from transformers import DynamicCache

    table = model.get_input_embeddings().weight
    cache = DynamicCache(config=model.config)
    positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    inputs: dict[str, Tensor] = {"input_ids": input_ids}
    probabilities = soft_token = None
    for step in range(steps + 1):
        with torch.inference_mode():
            output = model.model(
                **inputs, attention_mask=attention_mask, position_ids=positions, cache=cache, use_cache=True
            )
        hidden = output.last_hidden_state[:, -1]
        yield RefinementState(hidden, probabilities, soft_token)
        if step < steps:
            with torch.inference_mode():
                probabilities = F.softmax(model.lm_head(hidden) / temperature, dim=-1)
                soft_token = embed_soft_token(probabilities, table)
            inputs = {"inputs_embeds": soft_token[:, None]}
            positions = positions[:, -1:] + 1
            attention_mask = F.pad(attention_mask, (0, 1), value=1)
