"""The probe sees what the runtime computes, and feeds the soft tokens that it is given."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.small_models import SmallModels
from support.tolerances import CONTROL_MIN_DIFFERENCE, PROBE_MAX_DIFFERENCE, SMALL_MODEL_MAX_DIFFERENCE

from gircse.evaluation.parity.backends import BundleBackend
from gircse.evaluation.parity.graph_probe import GraphProbe
from gircse.evaluation.parity.step_trace import StepTrace
from gircse.runtime import BundleError, ProviderError
from gircse.runtime.bundle import Bundle
from gircse.runtime.manifest import Layout, Pooling
from gircse.runtime.numerics import l2_normalize, pool_states


@pytest.mark.parametrize("layout", Layout)
def test_probe_sees_what_the_runtime_computes(
    small_models: SmallModels,
    token_ids: list[list[int]],
    reference: tuple[np.ndarray, StepTrace],
    layout: Layout,
) -> None:
    backend = BundleBackend(Bundle.open(small_models.bundle("llama", layout=layout)), "fp32", threads=2)
    vectors, trace = backend.embed_and_trace(token_ids, lambda _: None)
    np.testing.assert_allclose(l2_normalize(pool_states(trace.states, Pooling.MEAN)), vectors, atol=1e-6)
    np.testing.assert_allclose(vectors, reference[0], atol=SMALL_MODEL_MAX_DIFFERENCE)
    for name in ("states", "soft_tokens"):
        np.testing.assert_allclose(getattr(trace, name), getattr(reference[1], name), atol=PROBE_MAX_DIFFERENCE)
    for name in ("entropy", "top1_mass", "padded_mass", "norm"):
        ours, theirs = (getattr(stats, name) for stats in (trace.stats, reference[1].stats))
        np.testing.assert_allclose(ours, theirs, atol=PROBE_MAX_DIFFERENCE)


@pytest.mark.parametrize("layout", Layout)
def test_teacher_forcing_feeds_the_given_soft_tokens(
    small_models: SmallModels, token_ids: list[list[int]], reference: tuple[np.ndarray, StepTrace], layout: Layout
) -> None:
    probe = GraphProbe(Bundle.open(small_models.bundle("llama", layout=layout)), "fp32", threads=2)
    given = np.roll(reference[1].soft_tokens, 1, axis=0)  # each text gets another one's
    states = np.empty_like(reference[1].states)
    for values in probe.refine(token_ids, forced=given, advance=lambda _: None):
        states[values.rows, values.step] = values.state
    assert np.abs(states[:, 1:] - reference[1].states[:, 1:]).max() > CONTROL_MIN_DIFFERENCE
    model = small_models.load("llama")
    table = model.get_input_embeddings().weight
    for row in (3, 11):
        embeds = torch.cat([table[torch.tensor([token_ids[row]])], torch.from_numpy(given[row : row + 1])], dim=1)
        with torch.no_grad():
            wanted = model.model(inputs_embeds=embeds, use_cache=False).last_hidden_state[0, -6:]
        np.testing.assert_allclose(states[row], wanted, atol=PROBE_MAX_DIFFERENCE)


def test_probe_refuses_graphs_without_names(bundle_copy: Path) -> None:
    path = bundle_copy / "fp32" / "model.onnx"
    path.write_bytes(path.read_bytes().replace(b"step1/soft_token", b"step1/soft_tokem"))
    with pytest.raises(BundleError, match=r"has no value step1/soft_token; .* Export the bundle again"):
        GraphProbe(Bundle.open(bundle_copy), "fp32", threads=1)


@pytest.mark.parametrize("layout", Layout)
def test_what_fails_in_a_run_is_an_error_of_ours(small_models: SmallModels, layout: Layout) -> None:
    probe = GraphProbe(Bundle.open(small_models.bundle("llama", layout=layout)), "fp32", threads=2)
    values = probe.refine([[1, 10**6]], advance=lambda _: None)  # the second is outside the vocabulary
    with pytest.raises(ProviderError, match=r"^ONNX Runtime failed in a batch of 1 texts of 2 tokens: "):
        list(values)
