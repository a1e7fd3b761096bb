"""What can be exported, and the limits that a config sets."""

import pytest
from support.small_models import SmallModels
from transformers import AutoConfig

from gircse.export.graph.architecture import check_limits, decoder_shape
from gircse.runtime.errors import ExportError, OptionError


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


def test_quantized_checkpoints_are_refused(small_models: SmallModels) -> None:
    config = AutoConfig.from_pretrained(small_models.checkpoint("llama"))
    config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(ExportError, match="weights are quantized"):
        decoder_shape(config)
