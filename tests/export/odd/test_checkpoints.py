"""Checkpoints as people publish them: other names, other files, missing or surplus parts."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.odd_models import OddModel, edit_json, edit_tensors, odd_model, refused, rename_tensors
from support.small_models import SmallModels

TIED, UNTIED = "qwen2", "mistral-linear"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

PICTURE = {"vision_tower.patch.weight": torch.ones(3), "multi_modal_projector.weight": torch.ones(3)}

RENAMED: dict[str, list[tuple[str, str]]] = {
    "AutoModel's": [(r"^model\.", "")],
    "torch.compile": [(r"^", "_orig_mod.")],
    "torch.compile of each layer": [(r"layers\.(\d+)\.", r"layers.\1._orig_mod.")],
    "FSDP": [(r"layers\.(\d+)\.", r"layers.\1._fsdp_wrapped_module.")],
    "DataParallel": [(r"^", "module.")],
    "AutoModel's, compiled": [(r"^model\.", ""), (r"^", "_orig_mod.")],
    "a multimodal model": [(r"^model\.", "model.language_model.")],
    "an older multimodal model": [(r"^", "language_model.")],
    "a multimodal model without heads": [(r"^model\.", "language_model.")],
}


@pytest.mark.parametrize("renames", RENAMED.values(), ids=RENAMED)
@pytest.mark.parametrize("name", [TIED, UNTIED])
def test_other_names(small_models: SmallModels, tmp_path: Path, name: str, renames: list[tuple[str, str]]) -> None:
    odd = odd_model(small_models, tmp_path, name)
    for pattern, replacement in renames:
        rename_tensors(odd.model / WEIGHTS, pattern, replacement)
    if "language_model" in renames[0][1]:
        edit_tensors(odd.model / WEIGHTS, lambda tensors: tensors.update(PICTURE))
    odd.check(odd.export(tmp_path / "out"))


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
@pytest.mark.parametrize("adapter", [{}, {"target_modules": ["q_proj", "down_proj"]}], ids=["bare", "adapted"])
def test_the_text_part_of_a_multimodal_model(
    small_models: SmallModels, tmp_path: Path, prefix: str, adapter: dict[str, Any]
) -> None:
    odd = odd_model(small_models, tmp_path, "gemma3", **adapter)
    text = json.loads((odd.model / "config.json").read_text())
    (odd.model / "config.json").write_text(
        json.dumps(
            {"model_type": "gemma3", "text_config": text, "vision_config": {"model_type": "siglip_vision_model"}}
        )
    )
    rename_tensors(odd.model / WEIGHTS, r"^model\.", prefix)
    edit_tensors(odd.model / WEIGHTS, lambda tensors: tensors.update(PICTURE))
    if odd.adapter is not None:  # as PEFT saves it for the multimodal model
        name = r"base_model.model.model.language_model."
        rename_tensors(odd.adapter / "adapter_model.safetensors", r"^base_model\.model\.model\.", name)
    odd.check(odd.export(tmp_path / "out"))


def without_head(odd: OddModel) -> None:
    edit_tensors(odd.model / WEIGHTS, lambda tensors: tensors.pop("lm_head.weight"))
    rename_tensors(odd.model / WEIGHTS, r"^model\.", "")


def test_without_a_head_there_are_no_steps(small_models: SmallModels, tmp_path: Path) -> None:
    odd = odd_model(small_models, tmp_path, UNTIED)
    without_head(odd)
    refused(odd, tmp_path, r"has no tensor lm_head\.weight, which refinement steps read; .* export .* with --steps 0")
    odd.check(odd.export(tmp_path / "out", steps=0), steps=0)


def test_a_tied_model_needs_no_head(small_models: SmallModels, tmp_path: Path) -> None:
    odd = odd_model(small_models, tmp_path, TIED)
    rename_tensors(odd.model / WEIGHTS, r"^model\.embed_tokens\.", "lm_head.")  # the table under its other name
    odd.check(odd.export(tmp_path / "out"))


@pytest.mark.parametrize("differ", [False, True], ids=["the same", "different"])
def test_a_tied_model_with_both(small_models: SmallModels, tmp_path: Path, differ: bool) -> None:
    """Hugging Face does not tie what is stored with different values."""
    odd = odd_model(small_models, tmp_path, TIED)
    path = odd.model / WEIGHTS
    edit_tensors(path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].flip(0 if differ else ())}))
    if differ:
        edit_json(odd.model / "config.json", tie_word_embeddings=False)
        odd.truth = type(odd.truth).from_pretrained(odd.model, dtype=torch.float32).eval()
        edit_json(odd.model / "config.json", tie_word_embeddings=True)
    odd.check(odd.export(tmp_path / "out"))


def add_stale_index(folder: Path) -> None:
    stale = {"model.norm.weight": torch.zeros(48)}
    save_file(stale, folder / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    weight_map = dict.fromkeys(stale, "model-00001-of-00001.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def shard(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    weight_map = {}
    for number, name in enumerate(tensors):
        weight_map[name] = f"model-{number % 3:05}-of-00003.safetensors"
    for file in set(weight_map.values()):
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, folder / file, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def add_frequencies(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)


def bystander(name: str) -> Callable[[Path], Any]:
    return lambda folder: save_file({"model.norm.weight": torch.zeros(48)}, folder / name)


FILES: dict[str, tuple[list[Callable[[Path], Any]], str]] = {
    "a stale index": ([add_stale_index], f"ignored, as by Hugging Face: model-00001-of-00001.safetensors, {INDEX}"),
    "Mistral's own file": ([bystander("consolidated.safetensors")], "ignored, as by Hugging Face: consolidated"),
    "an optimizer": ([bystander("optimizer.safetensors")], "ignored, as by Hugging Face: optimizer.safetensors"),
    "shards and an optimizer": ([shard, bystander("optimizer.safetensors")], "optimizer.safetensors"),
    "pickles beside": ([lambda folder: (folder / "pytorch_model.bin").write_bytes(b"pickle")], ""),
    "rotary frequencies": ([lambda folder: edit_tensors(folder / WEIGHTS, add_frequencies)], ""),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "said"), FILES.values(), ids=FILES)
def test_files_are_chosen_as_hugging_face_does(
    small_models: SmallModels,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: list[Callable[[Path], Any]],
    said: str,
) -> None:
    odd = odd_model(small_models, tmp_path, UNTIED)
    for change in changes:
        change(odd.model)
    odd.check(odd.export(tmp_path / "out"))
    assert said in capsys.readouterr().err


def both_names(tensors: dict[str, torch.Tensor]) -> None:
    tensors["_orig_mod.model.norm.weight"] = tensors["model.norm.weight"] + 1


def double(folder: Path) -> None:
    shard(folder)
    path = folder / "model-00001-of-00003.safetensors"
    other = load_file(folder / "model-00002-of-00003.safetensors")
    name = min(other)
    edit_tensors(path, lambda tensors: tensors.update({name: other[name] + 1}))


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "only Mistral's own file": (
        lambda folder: (folder / WEIGHTS).rename(folder / "consolidated.safetensors"),
        r"has consolidated\.safetensors, but neither model\.safetensors nor model\.safetensors\.index\.json"),
    "weights named by the config": (
        lambda folder: edit_json(folder / "config.json", transformers_weights="other.safetensors"),
        r"names a file of weights of its own, transformers_weights 'other\.safetensors'"),
    "one tensor under two names": (
        lambda folder: edit_tensors(folder / WEIGHTS, both_names), r"holds model\.norm\.weight twice, as"),
    "one tensor in two shards": (double, r"holds .*; model-0000.-of-00003\.safetensors does too"),
    "an unmerged adapter": (
        lambda folder: rename_tensors(folder / WEIGHTS, r"q_proj\.weight", "q_proj.base_layer.weight"),
        r"has a tensor .*q_proj\.base_layer\.weight \(2 such\) that has no place"),
    "a layer too few": (
        lambda folder: edit_json(folder / "config.json", num_hidden_layers=3), r"has no tensor model\.layers\.2\."),
    "a layer too many": (
        lambda folder: edit_json(folder / "config.json", num_hidden_layers=1),
        r"has a tensor model\.layers\.1\..* that has no place"),
    "another width": (
        lambda folder: edit_json(folder / "config.json", intermediate_size=96), r"of shape .*; config\.json says"),
    "another model's names": (
        lambda folder: rename_tensors(folder / WEIGHTS, r"^model\.layers", "transformer.h"),
        r"has a tensor transformer\.h\."),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_checkpoints_that_are_refused(
    small_models: SmallModels, tmp_path: Path, change: Callable[[Path], Any], message: str
) -> None:
    odd = odd_model(small_models, tmp_path, UNTIED)
    change(odd.model)
    refused(odd, tmp_path, message)


def test_two_folders_one_manifest(small_models: SmallModels, tmp_path: Path) -> None:
    """Nothing in a bundle tells where it was made."""
    manifests = []
    for folder in ("here", "there"):
        odd = odd_model(small_models, tmp_path / folder, TIED, target_modules=["q_proj"])
        manifests.append((odd.export(tmp_path / f"out-{folder}") / "gircse.json").read_text())
        shutil.rmtree(tmp_path / folder)
    assert manifests[0] == manifests[1]
    assert str(tmp_path) not in manifests[0]
