"""The PyTorch reference is the plain loop."""

import numpy as np
import pytest
import torch
from support.reference_loop import plain_states
from support.small_models import SmallModels
from support.tolerances import PROBE_MAX_DIFFERENCE

from gircse.checkpoint.model_config import read_model_config
from gircse.checkpoint.model_weights import ModelWeights
from gircse.checkpoint.reference_choice import ReferenceOptions
from gircse.checkpoint.source import Checkpoint
from gircse.checkpoint.streamed_model import StreamedModel
from gircse.checkpoint.streamed_reference import StreamedReference
from gircse.evaluation.parity.backends import TorchBackend, token_count
from gircse.evaluation.parity.references import source_checkpoint
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


@pytest.mark.parametrize("group_bytes", [1, 1 << 30])
def test_a_streamed_reference_gives_the_same(
    small_models: SmallModels,
    token_ids: list[list[int]],
    reference: tuple[np.ndarray, StepTrace],
    monkeypatch: pytest.MonkeyPatch,
    group_bytes: int,
) -> None:
    """Its states come step by step and not batch by batch; task prompts, which go with the texts, are not traced."""

    def open_streamed(checkpoint: Checkpoint, _: ReferenceOptions, *, steps: int) -> StreamedReference:
        config = read_model_config(checkpoint.directory)
        weights = ModelWeights.open(checkpoint, config, steps=steps, allow_partial_adapter=True)
        return StreamedReference(StreamedModel(config, weights), group_bytes=group_bytes)

    monkeypatch.setattr("gircse.evaluation.parity.backends.open_reference", open_streamed)
    opened = Bundle.open(small_models.bundle("llama"))
    checkpoint = source_checkpoint(opened.manifest, model=str(small_models.checkpoint("llama")))
    backend = TorchBackend(opened, checkpoint, ReferenceOptions(), threads=2)
    texts, prompts = token_ids[:14], token_ids[14:]
    done: list[float] = []
    vectors, trace = backend.embed_and_trace(texts, done.append, more=prompts)
    assert sum(done) == pytest.approx(len(token_ids))
    np.testing.assert_allclose(vectors, reference[0], atol=PROBE_MAX_DIFFERENCE)  # other batches, other sums
    for name in ("states", "soft_tokens"):
        ours, theirs = getattr(trace, name), getattr(reference[1], name)
        np.testing.assert_allclose(ours, theirs[: len(texts)], atol=PROBE_MAX_DIFFERENCE)
    np.testing.assert_allclose(trace.stats.entropy, reference[1].stats.entropy[:14], atol=PROBE_MAX_DIFFERENCE)
