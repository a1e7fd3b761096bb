"""Streaming and merging of weights, and every way in which checkpoint, adapter and graph can disagree."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.reference_loop import plain_embeddings, plain_states
from support.small_models import SmallModels
from support.tolerances import CONTROL_MIN_DIFFERENCE, MERGE_MAX_DIFFERENCE, SMALL_MODEL_MAX_DIFFERENCE
from support.vectors import PROMPTS, run

from gircse.checkpoint import model_weights
from gircse.export.exporter import export_bundle
from gircse.export.options import ExportOptions
from gircse.runtime import CheckpointError

LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "init_lora_weights": False}
EVERYWHERE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_adapter(small_models: SmallModels, directory: Path, **options: Any) -> Path:
    torch.manual_seed(3)
    config = LoraConfig(**{**LORA, "target_modules": EVERYWHERE, **options})
    model = get_peft_model(small_models.load("qwen2"), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    model.save_pretrained(directory)
    return directory


def merged(small_models: SmallModels, adapter: Path) -> torch.nn.Module:
    return PeftModel.from_pretrained(small_models.load("qwen2"), adapter).merge_and_unload().eval()


def edit_tensors(path: Path, change: Any) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def export(tmp_path: Path, model: Path, adapter: Path | None = None) -> Path:
    options = ExportOptions(
        output=tmp_path / "out", steps=5, model=str(model), adapter=str(adapter) if adapter else None, max_tokens=48
    )
    return export_bundle(options)


def refused(tmp_path: Path, model: Path, adapter: Path | None = None) -> str:
    """Return the message of an export that must fail and leave nothing behind."""
    before = set(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError) as caught:
        export(tmp_path, model, adapter)
    assert set(tmp_path.rglob("*")) == before
    return str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"1.mlp.up_proj": 32}},
        {"layers_to_transform": [1], "target_modules": ["o_proj"]},
    ],
)
def test_merge_is_pefts_merge(small_models: SmallModels, tmp_path: Path, options: dict[str, Any]) -> None:
    adapter = make_adapter(small_models, tmp_path / "adapter", **options)
    model = merged(small_models, adapter)
    bundle = export(tmp_path, small_models.checkpoint("qwen2"), adapter)
    import onnx
    from onnx import numpy_helper

    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(bundle / "fp32/model.onnx").graph.initializer}
    base = small_models.load("qwen2").state_dict()
    changed = 0
    for name, weight in model.state_dict().items():
        if f"{name}.T" in stored:
            assert np.abs(stored[f"{name}.T"].T - weight.numpy()).max() < MERGE_MAX_DIFFERENCE
            changed += bool((weight != base[name]).any())
    assert changed == len(load_file(adapter / "adapter_model.safetensors")) // 2

    _, steps = run(bundle)
    wanted = torch.stack([plain_embeddings(plain_states(model, prompt, 5), "mean") for prompt in PROMPTS])
    assert np.abs(steps - wanted.numpy()).max() < SMALL_MODEL_MAX_DIFFERENCE
    without = torch.stack([plain_embeddings(plain_states(small_models.load("qwen2"), p, 5), "mean") for p in PROMPTS])
    assert np.abs(steps - without.numpy()).max() > CONTROL_MIN_DIFFERENCE  # control: the adapter matters


def test_blocks_of_rows_join_to_the_same_file(
    small_models: SmallModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = small_models.bundle("mistral-window") / "fp32" / "weights.bin"
    monkeypatch.setattr(model_weights, "BLOCK_ELEMENTS", 1000)  # 20 rows of the vocabulary at a time
    options = ExportOptions(
        output=tmp_path / "out", steps=5, model=str(small_models.checkpoint("mistral-window")), max_tokens=48
    )
    assert (export_bundle(options) / "fp32" / "weights.bin").read_bytes() == whole.read_bytes()


def test_shards_and_tied_name_do_not_matter(small_models: SmallModels, small_checkpoint: Path, tmp_path: Path) -> None:
    """Many shards, and the tied vocabulary stored as lm_head.weight, give the same weights."""
    tensors = load_file(small_checkpoint / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    (small_checkpoint / "model.safetensors").unlink()
    weight_map = {}
    for number, (name, tensor) in enumerate(tensors.items()):
        weight_map[name] = f"model-{number:05}.safetensors"
        save_file({name: tensor}, small_checkpoint / weight_map[name], metadata={"format": "pt"})
    (small_checkpoint / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    ours = export(tmp_path, small_checkpoint) / "fp32" / "weights.bin"
    assert ours.read_bytes() == (small_models.bundle("qwen2") / "fp32" / "weights.bin").read_bytes()

    (small_checkpoint / "model-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00003\.safetensors is missing; .* lists it\."):
        export_bundle(ExportOptions(output=tmp_path / "again", steps=5, model=str(small_checkpoint), max_tokens=48))


def test_truncated_shard(small_checkpoint: Path, tmp_path: Path) -> None:
    path = small_checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert "truncated or damaged" in refused(tmp_path, small_checkpoint)


def test_corrupt_header(small_checkpoint: Path, tmp_path: Path) -> None:
    path = small_checkpoint / "model.safetensors"
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])
    assert "truncated or damaged" in refused(tmp_path, small_checkpoint)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(small_checkpoint: Path, tmp_path: Path, value: float) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    edit_tensors(small_checkpoint / "model.safetensors", lambda t: t[name][3].fill_(value))
    assert f"has NaN or infinity in {name}" in refused(tmp_path, small_checkpoint)


def test_missing_left_over_and_misshapen_tensors(small_checkpoint: Path, tmp_path: Path) -> None:
    path = small_checkpoint / "model.safetensors"
    name = "model.layers.1.self_attn.q_proj.bias"
    whole = path.read_bytes()
    edit_tensors(path, lambda t: t.pop(name))
    assert f"has no tensor {name}" in refused(tmp_path, small_checkpoint)
    path.write_bytes(whole)
    edit_tensors(path, lambda t: t.update({"model.layers.2.mlp.down_proj.weight": torch.zeros(2, 2)}))
    assert "model.layers.2.mlp.down_proj.weight (1 such) that has no place" in refused(tmp_path, small_checkpoint)
    path.write_bytes(whole)
    edit_tensors(path, lambda t: t.update({name: torch.zeros(47)}))
    assert f"has {name} of shape [47]; config.json says [48]" in refused(tmp_path, small_checkpoint)
    path.write_bytes(whole)
    edit_tensors(path, lambda t: t.update({name: torch.zeros(48, dtype=torch.int8)}))
    assert f"holds {name} as I8" in refused(tmp_path, small_checkpoint)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.update({k.replace("layers.1", "layers.9"): t.pop(k) for k in list(t) if "layers.1" in k}),
         "adapts model.layers.9"),
        (lambda t: t.update({k: torch.ones(4, 47) for k in t if k.endswith("0.self_attn.q_proj.lora_A.weight")}),
         "model.layers.0.self_attn.q_proj: Error(s) in loading state_dict for PeftModel: size mismatch for base"),
        (lambda t: t.pop(min(k for k in t if "lora_B" in k)), "lacks model.layers.0.mlp.down_proj.lora_B.weight"),
        (lambda t: t.update({"base_model.model.model.embed_tokens.weight": torch.ones(2)}),
         "has model.embed_tokens.weight of shape [2]; the model has [520, 48]"),
        (lambda t: [t[k].zero_() for k in t if "1.mlp.up_proj.lora_B" in k],
         "leaves model.layers.1.mlp.up_proj.weight as it is"),
        (lambda t: [t[k].fill_(float("nan")) for k in t if "1.mlp.up_proj.lora_B" in k], "has NaN or infinity in"),
        (lambda t: t.clear(), "no tensors"),
    ],
)  # fmt: skip
def test_wrong_adapters(small_models: SmallModels, tmp_path: Path, change: Any, expected: str) -> None:
    adapter = make_adapter(small_models, tmp_path / "adapter")
    edit_tensors(adapter / "adapter_model.safetensors", change)
    assert expected in refused(tmp_path, small_models.checkpoint("qwen2"), adapter)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"use_dora": True}, "lacks model.layers.0.mlp.down_proj.lora_magnitude_vector"),
        ({"bias": "all"}, "bias 'all'"),
        ({"modules_to_save": ["lm_head"]}, "has no tensor lm_head.weight; modules_to_save of adapter_config.json"),
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"r": None}, "no number for r or lora_alpha"),
    ],
)
def test_adapters_of_another_kind(
    small_models: SmallModels, tmp_path: Path, change: dict[str, Any], expected: str
) -> None:
    adapter = make_adapter(small_models, tmp_path / "adapter")
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert expected in refused(tmp_path, small_models.checkpoint("qwen2"), adapter)
