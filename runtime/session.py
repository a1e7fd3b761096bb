"""What every session gives, whatever computes it."""

from typing import NamedTuple, Protocol

from gircse.runtime.manifest import Pooling
from gircse.runtime.numerics import Float32, Int64, l2_normalize, pool_states


class StepOutputs(NamedTuple):
    """What one run yields.

    Attributes:
        prompt_embedding: (batch, hidden) float32, h_0 normalized.
        step_embeddings: (batch, steps, hidden) float32, z_1..z_steps.
    """

    prompt_embedding: Float32
    step_embeddings: Float32

    @property
    def embedding(self) -> Float32:
        """(batch, hidden) float32: the last step, or h_0 where there is none."""
        return self.step_embeddings[:, -1] if self.step_embeddings.shape[1] else self.prompt_embedding


class Session(Protocol):
    """Runs a batch of prompts through the prompt pass and the first ``steps`` refinement steps."""

    def run(self, input_ids: Int64, attention_mask: Int64, *, steps: int) -> StepOutputs:
        """Embed one batch; (batch, tokens) int64 each."""

    def max_batch(self, tokens: int) -> int | None:
        """Return how many texts of that many tokens one run takes at most; None if there is no limit."""

    def close(self) -> None:
        """Free what the session holds; closing twice does nothing, and a run afterwards is an error."""


def step_outputs(states: Float32, pooling: Pooling) -> StepOutputs:
    """Pool and normalize the states h_0..h_steps, (batch, steps + 1, hidden) float32."""
    vectors = l2_normalize(pool_states(states, pooling))
    return StepOutputs(vectors[:, 0], vectors[:, 1:])
