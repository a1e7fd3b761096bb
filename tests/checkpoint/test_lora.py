"""Plain LoRA is matched to the weights that it changes; every other kind is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from gircse.checkpoint.lora import LoraAdapter
from gircse.runtime.errors import CheckpointError

STEM = "base_model.model.model.layers.0.self_attn.q_proj"
CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
PAIR = (f"{STEM}.lora_A.weight", f"{STEM}.lora_B.weight")


def write_adapter(directory: Path, names: tuple[str, ...] = PAIR, **config: Any) -> Path:
    (directory / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    save_file({name: torch.zeros(4, 4) for name in names}, directory / "adapter_model.safetensors")
    return directory


@pytest.mark.parametrize(
    ("config", "scaling"),
    [
        ({}, 2.0),
        ({"use_rslora": True}, 4.0),
        ({"rank_pattern": {"q_proj": 2}}, 4.0),
        ({"alpha_pattern": {r"layers\.0\.self_attn\.q_proj": 2}}, 0.5),
        ({"rank_pattern": {"proj": 2}}, 2.0),  # the whole last part of a name has to match
    ],
)
def test_scaling_of_a_pair(tmp_path: Path, config: dict[str, Any], scaling: float) -> None:
    adapter = LoraAdapter(write_adapter(tmp_path, **config))
    ((name, pair),) = adapter.pairs.items()
    assert name == "model.layers.0.self_attn.q_proj.weight"
    assert (pair.a, pair.b, pair.scaling) == (*PAIR, scaling)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"use_dora": True, "bias": "all"},
            r"has use_dora True, bias 'all'; only plain LoRA can be merged\. Merge the",
        ),
        ({"peft_type": "LOHA"}, r"has peft_type 'LOHA'; "),
        ({"r": None}, r"has no number for r or lora_alpha; "),
    ],
)
def test_other_kinds_are_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"adapter_config\.json {message}"):
        LoraAdapter(write_adapter(tmp_path, **config))


@pytest.mark.parametrize("names", [PAIR[:1], (*PAIR, f"{STEM}.lora_magnitude_vector"), ("lm_head.weight",)])
def test_tensors_without_a_partner_are_refused(tmp_path: Path, names: tuple[str, ...]) -> None:
    with pytest.raises(
        CheckpointError, match=r"^--adapter .* holds a tensor .*; only pairs of lora_A\.weight and lora_B"
    ):
        LoraAdapter(write_adapter(tmp_path, names))


def test_an_empty_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^--adapter .* holds no tensors\. Train or download"):
        LoraAdapter(write_adapter(tmp_path, ()))
