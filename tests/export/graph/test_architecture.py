"""What can be exported, and the limits that a config sets."""

import pytest
from support.small_models import SmallModels
from transformers import AutoConfig

from gircse.export.graph.architecture import check_limits, decoder_shape
from gircse.runtime.errors import OptionError


@pytest.mark.parametrize(
    ("name", "change", "limits", "match"),
    [
        ("llama", {}, {"steps": 8, "max_tokens": 121}, r"129 positions; the model has 128\. .* 120 or less"),
        (
            "mistral-window",
            {},
            {"steps": 8, "max_tokens": 57},
            r"65 positions; .* window of the model holds 64\. .* 56 or less",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            {"steps": 8, "max_tokens": 64},
            None,
        ),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "dynamic",
                    "rope_theta": 1e4,
                    "factor": 2.0,
                    "original_max_position_embeddings": 32,
                }
            },
            {"steps": 8, "max_tokens": 64},
            r"rotary scaling 'dynamic' changes with the length beyond 32, .* 24 or less",
        ),
        ("gemma3", {}, {"steps": 8, "max_tokens": 57}, r"window of the model holds 64\. .* 56 or less"),
        ("phi3", {}, {"steps": 8, "max_tokens": 57}, r"window of the model holds 64\. .* 56 or less"),
        (
            "phi4-mini",
            {},
            {"steps": 8, "max_tokens": 57},
            r"rotary scaling 'longrope' changes with the length beyond 64, .* 56 or less",
        ),
        ("phi4-mini", {}, {"steps": 8, "max_tokens": 56}, None),
        (
            "gemma3",
            {
                "rope_parameters": {
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                    "full_attention": {
                        "rope_type": "dynamic",
                        "rope_theta": 1e4,
                        "factor": 2.0,
                        "original_max_position_embeddings": 32,
                    },
                }
            },
            {"steps": 8, "max_tokens": 50},
            r"rotary scaling 'dynamic' changes with the length beyond 32",
        ),
    ],
)
def test_limits(small_models: SmallModels, name: str, change: dict, limits: dict, match: str | None) -> None:
    config = AutoConfig.from_pretrained(small_models.checkpoint(name))
    config.update(change)
    if match is None:
        check_limits(config, **limits)
        return
    with pytest.raises(OptionError, match=match):
        check_limits(config, **limits)


def test_what_the_vocabulary_computes_comes_from_the_config(small_models: SmallModels) -> None:
    """Rows of Gemma's table are multiplied by the root of the width; its logits may be capped."""
    shapes = {
        name: decoder_shape(AutoConfig.from_pretrained(small_models.checkpoint(name)))
        for name in ("gemma3", "gemma3-softcap-linear", "phi3")
    }
    found = {name: (round(shape.embedding_scale**2), shape.logit_softcap) for name, shape in shapes.items()}
    assert found == {"gemma3": (48, None), "gemma3-softcap-linear": (48, 2.0), "phi3": (1, None)}
