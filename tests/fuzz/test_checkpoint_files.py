"""Damaged files of a checkpoint: what PyTorch computes with them is what is exported, or there is one clear error."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.damage import damaged_document, damaged_safetensors
from support.outcomes import result_or_error
from support.small_models import SmallModels

from gircse.export.exporter import export_bundle
from gircse.export.model_source import open_source
from gircse.export.options import ExportOptions
from gircse.runtime import Embedder
from gircse.runtime.provider import Provider

Damages = Callable[[bytes], st.SearchStrategy[bytes]]

INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "somewhere/else",
    "r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.05,
    "target_modules": ["q_proj", "down_proj"],
    "rank_pattern": {"q_proj": 4},
    "alpha_pattern": {"layers.0.self_attn.q_proj": 16},
    "bias": "none",
    "use_rslora": False,
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "inference_mode": True,
    "modules_to_save": None,
}


@pytest.fixture(scope="module")
def checkpoint(small_models: SmallModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with every file that is read."""
    directory = tmp_path_factory.mktemp("fuzz") / "checkpoint"
    shutil.copytree(small_models.checkpoint("qwen2"), directory)
    names = load_file(directory / "model.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "model.safetensors")}
    (directory / INDEX).write_text(json.dumps(index))
    eos = {"content": "</s>", "lstrip": False, "special": True}
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos, "model_max_length": 512}))
    return directory


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("fuzz") / "adapter"
    directory.mkdir()
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for layer in range(2):
        for module, (rows, columns) in {"self_attn.q_proj": (48, 48), "mlp.down_proj": (48, 80)}.items():
            stem = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(4, columns, generator=generator) * 0.1
            tensors[f"{stem}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) * 0.1
    save_file(tensors, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps(ADAPTER_CONFIG))
    return directory


def options(model: Path, output: Path, **others: Any) -> ExportOptions:
    return ExportOptions(output=output, model=str(model), steps=2, max_tokens=48, layout="stepwise", **others)


@pytest.mark.parametrize(
    ("name", "damages"),
    [
        ("config.json", damaged_document),
        ("tokenizer.json", damaged_document),
        ("tokenizer_config.json", damaged_document),
        (INDEX, damaged_document),
        ("model.safetensors", damaged_safetensors),
    ],
)
@given(data=st.data())
def test_a_checkpoint_before_its_trace(checkpoint: Path, name: str, damages: Damages, data: st.DataObject) -> None:
    path = checkpoint / name
    intact = path.read_bytes()
    path.write_bytes(data.draw(damages(intact)))
    try:
        source = result_or_error(lambda: open_source(options(checkpoint, checkpoint.parent / "bundle")))
        if source is not None:
            for tensor, stored in source.weights.base.entries.items():
                result_or_error(
                    lambda tensor=tensor, stored=stored: source.weights.base.read_rows(tensor).shape == stored.shape
                )
    finally:
        path.write_bytes(intact)


@settings(max_examples=settings.default.max_examples // 10)  # an export takes a second, its trace aside
@pytest.mark.parametrize(
    ("name", "damages"),
    [("adapter_config.json", damaged_document), ("adapter_model.safetensors", damaged_safetensors)],
)
@given(data=st.data())
def test_an_adapter(
    small_models: SmallModels,
    adapter: Path,
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    damages: Damages,
    data: st.DataObject,
) -> None:
    """The golden vectors of an export are those of the checkpoint as PEFT merges it."""
    path, output = adapter / name, tmp_path_factory.mktemp("export") / "bundle"
    intact = path.read_bytes()
    path.write_bytes(data.draw(damages(intact)))
    try:
        chosen = options(small_models.checkpoint("qwen2"), output, adapter=str(adapter))
        exported = result_or_error(lambda: export_bundle(chosen))
    finally:
        path.write_bytes(intact)
    assert len(list(output.parent.iterdir())) == (exported is not None)  # nothing half-written beside it
    if exported is not None:
        with Embedder(exported, threads=1, provider=Provider.CPU) as embedder:
            assert embedder.self_test().passed
