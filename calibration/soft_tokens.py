"""The first pass of a calibration: the soft tokens of every text, and the tail of the softmax that makes them.

The tail is the mean embedding of the tokens outside the top-k ones, weighted by probability. Their probabilities are
summed up over all texts and steps, so E is read once, a block of rows at a time.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gircse.calibration.int8.scheme import TOP_K
from gircse.calibration.resume import ResumeFolder
from gircse.checkpoint.model_weights import ModelWeights
from gircse.checkpoint.reference import Reference, first_positions
from gircse.checkpoint.tensor_naming import EMBEDDING_TABLE
from gircse.runtime.batch_planner import TokenBatch
from gircse.runtime.errors import CheckpointError

_OF_STEPS = ("soft_tokens", "states")


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


def unfinished_batches(folder: ResumeFolder, batches: Sequence[TokenBatch], *, steps: int) -> list[int]:
    """Return the numbers of the batches whose soft tokens a folder does not have; none without steps."""
    return [index for index in range(len(batches)) if steps and folder.facts(_part(index)) is None]


def make_soft_tokens(
    reference: Reference,
    batches: Sequence[TokenBatch],
    *,
    steps: int,
    temperature: float,
    folder: ResumeFolder,
    advance: Callable[[float], None],
) -> None:
    """Run the refinement of the batches that the folder does not have yet.

    Args:
        reference: whole or streamed.
        batches: prompts, which together hold the texts 0..n-1.
        steps: K.
        temperature: T.
        folder: takes what is found of a batch when its last step is done.
        advance: told amounts that add up to the number of texts.

    Raises:
        CheckpointError: a state is NaN or infinite.
        OSError: the folder cannot be written.
    """
    left = unfinished_batches(folder, batches, steps=steps)
    advance(sum(len(batch.rows) for index, batch in enumerate(batches) if index not in left))
    run = [batches[index] for index in left]
    found: dict[int, dict[str, Tensor]] = {}
    for state in reference.refine(run, steps=steps, temperature=temperature, advance=advance) if run else ():
        if not torch.isfinite(state.hidden).all():
            raise CheckpointError(
                f"h_{state.step}",
                f"has NaN or infinite values, in {str(state.hidden.dtype).removeprefix('torch.')}",
                None,
                "The checkpoint or the adapter is damaged: download it again. Or its values are too large for --dtype: "
                "use fp32.",
            )
        if state.batch not in found:
            texts, hidden = state.hidden.shape
            found[state.batch] = {
                **{name: torch.empty(texts, steps, hidden, dtype=state.hidden.dtype) for name in _OF_STEPS},
                "rest": torch.zeros(reference.model.config.vocab_size, dtype=torch.float64),
            }
        tensors = found[state.batch]
        if state.step < steps:
            tensors["states"][:, state.step] = state.hidden.cpu()
        if state.soft_token is not None and state.probabilities is not None:
            tensors["soft_tokens"][:, state.step - 1] = state.soft_token.cpu()
            tensors["rest"] += rest_of(state.probabilities)
        if state.step == steps:
            folder.save(_part(left[state.batch]), found.pop(state.batch))


def gather_soft_tokens(
    folder: ResumeFolder, weights: ModelWeights, batches: Sequence[TokenBatch], *, steps: int
) -> SoftTokens:
    """Return what ``make_soft_tokens`` left in a folder, of all texts."""
    texts, (_, hidden) = sum(len(batch.rows) for batch in batches), weights.shape(EMBEDDING_TABLE) or (0, 0)
    if not steps:
        nothing = torch.empty(texts, 0, hidden)
        return SoftTokens(nothing, nothing, torch.zeros(hidden))
    parts = [
        {name: folder.tensor(_part(index), name) for name in (*_OF_STEPS, "rest")} for index in range(len(batches))
    ]
    order = torch.tensor([row for batch in batches for row in batch.rows]).argsort()
    soft_tokens, states = (torch.cat([part[name] for part in parts])[order] for name in _OF_STEPS)
    rest = torch.stack([part["rest"] for part in parts]).sum(0)
    return SoftTokens(soft_tokens, states, _mean_embedding(rest, weights, hidden))


def _part(batch: int) -> str:
    return f"soft-tokens-{batch}"


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
