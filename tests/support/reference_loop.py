"""GIRCSE in plain torch: no KV cache, no padding, no mask, one text at a time. Imports nothing of ours."""

import torch
from torch import Tensor


@torch.no_grad()
def plain_states(model, token_ids: list[int], steps: int, temperature: float = 1.0) -> Tensor:  # noqa: ANN001
    """Return h_0..h_K of one text, (K + 1, hidden)."""
    table = model.get_input_embeddings().weight
    embeds = table[torch.tensor([token_ids])]
    states = []
    for _ in range(steps + 1):
        hidden = model.model(inputs_embeds=embeds, use_cache=False).last_hidden_state[:, -1]
        states.append(hidden)
        soft_token = torch.softmax(model.lm_head(hidden) / temperature, dim=-1) @ table
        embeds = torch.cat([embeds, soft_token[:, None]], dim=1)
    return torch.cat(states)


def plain_embeddings(states: Tensor, pooling: str) -> Tensor:
    """Return z_1..z_K (K, hidden) of h_0..h_K."""
    steps = states[1:]
    if pooling == "mean":
        steps = steps.cumsum(0) / torch.arange(1, len(steps) + 1)[:, None]
    return steps / steps.norm(dim=-1, keepdim=True)
