"""Values that FP16 cannot hold: found, named, and avoided by what the warning says."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from support.small_models import SmallModels
from support.tolerances import LOW_PRECISION_MIN_COSINE
from support.vectors import PROMPTS, STEPS

from gircse.evaluation.parity.backends import BundleBackend
from gircse.export.exporter import export_bundle
from gircse.export.graph.mixed_precision import FP16_MAX
from gircse.export.options import ExportOptions
from gircse.export.overflow_report import overflow_risks
from gircse.runtime.bundle import Bundle
from gircse.runtime.errors import ExportError, MeasurementError
from gircse.runtime.manifest import Layout
from gircse.runtime.numerics import Float32, row_cosine

ALL = ("fp32", "fp16", "bf16")


def embed(bundle: Path, precision: str, layout: Layout) -> Float32:
    """Return z_0..z_K of the prompts; FP16 and BF16 are emulated."""
    return BundleBackend(Bundle.open(bundle), precision, layout=layout, threads=1).embed(PROMPTS, lambda _: None)


def scale(checkpoint: Path, **factors: float) -> None:
    """Multiply weights of the second layer by part of their name."""
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    for part, factor in factors.items():
        tensors[f"model.layers.1.mlp.{part}.weight"] *= factor
    save_file(tensors, path, metadata={"format": "pt"})


def export_fp16(checkpoint: Path, output: Path, **options: object) -> Path:
    settings: dict[str, Any] = {"steps": STEPS, "max_tokens": 48, "precisions": ALL, **options}
    return export_bundle(ExportOptions(output=output, model=str(checkpoint), **settings))


def test_overflow_is_found_and_the_named_fix_works(
    small_checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A model whose SwiGLU product leaves FP16, though its function is that of the model it was made from."""
    scale(small_checkpoint, up_proj=1e5, down_proj=1e-5)
    bundle = export_fp16(small_checkpoint, tmp_path / "plain")
    warnings = [line for line in capfd.readouterr().err.splitlines() if "warning:" in line]
    assert any("model.layers.1.mlp.down_proj input reaches" in line for line in warnings)
    assert any("Export with --keep-float32 model.layers.1.mlp, or with --precision bf16." in line for line in warnings)
    right = embed(bundle, "fp32", Layout.STEPWISE)
    with pytest.raises(MeasurementError, match="NaN or infinity"):
        embed(bundle, "fp16", Layout.STEPWISE)
    assert row_cosine(embed(bundle, "bf16", Layout.STEPWISE), right).min() > LOW_PRECISION_MIN_COSINE["bf16"]

    fixed = export_fp16(small_checkpoint, tmp_path / "fixed", keep_float32=("model.layers.1.mlp",))
    assert "warning:" not in capfd.readouterr().err
    assert row_cosine(embed(fixed, "fp16", Layout.STEPWISE), right).min() > LOW_PRECISION_MIN_COSINE["fp16"]


def test_magnitudes_are_in_the_bundle(small_models: SmallModels) -> None:
    bundle = Bundle.open(small_models.bundle("llama", precisions=ALL))
    found = json.loads(bundle.file("fp16/magnitudes.json").read_text())
    assert found["fp16_limit"] == FP16_MAX
    assert len(found["tensors"]) == 2 * (7 * 2 + 1)
    assert all(len(maxima) == STEPS + 1 for maxima in found["tensors"].values())
    assert found["tensors"]["lm_head output"][0] == 0.0
    assert min(found["tensors"]["lm_head output"][1:]) > 0
    assert "fp16/magnitudes.json" in bundle.manifest.files


def test_a_weight_beyond_fp16_is_refused(small_checkpoint: Path, tmp_path: Path) -> None:
    scale(small_checkpoint, up_proj=1e7)
    with pytest.raises(
        ExportError, match=r"layers\.1\.mlp\.up_proj\.weight has a magnitude of .*; the FP16 maximum is 65504\."
    ):
        export_fp16(small_checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("tensor", "keep", "fix"),
    [
        (
            "model.layers.3.mlp.down_proj output",
            (),
            "--keep-float32 model.layers.3.mlp.down_proj, or with --precision bf16",
        ),
        ("model.layers.3.mlp.gate_proj output", (), "--keep-float32 model.layers.3.mlp, or with --precision bf16"),
        ("model.layers.3.self_attn.k_proj output", (), "--precision bf16: attention"),
        ("model.layers.3.self_attn.o_proj input", ("o_proj",), "--precision bf16: attention"),
        ("lm_head output", (), "--keep-float32 embed_tokens, or with --precision bf16"),
        ("lm_head output", ("embed_tokens",), None),
        ("model.layers.3.mlp.down_proj output", ("layers.3.mlp",), None),
        (
            "model.layers.3.mlp.down_proj input",
            ("layers.3.mlp.down_proj",),
            "--keep-float32 model.layers.3.mlp, or with --precision bf16",
        ),
        (  # the product is cast for a down_proj in FP16
            "model.layers.3.mlp.down_proj input",
            ("gate_proj", "up_proj"),
            "--keep-float32 model.layers.3.mlp, or with --precision bf16",
        ),
        ("model.layers.3.mlp.down_proj input", ("layers.3.mlp",), None),
        ("model.layers.3.mlp.gate_up_proj output", (), "--keep-float32 model.layers.3.mlp, or with --precision bf16"),
        ("model.layers.3.mlp.down_proj input", ("gate_up_proj", "down_proj"), None),
        ("model.layers.3.self_attn.qkv_proj output", (), "--precision bf16: attention"),
    ],
)
def test_fixes(tensor: str, keep: tuple[str, ...], fix: str | None) -> None:
    risks = overflow_risks({tensor: np.array([1.0, 40000.0])}, keep_float32=keep, tied=True)
    assert [risk.fix.startswith(fix or "") for risk in risks] == ([True] if fix else [])
    for risk in risks:
        assert str(risk).startswith(f"{tensor} reaches 4e+04 at step 1; the FP16 maximum is 65504. Export with ")
    assert not overflow_risks({tensor: np.array([30000.0, 1.0])}, keep_float32=keep, tied=True)
