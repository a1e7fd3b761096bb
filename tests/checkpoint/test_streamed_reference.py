"""A streamed reference gives the numbers of the whole model, on every architecture and with every kind of adapter."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.odd_models import edit_tensors, odd_model
from support.small_models import CONFIGS, SmallModels
from support.vectors import PROMPTS

from gircse.checkpoint import model_weights
from gircse.checkpoint.model_config import read_model_config
from gircse.checkpoint.model_weights import ModelWeights
from gircse.checkpoint.reference import EXACT, BatchState, Reference, Variation, WholeReference, load_reference
from gircse.checkpoint.source import Checkpoint, resolve_checkpoint
from gircse.checkpoint.streamed_model import StreamedModel
from gircse.checkpoint.streamed_reference import StreamedReference
from gircse.runtime.batch_planner import pad_batch
from gircse.runtime.errors import CheckpointError
from gircse.runtime.precision import Precision

STEPS = 3
LARGE = 1 << 30
BLOCKS_MAX_DIFFERENCE = 1e-4
BATCHES = tuple(pad_batch(rows, PROMPTS, pad_token_id=0) for rows in ((0, 2), (1,), tuple(range(len(PROMPTS)))))

Key = tuple[int, int, int]


def streamed_reference(
    checkpoint: Checkpoint, *, precision: Precision = Precision.FP32, group_bytes: int = LARGE, **resident: Any
) -> StreamedReference:
    config = read_model_config(checkpoint.directory)
    weights = ModelWeights.open(checkpoint, config, steps=STEPS, allow_partial_adapter=True)
    streamed = StreamedModel(config, weights, precision=precision, **resident)
    return StreamedReference(streamed, group_bytes=group_bytes)


def states_of(reference: Reference, variations: tuple[Variation, ...] = (EXACT,)) -> dict[Key, BatchState]:
    states = list(reference.refine(BATCHES, steps=STEPS, temperature=0.7, variations=variations))
    found = {(state.variation, state.batch, state.step): state for state in states}
    assert len(found) == len(states) == len(variations) * len(BATCHES) * (STEPS + 1)
    return found


def assert_same_bits(one: dict[Key, BatchState], other: dict[Key, BatchState]) -> None:
    assert one.keys() == other.keys()
    for key, state in one.items():
        for name in ("hidden", "probabilities", "soft_token"):
            first, second = getattr(state, name), getattr(other[key], name)
            assert (first is None) == (second is None) == (key[2] == 0 and name != "hidden")
            assert first is None or torch.equal(first, second), (key, name)


def whole_reference(checkpoint: Checkpoint, precision: Precision = Precision.FP32) -> WholeReference:
    """Return the whole model with its weights aligned in memory: mapped files are not, and CPU products see it."""
    model = load_reference(checkpoint, precision=precision)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return WholeReference(model)


@pytest.mark.parametrize("name", CONFIGS)
def test_numbers_are_those_of_the_whole_model_bit_for_bit(small_models: SmallModels, name: str) -> None:
    checkpoint = resolve_checkpoint(str(small_models.checkpoint(name)))
    assert_same_bits(states_of(streamed_reference(checkpoint)), states_of(whole_reference(checkpoint)))


@pytest.mark.parametrize(
    ("name", "adapter"),
    [
        ("qwen2-yarn-bf16", {"use_rslora": True}),
        ("mistral-linear", {"use_dora": True}),
        ("llama-biased-llama3", {"lora_bias": True}),
        ("llama-biased-llama3", {"modules_to_save": ["lm_head", "embed_tokens"]}),
        ("qwen3-biased", {"trainable_token_indices": [3, 7, 300]}),
        ("mistral-linear", {"target_modules": ["embed_tokens", "lm_head", "down_proj"]}),
    ],
)
def test_adapters_are_merged_as_by_peft(
    small_models: SmallModels, tmp_path: Path, name: str, adapter: dict[str, Any]
) -> None:
    odd = odd_model(small_models, tmp_path, name, **adapter)
    checkpoint = resolve_checkpoint(str(odd.model), adapter=str(odd.adapter))
    assert_same_bits(states_of(streamed_reference(checkpoint)), states_of(whole_reference(checkpoint)))


@pytest.mark.parametrize("name", ["qwen2", "gemma3"])
def test_bf16_is_that_of_the_whole_model(small_models: SmallModels, name: str) -> None:
    checkpoint = resolve_checkpoint(str(small_models.checkpoint(name)))
    streamed = states_of(streamed_reference(checkpoint, precision=Precision.BF16))
    assert_same_bits(streamed, states_of(whole_reference(checkpoint, Precision.BF16)))
    assert streamed[0, 0, 0].hidden.dtype is torch.bfloat16


@pytest.mark.parametrize(
    "options",
    [
        {"group_bytes": 1},
        {"reads_ahead": False},
        {"resident_layers": 1},
        {"resident_layers": 2},
        {"resident_vocabulary": True},
    ],
)
def test_neither_groups_nor_what_is_kept_or_read_ahead_change_a_bit(
    small_models: SmallModels, options: dict[str, Any]
) -> None:
    checkpoint = resolve_checkpoint(str(small_models.checkpoint("qwen3")))
    assert_same_bits(states_of(streamed_reference(checkpoint, **options)), states_of(streamed_reference(checkpoint)))


def test_a_vocabulary_in_blocks_only_changes_the_order_of_sums(
    small_models: SmallModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = resolve_checkpoint(str(small_models.checkpoint("gemma3-softcap-linear")))
    whole = states_of(whole_reference(checkpoint))
    monkeypatch.setattr(model_weights, "BLOCK_ELEMENTS", 70 * 48)  # 520 rows in 8 blocks
    streamed = states_of(streamed_reference(checkpoint))
    for key, state in streamed.items():
        difference = (state.hidden - whole[key].hidden).abs().max() / whole[key].hidden.abs().max()
        assert difference < BLOCKS_MAX_DIFFERENCE
    assert not torch.equal(streamed[0, 0, 1].hidden, whole[0, 0, 1].hidden)  # it was in blocks


def test_variations_run_as_on_the_whole_model(small_models: SmallModels) -> None:
    """Several at once, each changing what is loaded, in layers and in the vocabulary, and the soft token."""
    checkpoint = resolve_checkpoint(str(small_models.checkpoint("llama-biased-llama3")))
    variations = (
        EXACT,
        Variation(changed=scaling("model.layers.1.mlp.down_proj", 1.5)),
        Variation(changed=scaling("lm_head", 0.5)),
        Variation(reweight=lambda probabilities: (probabilities.square(), probabilities[:, :48])),
    )
    streamed, whole = (states_of(make(checkpoint), variations) for make in (streamed_reference, whole_reference))
    assert_same_bits(streamed, whole)
    for number in range(1, len(variations)):
        last = [streamed[which, 2, STEPS].hidden for which in (0, number)]
        assert not torch.equal(*last)


@pytest.mark.parametrize(("group_bytes", "groups"), [(LARGE, 1), (1, len(BATCHES))])
def test_weights_are_changed_only_for_the_runs_of_a_group(
    small_models: SmallModels, group_bytes: int, groups: int
) -> None:
    changes: list[tuple[int, str]] = []

    def counting(number: int) -> Any:
        @contextmanager
        def changed(_model: torch.nn.Module, loaded: str, _rows: slice) -> Iterator[None]:
            changes.append((number, loaded))
            yield

        return changed

    checkpoint = resolve_checkpoint(str(small_models.checkpoint("llama")))
    states_of(
        streamed_reference(checkpoint, group_bytes=group_bytes), tuple(Variation(changed=counting(n)) for n in range(2))
    )
    for number in range(2):
        for loaded, times in (("model.layers.0", STEPS + 1), ("model.layers.1", STEPS + 1), ("lm_head", STEPS)):
            assert changes.count((number, loaded)) == groups * times


def test_hooks_see_every_layer_and_step(small_models: SmallModels) -> None:
    checkpoint = resolve_checkpoint(str(small_models.checkpoint("qwen2")))
    seen: dict[str, list[list[np.ndarray]]] = {}
    for reference in (streamed_reference(checkpoint), whole_reference(checkpoint)):
        for name in ("model.layers.0.mlp.up_proj", "model.layers.1.self_attn.o_proj", "lm_head"):
            calls: list[np.ndarray] = []
            seen.setdefault(name, []).append(calls)
            module = reference.model.get_submodule(name)
            module.register_forward_hook(lambda _, inputs, output, calls=calls: calls.append(output.numpy().copy()))
        states_of(reference)
    for name, (streamed, whole) in seen.items():
        assert len(streamed) == len(whole) == len(BATCHES) * (STEPS + (name != "lm_head"))
        ordered = [sorted(calls, key=lambda call: (call.shape, call.tobytes())) for calls in (streamed, whole)]
        assert all(np.array_equal(one, other) for one, other in zip(*ordered, strict=True))


def test_no_layer_keeps_its_weights_and_progress_adds_up(small_models: SmallModels) -> None:
    checkpoint = resolve_checkpoint(str(small_models.checkpoint("llama")))
    reference = streamed_reference(checkpoint, group_bytes=1)
    loaded: list[int] = []
    layers = [reference.model.get_submodule(f"model.layers.{index}") for index in range(2)]

    def count(*_: Any) -> None:
        loaded.append(sum(layer.mlp.up_proj.weight.device.type != "meta" for layer in layers))

    for layer in layers:
        layer.register_forward_hook(count)
    done: list[float] = []
    for _ in reference.refine(BATCHES, steps=STEPS, temperature=1.0, advance=done.append):
        pass
    assert set(loaded) == {1}
    assert all(parameter.is_meta for layer in layers for parameter in layer.parameters())
    assert sum(done) == pytest.approx(sum(len(batch.rows) for batch in BATCHES))


def test_a_weight_that_is_not_finite_is_refused_by_name(small_models: SmallModels, tmp_path: Path) -> None:
    odd = odd_model(small_models, tmp_path, "qwen2")

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.inf

    edit_tensors(odd.model / "model.safetensors", damage)
    reference = streamed_reference(resolve_checkpoint(str(odd.model)))
    with pytest.raises(CheckpointError, match=r"NaN or infinity in model.layers.1.mlp.up_proj.weight"):
        states_of(reference)


def scaling(name: str, factor: float) -> Any:
    """Return a change that scales the weight of a module where it is loaded."""

    @contextmanager
    def changed(model: torch.nn.Module, loaded: str, _rows: slice) -> Iterator[None]:
        if not name.startswith(loaded):
            yield
            return
        weight = model.get_submodule(name).get_parameter("weight")
        exact = weight.data
        weight.data = exact * factor
        try:
            yield
        finally:
            weight.data = exact

    return changed


def test_every_tensor_is_read_once_in_a_sweep(small_models: SmallModels, tmp_path: Path) -> None:
    odd = odd_model(small_models, tmp_path, "qwen2-yarn-bf16", use_rslora=True)
    reference = streamed_reference(resolve_checkpoint(str(odd.model), adapter=str(odd.adapter)))
    before = reference.bytes_read
    states_of(reference)
    sizes = {name: 2 * tensor.numel() for name, tensor in load_file(odd.model / "model.safetensors").items()}
    layers = sum(size for name, size in sizes.items() if ".layers." in name)
    factors = sum(4 * tensor.numel() for tensor in load_file(odd.adapter / "adapter_model.safetensors").values())
    vocabulary = sizes["lm_head.weight"] + sizes["model.embed_tokens.weight"]
    rows = sum(len(np.unique(batch.input_ids)) for batch in BATCHES) * 2 * 48
    assert reference.bytes_read - before == (STEPS + 1) * (layers + factors) + STEPS * vocabulary + rows


@pytest.mark.parametrize("reads_ahead", [True, False])
def test_the_memory_of_layers_is_kept_for_the_next_ones_until_it_is_freed(
    small_models: SmallModels, reads_ahead: bool
) -> None:
    checkpoint = resolve_checkpoint(str(small_models.checkpoint("llama")))
    config = read_model_config(checkpoint.directory)
    streamed = StreamedModel(config, ModelWeights.open(checkpoint, config, steps=1), reads_ahead=reads_ahead)
    assert len(list(streamed.layers())) == 2
    kept = [weakref.ref(value) for state in streamed._spare for value in state.values()]
    assert 1 <= len(streamed._spare) <= 1 + reads_ahead
    streamed.free_buffers()
    assert all(value() is None for value in kept)
