"""The PyTorch reference: what the vectors have to be.

K soft tokens with a KV cache on Hugging Face's own model (arXiv 2509.24291; repository Roytsai27/GIRCSE)::

    h_0 = state of the prompt's last token (after the final norm)
    s_k = softmax(lm_head(h_{k-1}) / T) @ E
    h_k = state of the model fed s_k as the next input embedding
    z_k = normalised mean of h_1..h_k, or normalised h_k

Unlike the official code it passes explicit position ids, so padding does not shift the rotary phase, and it runs
K vocabulary projections, not K + 1.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gircse.calibration.checkpoint import Checkpoint
from gircse.calibration.quiet import quiet_transformers


def load_reference(checkpoint: Checkpoint) -> Any:
    """Load the causal LM in FP32 on the CPU with its adapter merged by PEFT.

    Returns:
        A ``transformers`` causal LM in eval mode.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint.directory, dtype=torch.float32, attn_implementation="sdpa", use_safetensors=True
        )
        if checkpoint.adapter_directory is not None:
            model = PeftModel.from_pretrained(model, checkpoint.adapter_directory).merge_and_unload()
    return model.eval()


@torch.inference_mode()
def step_states(model: Any, input_ids: Tensor, attention_mask: Tensor, *, steps: int, temperature: float) -> Tensor:
    """Run the prompt and K refinement steps.

    Args:
        model: a ``transformers`` causal LM.
        input_ids: (batch, tokens) int64, padded on the left.
        attention_mask: (batch, tokens) int64.
        steps: K.
        temperature: T.

    Returns:
        (batch, K + 1, hidden) float32: h_0..h_K, not normalised.
    """
    from transformers import DynamicCache

    table = model.get_input_embeddings().weight
    cache = DynamicCache(config=model.config)
    positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    inputs: dict[str, Tensor] = {"input_ids": input_ids}
    states = []
    for _ in range(steps + 1):
        output = model.model(
            **inputs, attention_mask=attention_mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        states.append(output.last_hidden_state[:, -1:])
        if len(states) <= steps:
            soft_token = F.softmax(model.lm_head(states[-1]) / temperature, dim=-1) @ table
            inputs = {"inputs_embeds": soft_token}
            positions = positions[:, -1:] + 1
            attention_mask = F.pad(attention_mask, (0, 1), value=1)
    return torch.cat(states, dim=1)
