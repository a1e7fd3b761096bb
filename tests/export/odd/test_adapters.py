"""Every kind of adapter that PEFT can merge gives PEFT's vectors; every other is refused by name, leaving nothing."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from support.odd_models import PROJECTIONS, edit_json, edit_tensors, odd_model, refused, rename_tensors
from support.small_models import SmallModels

TIED, UNTIED = "qwen2", "mistral-linear"
ATTENTION = ["q_proj", "o_proj"]


MERGED: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": (TIED, {}),
    "rank-stabilized, ranks and scalings by pattern": (
        TIED, {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 32}}),
    "DoRA": (UNTIED, {"use_dora": True}),
    "DoRA, ranks by pattern": (TIED, {"use_dora": True, "rank_pattern": {"down_proj": 2}, "use_rslora": True}),
    "bias of lora_B": (TIED, {"target_modules": ["q_proj", "k_proj", "v_proj"], "lora_bias": True}),
    "one layer": (TIED, {"layers_to_transform": [1], "target_modules": ["o_proj"]}),
    "layers by pattern": (TIED, {"layers_to_transform": [0], "layers_pattern": "layers"}),
    "targets as a regular expression": (TIED, {"target_modules": r".*\.layers\.1\.mlp\..*_proj"}),
    "all-linear": (UNTIED, {"target_modules": "all-linear", "exclude_modules": ["k_proj"]}),
    "embedding and lm_head": (UNTIED, {"target_modules": [*PROJECTIONS, "embed_tokens", "lm_head"]}),
    "DoRA on embedding and lm_head": (UNTIED, {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True}),
    "whole lm_head, embedding and norms": (
        UNTIED, {"modules_to_save": ["lm_head", "embed_tokens", "norm", "input_layernorm"]}),
    "whole lm_head of a tied model": (TIED, {"modules_to_save": ["lm_head"]}),
    "whole embedding of a tied model": (TIED, {"modules_to_save": ["embed_tokens"]}),
    "both of a tied model": (TIED, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "whole embedding that stays tied": (TIED, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "a whole projection": (UNTIED, {"target_modules": ATTENTION, "modules_to_save": ["down_proj"]}),
    "token rows": (UNTIED, {"trainable_token_indices": [17, 5, 300]}),
    "token rows of a tied model": (TIED, {"trainable_token_indices": [17, 5, 300]}),
    "token rows by name": (UNTIED, {"trainable_token_indices": {"embed_tokens": [5, 44]}}),
    "fan_in_fan_out set by mistake": (TIED, {"fan_in_fan_out": True}),
    "gaussian start": (TIED, {"init_lora_weights": "gaussian"}),
    "orthogonal start": (TIED, {"init_lora_weights": "orthogonal", "target_modules": ATTENTION}),
    "fused projections": ("phi3", {"target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]}),
    "Gemma, all-linear": ("gemma3", {"target_modules": "all-linear"}),
    "Gemma, norms and a tied embedding": (
        "gemma3", {"target_modules": ["q_proj"], "modules_to_save": ["q_norm", "norm", "embed_tokens"]}),
    "for feature extraction": (TIED, {"task_type": "FEATURE_EXTRACTION"}),
    "for the causal LM": (UNTIED, {"task_type": "CAUSAL_LM"}),
}  # fmt: skip


@pytest.mark.parametrize(("name", "config"), MERGED.values(), ids=MERGED)
def test_what_peft_merges(small_models: SmallModels, tmp_path: Path, name: str, config: dict[str, Any]) -> None:
    odd = odd_model(small_models, tmp_path, name, **config)
    odd.check(odd.export(tmp_path / "out"))


def only_layer_1(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if "layers.1." in name}


RENAMED = {
    "AutoModel": (r"^base_model\.model\.model\.", "base_model.model."),
    "without PEFT's prefix": (r"^base_model\.model\.", ""),
    "AutoModel, without PEFT's prefix": (r"^base_model\.model\.model\.", ""),
    "the adapter's name": (r"\.(lora_[AB])\.weight$", r".\1.default.weight"),
    "the adapter's own name": (r"\.(lora_[AB])\.weight$", r".\1.gircse_v2.weight"),
    "torch.compile": (r"^base_model\.model\.", "base_model.model._orig_mod."),
    "torch.compile of each layer": (r"layers\.(\d+)\.", r"layers.\1._orig_mod."),
    "FSDP": (r"layers\.(\d+)\.", r"layers.\1._fsdp_wrapped_module."),
    "DataParallel": (r"^base_model\.model\.", "base_model.model.module."),
    "a multimodal model": (r"^base_model\.model\.model\.", "base_model.model.model.language_model."),
    "an older multimodal model": (r"^base_model\.model\.", "base_model.model.language_model."),
}


@pytest.mark.parametrize(("pattern", "replacement"), RENAMED.values(), ids=RENAMED)
@pytest.mark.parametrize("name", [TIED, UNTIED])
def test_adapters_with_other_names(
    small_models: SmallModels, tmp_path: Path, name: str, pattern: str, replacement: str
) -> None:
    odd = odd_model(small_models, tmp_path, name, target_modules=PROJECTIONS)
    assert odd.adapter is not None
    rename_tensors(odd.adapter / "adapter_model.safetensors", pattern, replacement)
    odd.check(odd.export(tmp_path / "out"))


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "PiSSA, not converted": ({"init_lora_weights": "pissa"}, r"has init_lora_weights 'pissa'; .*Merge it with PEFT"),
    "PiSSA by iterations": ({"init_lora_weights": "pissa_niter_16"}, r"init_lora_weights 'pissa_niter_16'"),
    "OLoRA": ({"init_lora_weights": "olora"}, r"init_lora_weights 'olora'"),
    "LoftQ": ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, r"init_lora_weights 'loftq'"),
    "CorDA": ({"init_lora_weights": "corda", "corda_config": {"corda_method": "ipm"}}, r"corda_config .*'corda'"),
    "activated LoRA": ({"alora_invocation_tokens": [1, 2]}, r"has alora_invocation_tokens; an activated LoRA .*cannot"),
    "replicated layers": ({"layer_replication": [[0, 2], [1, 2]]}, r"has layer_replication \[\[0, 2\], \[1, 2\]\]"),
    "trained biases": ({"bias": "lora_only"}, r"has bias 'lora_only'"),
    "QA-LoRA": ({"use_qalora": True}, r"has use_qalora True"),
    "target parameters": ({"target_parameters": ["mlp.experts"]}, r"has target_parameters"),
    "a field of the future": ({"use_superlora": {"depth": 2}}, r"has use_superlora \{'depth': 2\}"),
    "IA3": ({"peft_type": "IA3"}, r"has peft_type 'IA3'; only LORA"),
    "no kind": ({"peft_type": ...}, r"has peft_type None"),
    "a scaling for another model's names": (
        {"alpha_pattern": {r"^layers\.1\.mlp\.up_proj": 64}}, r"has alpha_pattern for '\^layers.*', which is none of"),
    "a pattern that is none": ({"rank_pattern": {"(": 2}}, r"adapter_config\.json"),
    "no rank": ({"r": None}, r"has no number for r or lora_alpha"),
    "a rank of another adapter": ({"r": 8}, r"cannot be merged into .*size mismatch"),
    "an unreadable target": ({"target_modules": "layers.(["}, r"has targets that PEFT cannot read"),
    "no such module": ({"target_modules": ["query_key_value"]}, r"does not target it, so PEFT would ignore them"),
    "fewer targets than tensors": ({"target_modules": ["q_proj"]}, r"has tensors for .* does not target it"),
    "DoRA without magnitudes": ({"use_dora": True}, r"lacks .*lora_magnitude_vector"),
    "a whole module that is missing": ({"modules_to_save": ["lm_head"]}, r"has no tensor lm_head\.weight"),
    "token rows that are missing": ({"trainable_token_indices": [1]}, r"has no rows of the embedding"),
}  # fmt: skip


def test_modules_saved_under_the_adapters_name(small_models: SmallModels, tmp_path: Path) -> None:
    odd = odd_model(small_models, tmp_path, UNTIED, target_modules=ATTENTION, modules_to_save=["lm_head"])
    assert odd.adapter is not None
    name = r"base_model.model.lm_head.modules_to_save.default.weight"
    rename_tensors(odd.adapter / "adapter_model.safetensors", r"^base_model\.model\.lm_head\.weight$", name)
    odd.check(odd.export(tmp_path / "out"))


@pytest.mark.parametrize("name", [TIED, UNTIED])
def test_an_embedding_that_is_saved_along(small_models: SmallModels, tmp_path: Path, name: str) -> None:
    """With ``save_embedding_layers``; of a tied model it is lm_head too."""
    odd = odd_model(small_models, tmp_path, name, target_modules=ATTENTION)
    assert odd.adapter is not None
    table = small_models.load(name).get_input_embeddings().weight.detach() * 1.2
    edit_tensors(
        odd.adapter / "adapter_model.safetensors",
        lambda tensors: tensors.update({"base_model.model.model.embed_tokens.weight": table}),
    )
    odd.truth = PeftModel.from_pretrained(small_models.load(name), odd.adapter).merge_and_unload().eval()
    odd.check(odd.export(tmp_path / "out"))


@pytest.mark.parametrize(("change", "message"), CONFIGS.values(), ids=CONFIGS)
def test_configs_that_are_refused(
    small_models: SmallModels, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    odd = odd_model(small_models, tmp_path, UNTIED, target_modules=PROJECTIONS)
    assert odd.adapter is not None
    edit_json(odd.adapter / "adapter_config.json", **change)
    refused(odd, tmp_path, message)


TENSORS = {
    "half of the layers": (
        only_layer_1, r"has no tensors for model\.layers\.0\..* \(1 such\); .*allow-partial-adapter"),
    "another model's layers": (
        lambda t: {name.replace("layers.1", "layers.9"): tensor for name, tensor in t.items()},
        r"adapts model\.layers\.9\..* \(14 such\); the model has no such module"),
    "a factor without its partner": (
        lambda t: {name: tensor for name, tensor in t.items() if "0.mlp.up_proj.lora_B" not in name},
        r"lacks model\.layers\.0\.mlp\.up_proj\.lora_B\.weight"),
    "untrained": (
        lambda t: [tensor.zero_() for name, tensor in t.items() if "lora_B" in name], r"leaves .* as it is; a trained"),
    "one untrained module": (
        lambda t: [tensor.zero_() for name, tensor in t.items() if "1.mlp.up_proj.lora_B" in name],
        r"leaves model\.layers\.1\.mlp\.up_proj\.weight as it is"),
    "a value that is not finite": (
        lambda t: [tensor.fill_(float("nan")) for name, tensor in t.items() if "1.mlp.up_proj.lora_B" in name],
        r"has NaN or infinity in model\.layers\.1\.mlp\.up_proj\.weight"),
    "the embedding of an enlarged vocabulary": (
        lambda t: t.update({"base_model.model.model.embed_tokens.weight": torch.ones(528, 48)}),
        r"embed_tokens\.weight of shape \[528, 48\]; the model has \[520, 48\]\. The tokenizer was enlarged"),
    "a tensor of another method": (
        lambda t: t.update({"base_model.model.model.layers.0.self_attn.q_proj.ia3_l": torch.ones(48)}),
        r"has a tensor|holds a tensor|adapts"),
    "the same tensor twice": (
        lambda t: t.update({name.replace(".weight", ".default.weight"): tensor.clone() for name, tensor in t.items()}),
        r"holds a tensor under two names"),
    "nothing": (lambda t: t.clear(), r"holds no tensors"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), TENSORS.values(), ids=TENSORS)
def test_tensors_that_are_refused(small_models: SmallModels, tmp_path: Path, change: Any, message: str) -> None:
    odd = odd_model(small_models, tmp_path, TIED, target_modules=PROJECTIONS)
    assert odd.adapter is not None
    edit_tensors(odd.adapter / "adapter_model.safetensors", change)
    refused(odd, tmp_path, message)


def test_half_an_adapter_on_request(
    small_models: SmallModels, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = odd_model(small_models, tmp_path, TIED, target_modules=ATTENTION)
    assert odd.adapter is not None
    edit_tensors(odd.adapter / "adapter_model.safetensors", only_layer_1)
    odd.truth = PeftModel.from_pretrained(small_models.load(TIED), odd.adapter).merge_and_unload().eval()
    odd.check(odd.export(tmp_path / "out", allow_partial_adapter=True))
    said = capsys.readouterr().err
    assert "targets model.layers.N.self_attn.o_proj, and 1 of 2 have no tensors" in said
    assert "the adapter changes 2 of the model's 21 modules" in said


def test_a_target_without_tensors_is_a_warning(
    small_models: SmallModels, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = odd_model(small_models, tmp_path, UNTIED, target_modules=ATTENTION)
    assert odd.adapter is not None
    edit_json(
        odd.adapter / "adapter_config.json",
        target_modules=[*ATTENTION, "lm_head"],
        base_model_name_or_path="mistralai/Mistral-7B-v0.1",
    )
    odd.check(odd.export(tmp_path / "out"))
    said = capsys.readouterr().err
    assert "the adapter's config targets lm_head, and 1 of 1 have no tensors" in said
    assert "the adapter was trained on mistralai/Mistral-7B-v0.1; it is merged into mistral-linear" in said


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["q_proj", "embed_tokens", "lm_head"]])
def test_factors_on_tied_weights_are_refused(small_models: SmallModels, tmp_path: Path, targets: list[str]) -> None:
    """PEFT's merge would change both ends, its unmerged model one."""
    odd = odd_model(small_models, tmp_path, TIED, target_modules=targets)
    refused(odd, tmp_path, r"shares its weights with .*; merging would change both\. Untie them, merge with PEFT")


