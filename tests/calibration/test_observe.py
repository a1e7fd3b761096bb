"""The statistics are those of the step-by-step loop on the whole model, of real tokens alone, and finite."""

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.small_calibration_run import CALIBRATION_STEPS, run_calibration, write_texts
from support.small_models import CALIBRATION_TEXTS, SmallModels
from tokenizers import Tokenizer
from torch import Tensor

from gircse.calibration import calibrate as calibrate_module
from gircse.calibration import corpus, layers
from gircse.calibration.calibration_file import InputCalibration
from gircse.calibration.int8.fake_quantization import round_weight
from gircse.calibration.int8.gptq import RoundedWeight
from gircse.calibration.int8.scheme import TOP_K, decoder_inputs
from gircse.calibration.observe import InputStatistics, sample_rows
from gircse.runtime.errors import CheckpointError

TEXTS = [*CALIBRATION_TEXTS[:39], "x"]  # one very short text among longer ones


@torch.no_grad()
def inputs_of_every_step(model: Any, ids: list[int]) -> Iterator[tuple[int, dict[str, Tensor], Tensor | None]]:
    """Refine one text without cache or padding; yield the step, its new rows of every projection, the softmax."""
    seen: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: seen.__setitem__(name, inputs[0][0]))
        for name, module in model.named_modules()
        if name.endswith("_proj")
    ]
    table = model.get_input_embeddings().weight
    embeddings, probabilities = table[ids], None
    for step in range(CALIBRATION_STEPS + 1):
        seen.clear()
        hidden = model.model(inputs_embeds=embeddings[None], use_cache=False).last_hidden_state[0, -1:]
        new = slice(None) if step == 0 else slice(-1, None)
        rows = {name: values[new].clone() for name, values in seen.items()}
        yield step, rows | {"lm_head": hidden}, probabilities
        probabilities = model.lm_head(hidden).softmax(-1)
        embeddings = torch.cat([embeddings, probabilities @ table])
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("name", ["llama", "qwen3-biased", "mistral-window"])
def test_statistics_are_those_of_the_step_by_step_loop(small_models: SmallModels, tmp_path: Path, name: str) -> None:
    checkpoint = small_models.checkpoint(name)
    found = run_calibration(
        small_models, tmp_path, texts=write_texts(tmp_path, TEXTS), model=str(checkpoint), sensitivity="off"
    )
    model, tokenizer = small_models.load(name), Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    rows: dict[str, list[list[Tensor]]] = {}
    tail, mass = torch.zeros(48), 0.0
    for text in TEXTS:
        for step, values, probabilities in inputs_of_every_step(model, tokenizer.encode(text).ids):
            for one in decoder_inputs(2):
                steps = rows.setdefault(one.name, [[] for _ in range(CALIBRATION_STEPS + 1)])
                at = step + (one.name == "lm_head")  # h_0 makes the soft token of step 1
                if at <= CALIBRATION_STEPS:
                    steps[at].append(values[one.projections[0]])
            if probabilities is not None:
                rest = probabilities[0].sort(descending=True).values[TOP_K:]
                order = probabilities[0].argsort(descending=True)[TOP_K:]
                tail += rest @ model.get_input_embeddings().weight.detach()[order]
                mass += float(rest.sum())
    for one, steps in rows.items():
        expected = [range_of(torch.cat(step), found.inputs[one]) if step else 0.0 for step in steps]
        assert found.inputs[one].ranges == pytest.approx(expected, rel=1e-3), one
    assert found.soft_token is not None
    assert found.soft_token.tail == pytest.approx((tail / mass).tolist(), rel=1e-3, abs=1e-6)
    moments = load_file(tmp_path / "calibration.moments.safetensors")
    assert len(moments) == 8
    for key, moment in moments.items():
        every = torch.cat([row for step in rows[key.removeprefix("moments.").removesuffix(".0")] for row in step])
        every = every / every.norm(dim=1, keepdim=True)
        torch.testing.assert_close(moment, every.T @ every, rtol=1e-3, atol=1e-3)


def range_of(rows: Tensor, calibration: InputCalibration) -> float:
    smoothed = rows / torch.tensor(calibration.smoothing or (1.0,))
    smoothed[:, list(calibration.outlier_channels)] = 0
    return float(smoothed.abs().max())


def test_activations_that_are_not_finite_are_named(
    small_models: SmallModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = layers.LayerSweep._run_layer

    def damaged(self: Any, name: str, before: Any, *rest: Any) -> None:
        if name == "model.layers.1":
            before[0][0, -1, 3] = torch.inf  # of the last step, without which there is no later one
        begin(self, name, before, *rest)

    monkeypatch.setattr(layers.LayerSweep, "_run_layer", damaged)
    with pytest.raises(
        CheckpointError, match=r"^model\.layers\.1\.attention_input has NaN or infinite values at step 2\."
    ):
        run_calibration(small_models, tmp_path)
    assert not (tmp_path / "calibration.json").exists()


def test_states_that_are_not_finite_are_named(small_models: SmallModels, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^h_1 has NaN or infinite values, in float32\. .* use fp32\.$"):
        run_calibration(small_models, tmp_path, temperature=1e-40)


def test_padding_is_not_observed(small_models: SmallModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batched = run_calibration(small_models, tmp_path, texts=write_texts(tmp_path, TEXTS))
    monkeypatch.setattr(corpus, "BATCH_SIZE", 1)
    single = run_calibration(small_models, tmp_path, texts=write_texts(tmp_path, TEXTS))
    for name, found in batched.inputs.items():
        if not found.smoothing:  # the search reads a sample, which differs
            assert found.ranges == pytest.approx(single.inputs[name].ranges, rel=1e-3)


def test_statistics_of_no_layer_outlive_it(
    small_models: SmallModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a 7B model all second moments are 1.7 GB, and the rounded weights 6.5."""
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    rounded: weakref.WeakSet[Any] = weakref.WeakSet()
    most: list[int] = []
    most_rounded: list[int] = []

    class Counted(InputStatistics):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            alive.add(self)
            most.append(len(alive))

    def counted(*args: Any) -> RoundedWeight:
        weight = round_weight(*args)
        rounded.add(weight.integers)
        most_rounded.append(len(rounded))
        return weight

    monkeypatch.setattr(layers, "InputStatistics", Counted)
    monkeypatch.setattr(layers, "round_weight", counted)
    monkeypatch.setattr(calibrate_module, "_measure", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_calibration(small_models, tmp_path)
    assert len(most) == 2 * 4 + 1
    assert max(most) == 4
    assert len(most_rounded) == 2 * 7
    assert max(most_rounded) == 7


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_rows_are_sampled_from_prompts_and_steps_alike() -> None:
    steps = [torch.tensor([-1, 0, 0, 1, 2]).repeat(300), torch.tensor([0, 1]).repeat(3)]
    places = sample_rows(steps, seed=0)
    assert [len(found.sampled) for found in places] == [1500, 6]
    chosen = torch.cat([found.steps[found.sampled] for found in places])
    assert (int((chosen == 0).sum()), int((chosen > 0).sum()), int((chosen < 0).sum())) == (256, 256, 0)
    again, other = (torch.cat([one.sampled for one in sample_rows(steps, seed=seed)]) for seed in (0, 1))
    assert torch.equal(again, torch.cat([one.sampled for one in places]))
    assert not torch.equal(again, other)
