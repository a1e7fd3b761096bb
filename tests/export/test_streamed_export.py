"""An export whose PyTorch reference is streamed has the golden vectors and magnitudes of a whole one."""

import json
from pathlib import Path

import pytest
from support.odd_models import odd_model
from support.small_models import SmallModels

from gircse.checkpoint import reference_choice
from gircse.checkpoint.reference_choice import ReferenceBudget
from gircse.runtime.errors import OptionError


@pytest.mark.parametrize("name", ["qwen2-yarn-bf16", "phi4-mini"])
def test_golden_vectors_and_magnitudes_are_the_same(
    small_models: SmallModels,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    odd = odd_model(small_models, tmp_path, name, lora_alpha=4)
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(f"the bird number {index}" for index in range(20)))
    bundles = []
    for streamed in (False, True):
        if streamed:
            monkeypatch.setattr(ReferenceBudget, "fits_whole", False)
        bundles.append(odd.export(tmp_path / f"out-{streamed}", precisions=("fp32", "fp16"), probe_texts=texts))
        assert ("layers come one at a time" in capsys.readouterr().err) == streamed
        odd.check(bundles[-1])
    one, other = bundles
    assert (one / "golden.json").read_bytes() == (other / "golden.json").read_bytes()
    magnitudes = [json.loads((bundle / "fp16" / "magnitudes.json").read_text()) for bundle in bundles]
    assert magnitudes[0]["texts"] == magnitudes[1]["texts"] == 12 + 20


def test_what_the_graphs_take_is_not_missing_for_the_golden_vectors(
    small_models: SmallModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = iter([1 << 40])
    monkeypatch.setattr(reference_choice, "available_memory", lambda: next(free, 0))
    bundle = odd_model(small_models, tmp_path, "llama").export(tmp_path / "out")
    assert next(free, None) is None
    assert (bundle / "golden.json").is_file()


def test_a_device_that_is_not_there_is_refused(small_models: SmallModels, tmp_path: Path) -> None:
    odd = odd_model(small_models, tmp_path, "llama")
    with pytest.raises(OptionError, match=r"^--device cuda:7 cannot be used: "):
        odd.export(tmp_path / "out", device="cuda:7")
    assert not (tmp_path / "out").exists()