def test_an_adapter_in_the_models_folder(small_models: SmallModels, tmp_path: Path) -> None:
    odd = odd_model(small_models, tmp_path, TIED, target_modules=PROJECTIONS)
    assert odd.adapter is not None
    for path in odd.adapter.glob("adapter_*"):
        path.rename(odd.model / path.name)
    refused(
        odd, tmp_path, r"has an adapter in its folder\. Add --adapter .* to merge it, or --adapter none", adapter=None
    )
    odd.check(odd.export(tmp_path / "with", adapter=str(odd.model)))
    odd.truth = small_models.load(TIED)
    odd.check(odd.export(tmp_path / "without", adapter="none"))


def test_an_adapter_is_not_a_model(small_models: SmallModels, tmp_path: Path) -> None:
    odd = odd_model(small_models, tmp_path, TIED, target_modules=ATTENTION)
    assert odd.adapter is not None
    odd.model, odd.adapter = odd.adapter, None
    refused(odd, tmp_path, r"is an adapter\. Name its base with --model, and add --adapter")


ADVICE = (Path(__file__).parents[3] / "docs" / "checkpoints.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "config"),
    [
        (UNTIED, {"init_lora_weights": "pissa"}),
        (UNTIED, {"init_lora_weights": "olora", "target_modules": ATTENTION}),
        (TIED, {"target_modules": ["lm_head", "q_proj"]}),
    ],
    ids=["PiSSA", "OLoRA", "factors on a tied lm_head"],
)
def test_the_advice_to_merge_it_yourself(
    small_models: SmallModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, config: dict[str, Any]
) -> None:
    """The lines of the documentation, on adapters that are refused, give the vectors of the model that was trained."""
    monkeypatch.chdir(tmp_path)
    odd = odd_model(small_models, tmp_path, name, **config)
    refused(odd, tmp_path, r"docs/checkpoints\.md shows how")
    (code,) = re.findall(r"```python\n(.*?)```", ADVICE, re.DOTALL)
    exec(code.replace("BASE", name).replace("ADAPTER", "adapter").replace("MERGED", "merged"), {})
    odd.model, odd.adapter, odd.truth = tmp_path / "merged", None, unmerged(small_models, name, odd.adapter)
    odd.check(odd.export(tmp_path / "out"))


def unmerged(small_models: SmallModels, name: str, adapter: Path | None) -> torch.nn.Module:
    """Return the model with the adapter at work inside, as it was trained, in the form that the plain loop takes."""
    assert adapter is not None
    return PeftModel.from_pretrained(small_models.load(name), adapter).eval().base_model.model
