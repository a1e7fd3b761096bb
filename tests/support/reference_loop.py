"""GIRCSE in plain torch: no KV cache, no padding, no mask, one text at a time. Imports nothing of ours."""

import torch
from torch import Tensor


@torch.no_grad()
def plain_states(model, token_ids: list[int], steps: int, temperature: float = 1.0) -> Tensor:  # noqa: ANN001
    """Return h_0..h_K of one text, (K + 1, hidden)."""
    embedding = model.get_input_embeddings()  # a module: Gemma's multiplies the rows
    embeds = embedding(torch.tensor([token_ids]))
    states = []
    for _ in range(steps + 1):
        output = model(inputs_embeds=embeds, use_cache=False, output_hidden_states=True)
        states.append(output.hidden_states[-1][:, -1])  # after the final norm
        soft_token = torch.softmax(output.logits[:, -1] / temperature, dim=-1) @ embedding.weight
        embeds = torch.cat([embeds, soft_token[:, None]], dim=1)
    return torch.cat(states)


def plain_embeddings(states: Tensor, pooling: str) -> Tensor:
    """Return z_1..z_K (K, hidden) of h_0..h_K."""
    steps = states[1:]
    if pooling == "mean":
        steps = steps.cumsum(0) / torch.arange(1, len(steps) + 1)[:, None]
    return steps / steps.norm(dim=-1, keepdim=True)
