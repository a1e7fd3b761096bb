"""Odd but real checkpoints and adapters: small seeded models, damaged or dressed up as public bug reports describe.

The oracle is PyTorch alone: Hugging Face's own loading of the model before it was touched, PEFT's own merge of the
adapter in the process that made it, and the plain loop of ``reference_loop.py``.
"""

import json
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from gircse.export.exporter import export_bundle
from gircse.export.options import ExportOptions
from gircse.runtime.errors import GircseError
from support.small_models import SmallModels
from support.tolerances import CONTROL_MIN_DIFFERENCE, SMALL_MODEL_MAX_DIFFERENCE
from support.vectors import expected, run

STEPS = 3
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TRAINED = ("lora_", "modules_to_save", "trainable_tokens_delta")

Change = Callable[[Path], Any]


@dataclass
class OddModel:
    """A checkpoint, perhaps with an adapter, that a test may change; and what it computes in PyTorch.

    Attributes:
        model: folder of the model.
        adapter: folder of the adapter, or None.
        truth: the model in PyTorch, the adapter merged.
    """

    model: Path
    adapter: Path | None
    truth: torch.nn.Module

    def export(self, output: Path, *, steps: int = STEPS, **options: Any) -> Path:
        options.setdefault("adapter", str(self.adapter) if self.adapter else None)
        options.setdefault("max_tokens", 48)
        return export_bundle(ExportOptions(output=output, steps=steps, model=str(self.model), **options))

    def check(self, bundle: Path, *, steps: int = STEPS) -> None:
        """Compare a bundle with the truth, at every step, and make sure that the truth depends on the adapter."""
        prompt, wanted = expected(self.truth, steps=steps)
        ours_prompt, ours = run(bundle, steps=steps)
        assert np.abs(ours_prompt - prompt).max() < SMALL_MODEL_MAX_DIFFERENCE
        assert steps == 0 or np.abs(ours - wanted).max() < SMALL_MODEL_MAX_DIFFERENCE


def odd_model(small_models: SmallModels, tmp_path: Path, name: str, **adapter: Any) -> OddModel:
    """Copy a small model, and train an adapter for it: ``adapter`` is what ``LoraConfig`` is asked for, if anything."""
    model = tmp_path / name
    shutil.copytree(small_models.checkpoint(name), model)
    truth = small_models.load(name)
    if not adapter:
        return OddModel(model, None, truth)
    before = expected(truth, steps=1)
    torch.manual_seed(5)
    adapter = {"r": 4, "lora_alpha": 8, "target_modules": PROJECTIONS, **adapter}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied weights, biases, fan_in_fan_out: what the tests are about
        tuned = get_peft_model(truth, LoraConfig(**adapter))
    with torch.no_grad():
        for parameter_name, parameter in tuned.named_parameters():
            if any(part in parameter_name for part in TRAINED):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    folder = tmp_path / "adapter"
    tuned.save_pretrained(folder)
    odd = OddModel(model, folder, tuned.merge_and_unload().eval())
    after = expected(odd.truth, steps=1)
    assert max(np.abs(a - b).max() for a, b in zip(before, after, strict=True)) > CONTROL_MIN_DIFFERENCE
    return odd


def refused(odd: OddModel, tmp_path: Path, message: str, **options: Any) -> None:
    """Export what has to be refused: one error that matches, and nothing is left behind."""
    before = set(tmp_path.rglob("*"))
    with pytest.raises(GircseError) as caught:
        odd.export(tmp_path / "out", **options)
    assert re.search(message, str(caught.value)), caught.value
    assert set(tmp_path.rglob("*")) == before


def edit_json(path: Path, **change: Any) -> None:
    """Set fields of a JSON file; a field that is set to ``...`` is removed."""
    content = {**(json.loads(path.read_text()) if path.exists() else {}), **change}
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of a safetensors file; a change that returns some replaces them."""
    tensors = load_file(path)
    changed = change(tensors)
    save_file(changed if isinstance(changed, dict) else tensors, path, metadata={"format": "pt"})


def rename_tensors(path: Path, pattern: str, replacement: str) -> None:
    """Rename the tensors of a file by a regular expression, which has to match at least once."""
    names = list(load_file(path))
    assert any(re.search(pattern, name) for name in names)
    edit_tensors(path, lambda tensors: {re.sub(pattern, replacement, name): t for name, t in tensors.items()})
