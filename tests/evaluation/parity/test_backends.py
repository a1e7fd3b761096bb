"""The PyTorch reference is the plain loop."""

import numpy as np
import torch
from support.reference_loop import plain_states
from support.small_models import SmallModels
from support.tolerances import PROBE_MAX_DIFFERENCE

from gircse.evaluation.parity.backends import token_count
from gircse.evaluation.parity.step_trace import StepTrace
from gircse.runtime.bundle import Bundle
from gircse.runtime.manifest import Pooling
from gircse.runtime.numerics import l2_normalize, pool_states


def test_reference_is_the_plain_loop(
    small_models: SmallModels, token_ids: list[list[int]], reference: tuple[np.ndarray, StepTrace]
) -> None:
    vectors, trace = reference
    model = small_models.load("llama")
    for row in (0, 7, 23):
        states = plain_states(model, token_ids[row], 5)
        np.testing.assert_allclose(trace.states[row], states, atol=PROBE_MAX_DIFFERENCE)
        probabilities = torch.softmax(model.lm_head(states[:-1]), dim=-1)
        entropy = torch.distributions.Categorical(probs=probabilities).entropy()
        np.testing.assert_allclose(trace.stats.entropy[row], entropy.detach(), atol=PROBE_MAX_DIFFERENCE)
        soft_tokens = (probabilities @ model.get_input_embeddings().weight).detach()
        np.testing.assert_allclose(trace.soft_tokens[row], soft_tokens, atol=PROBE_MAX_DIFFERENCE)
        # 520 rows, more than the tokenizer has tokens
        padded = probabilities[:, token_count(Bundle.open(small_models.bundle("llama"))) :].sum(1).detach()
        assert padded.min() > 0.001
        np.testing.assert_allclose(trace.stats.padded_mass[row], padded, atol=PROBE_MAX_DIFFERENCE)
    np.testing.assert_allclose(vectors, l2_normalize(pool_states(trace.states, Pooling.MEAN)), atol=1e-7)
