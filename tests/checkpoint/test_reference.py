"""The refinement loop feeds what its formula says, whatever the padding, and takes other weights of the embeddings."""

import torch
from support.reference_loop import plain_states
from support.small_models import SmallModels
from support.tolerances import REFERENCE_MAX_DIFFERENCE
from support.vectors import PROMPTS, STEPS, padded

from gircse.checkpoint.reference import refine, step_states
from gircse.runtime.numerics import l2_normalize


def test_states_match_plain_torch_whatever_the_padding(small_models: SmallModels) -> None:
    model = small_models.load("qwen3")
    wanted = torch.stack([plain_states(model, prompt, STEPS, 0.5) for prompt in PROMPTS])
    for extra in (0, 7):
        ids, mask = map(torch.from_numpy, padded(PROMPTS, left=True, extra=extra))
        states = step_states(model, ids, mask, steps=STEPS, temperature=0.5)
        assert states.shape == wanted.shape
        difference = l2_normalize(states.numpy()) - l2_normalize(wanted.numpy())
        assert abs(difference).max() < REFERENCE_MAX_DIFFERENCE


def test_every_step_is_fed_the_expected_embedding(small_models: SmallModels) -> None:
    model = small_models.load("llama")
    ids, mask = map(torch.from_numpy, padded(PROMPTS, left=True))
    prompt, *steps = refine(model, ids, mask, steps=2, temperature=1.0)
    assert prompt.probabilities is None
    assert prompt.soft_token is None
    for state in steps:
        torch.testing.assert_close(state.probabilities.sum(1), torch.ones(len(PROMPTS)))
        expected = state.probabilities.clone() @ model.get_input_embeddings().weight.detach()
        torch.testing.assert_close(state.soft_token, expected)


def test_other_weights_of_the_rows_are_fed(small_models: SmallModels) -> None:
    model = small_models.load("llama")
    ids, mask = map(torch.from_numpy, padded(PROMPTS, left=True))
    rest = torch.randn(len(PROMPTS), 48)

    def first_token(probabilities: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.eye(1, probabilities.shape[1]).expand(len(probabilities), -1), rest

    _, state = refine(model, ids, mask, steps=1, temperature=1.0, reweight=first_token)
    torch.testing.assert_close(state.soft_token, model.get_input_embeddings().weight[:1] + rest)
