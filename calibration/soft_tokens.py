"""The first pass of a calibration: the soft tokens of every text, and the tail of the softmax that makes them.

The tail is the mean embedding of the tokens outside the top-k ones, weighted by probability. Their probabilities are
summed up over all texts and steps, so E is read once, a block of rows at a time.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from gircse.calibration.int8.scheme import TOP_K
from gircse.checkpoint.model_weights import ModelWeights
from gircse.checkpoint.reference import Reference, first_positions
from gircse.checkpoint.tensor_naming import EMBEDDING_TABLE
from gircse.runtime.errors import CheckpointError
from gircse.runtime.tokenization import TokenBatch


@dataclass(frozen=True)
class SoftTokens:
    """What the first pass found, on the CPU.

    Attributes:
        soft_tokens: (texts, K, hidden), s_1..s_K, in the type of the model.
        states: (texts, K, hidden), h_0..h_{K-1}, which the vocabulary projection reads.
        tail: (hidden,) float32; zeros without steps.
    """

    soft_tokens: Tensor
    states: Tensor
    tail: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """Return the fields by name, for ``read``."""
        return vars(self).copy()

    @classmethod
    def read(cls, tensor: Callable[[str], Tensor]) -> Self:
        """Return what ``tensors`` gave away."""
        return cls(tensor("soft_tokens"), tensor("states"), tensor("tail"))


def make_soft_tokens(
    reference: Reference,
    weights: ModelWeights,
    batches: Sequence[TokenBatch],
    *,
    steps: int,
    temperature: float,
    advance: Callable[[float], None],
) -> SoftTokens:
    """Run the refinement of all texts.

    Args:
        reference: whole or streamed.
        weights: of its checkpoint.
        batches: prompts, which together hold the texts 0..n-1.
        steps: K.
        temperature: T.
        advance: told amounts that add up to the number of texts.

    Raises:
        CheckpointError: a state is NaN or infinite.
    """
    texts, config = sum(len(batch.rows) for batch in batches), reference.model.config
    found: dict[str, Tensor] = {}
    rest = torch.zeros(config.vocab_size, dtype=torch.float64)
    for state in reference.refine(batches, steps=steps, temperature=temperature, advance=advance) if steps else ():
        if not torch.isfinite(state.hidden).all():
            raise CheckpointError(
                f"h_{state.step}",
                f"has NaN or infinite values, in {str(state.hidden.dtype).removeprefix('torch.')}",
                None,
                "The checkpoint or the adapter is damaged: download it again. Or its values are too large for --dtype: "
                "use fp32.",
            )
        rows = list(batches[state.batch].rows)
        if not found:
            shape = (texts, steps, state.hidden.shape[1])
            found = {name: torch.empty(shape, dtype=state.hidden.dtype) for name in ("soft_tokens", "states")}
        if state.step < steps:
            found["states"][rows, state.step] = state.hidden.cpu()
        if state.soft_token is not None and state.probabilities is not None:
            found["soft_tokens"][rows, state.step - 1] = state.soft_token.cpu()
            rest += rest_of(state.probabilities)
    empty = torch.empty(texts, 0, config.hidden_size)
    return SoftTokens(
        found.get("soft_tokens", empty), found.get("states", empty), _mean_embedding(rest, weights, config.hidden_size)
    )


def rest_of(probabilities: Tensor) -> Tensor:
    """Return the probability (vocab,) float64 of every token where it is not a top-k one, summed over a batch."""
    top = probabilities.topk(min(TOP_K, probabilities.shape[1])).indices
    return probabilities.scatter(1, top, 0.0).double().sum(0).cpu()


def _mean_embedding(mass: Tensor, weights: ModelWeights, hidden_size: int) -> Tensor:
    total, start = torch.zeros(hidden_size, dtype=torch.float64), 0
    for block in weights.blocks(EMBEDDING_TABLE) if mass.any() else ():
        total += mass[start : start + len(block)] @ block.double()
        start += len(block)
    return (total / mass.sum().clamp(min=1e-300)).float()


def prompts_and_soft_tokens(
    batch: TokenBatch, embeddings: Tensor, soft_tokens: Tensor, device: torch.device
) -> Mapping[str, Tensor]:
    """Return the inputs of a forward pass that reads the prompts, and after them their soft tokens, all at once.

    Args:
        batch: n prompts.
        embeddings: (n, tokens, hidden), of the prompts.
        soft_tokens: (n, K, hidden).
        device: of the inputs.
    """
    real = torch.from_numpy(batch.attention_mask)
    mask = torch.cat([real, real.new_ones(len(real), soft_tokens.shape[1])], dim=1).to(device)
    return {
        "inputs_embeds": torch.cat([embeddings, soft_tokens.to(embeddings)], dim=1),
        "attention_mask": mask,
        "position_ids": first_positions(mask),
    }
