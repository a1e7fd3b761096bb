"""Seeded two-layer models of every architecture, their calibrations and bundles, and ways to damage them."""

import contextlib
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from gircse.calibration.calibrate import CalibrationOptions, calibrate
from gircse.export.exporter import export_bundle
from gircse.export.options import ExportOptions
from gircse.runtime.precision import SPECS, Precision

DATA = Path(__file__).parents[1] / "data"

SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 520,  # more rows than the tokenizer has tokens, as in Qwen2.5
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.12,  # soft tokens differ from text to text, and FP32 still agrees with FP64 to 5e-6
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.25, 1.5],
    "long_factor": [1.0, 4.0, 16.0],
}

GEMMA_LAYERS = ["sliding_attention", "full_attention"]

_WORDS = "how do I reset the card after a storm in my garden while the small bird sings about old ships".split()
CALIBRATION_TEXTS = [
    " ".join(_WORDS[i % 11 : i % 11 + 2 + i % 7] + _WORDS[-(i % 5) - 1 :]) + f" {i}" for i in range(80)
]

# Not one of CONFIGS, which stand for architectures: layers enough to tell one from the others.
DEEP = "llama-deep"


def _deep_llama() -> Any:
    return LlamaConfig(**{**SIZES, "num_hidden_layers": 4}, tie_word_embeddings=True)


CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama-biased-llama3": lambda: LlamaConfig(
        **SIZES, tie_word_embeddings=False, attention_bias=True, mlp_bias=True, rope_parameters=LLAMA3_ROPE
    ),
    "mistral-window": lambda: MistralConfig(**SIZES, tie_word_embeddings=False, head_dim=12, sliding_window=64),
    "mistral-linear": lambda: MistralConfig(
        **SIZES, tie_word_embeddings=False, sliding_window=None, rope_parameters=LINEAR_ROPE
    ),
    "qwen2": lambda: Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen2-yarn-bf16": lambda: Qwen2Config(
        **SIZES, tie_word_embeddings=False, rope_parameters=YARN_ROPE, dtype="bfloat16"
    ),
    "qwen3": lambda: Qwen3Config(**SIZES, tie_word_embeddings=True, head_dim=16),
    "qwen3-biased": lambda: Qwen3Config(**SIZES, tie_word_embeddings=False, head_dim=8, attention_bias=True),
    "gemma3": lambda: Gemma3TextConfig(
        **SIZES, head_dim=12, query_pre_attn_scalar=20, sliding_window=64, layer_types=GEMMA_LAYERS
    ),
    "gemma3-softcap-linear": lambda: Gemma3TextConfig(
        **SIZES,
        tie_word_embeddings=False,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=64,
        layer_types=GEMMA_LAYERS,
        final_logit_softcapping=2.0,  # so low that it changes every probability
        rope_scaling={"rope_type": "linear", "factor": 4.0},
    ),
    "phi3": lambda: Phi3Config(**SIZES, tie_word_embeddings=False, sliding_window=64),
    "phi4-mini": lambda: Phi3Config(
        **{**SIZES, "initializer_range": 0.1},  # with tied weights a little more is chaos: BF16 weights alone cost 1 %
        tie_word_embeddings=True,
        rope_parameters=LONG_ROPE,
        original_max_position_embeddings=64,
    ),
}


@dataclass(frozen=True)
class SmallModels:
    """Makes small checkpoints and their bundles, each once a session."""

    root: Path
    bundles: dict[tuple[Any, ...], Path] = field(default_factory=dict)
    calibrations: dict[tuple[Any, ...], Path] = field(default_factory=dict)

    def checkpoint(self, name: str) -> Path:
        """Return the folder of a seeded model."""
        directory = self.root / name
        if not directory.exists():
            config = _deep_llama() if name == DEEP else CONFIGS[name]()
            torch.manual_seed(7)
            model = AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.float32)
            randomize_vectors(model)
            model.save_pretrained(directory)
            shutil.copyfile(DATA / "tokenizer.json", directory / "tokenizer.json")
        return directory

    def load(self, name: str) -> Any:
        """Return the model in FP32, ready to run."""
        return AutoModelForCausalLM.from_pretrained(self.checkpoint(name), dtype=torch.float32).eval()

    def bundle(self, name: str, *, steps: int = 5, layout: str = "unrolled", **options: Any) -> Path:
        """Return the bundle of a seeded model."""
        key = (name, steps, layout, *sorted(options.items()))
        if key not in self.bundles:
            output = self.root / f"bundle-{len(self.bundles)}"
            options.setdefault("max_tokens", 48)
            with untrained_limits():
                export_bundle(
                    ExportOptions(
                        output=output, steps=steps, model=str(self.checkpoint(name)), layout=layout, **options
                    )
                )
            self.bundles[key] = output
        return self.bundles[key]

    def calibration(self, name: str, *, steps: int = 5, **options: Any) -> Path:
        """Return the calibration of a seeded model, which excludes nothing from quantization."""
        key = (name, steps, *sorted(options.items()))
        if key not in self.calibrations:
            texts, output = self.root / "calibration.txt", self.root / f"calibration-{len(self.calibrations)}.json"
            texts.write_text("\n".join(CALIBRATION_TEXTS), encoding="utf-8")
            options = {"texts": texts, "samples": 40, "sensitivity": "off", "max_tokens": 48, **options}
            calibrate(CalibrationOptions(steps=steps, output=output, model=str(self.checkpoint(name)), **options))
            self.calibrations[key] = output
        return self.calibrations[key]


@contextlib.contextmanager
def untrained_limits() -> Iterator[None]:
    """Let variants be published that are further from FP32 than users get them: random weights amplify roundings."""
    with pytest.MonkeyPatch.context() as patch:
        for precision in set(Precision) - {Precision.FP32}:
            loose = dataclasses.replace(SPECS[precision], self_test_min_cosine=-1.0)
            patch.setitem(SPECS, precision, loose)  # type: ignore[arg-type]
        yield


@torch.no_grad()
def randomize_vectors(model: torch.nn.Module) -> None:
    """Give norms and biases values of their own: with ones and zeros a lost one would go unnoticed."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter) * 0.2 if "bias" in name else torch.rand_like(parameter) * 0.5)


def scale_weights(bundle: Path, start: float, end: float, factor: float) -> None:
    """Multiply a part of the FP32 weights, given as fractions of the file, behind the manifest's back."""
    path = bundle / "fp32" / "weights.bin"
    weights = np.fromfile(path, np.float32)
    weights[int(start * len(weights)) : int(end * len(weights))] *= factor
    weights.tofile(path)
    rehash(bundle)


def add_stepwise_variants(bundle: Path, *precisions: str) -> None:
    """Add variants that have the stepwise graph alone, as those of INT8 do; graph and weights are those of FP32."""
    manifest = json.loads((bundle / "gircse.json").read_text())
    fp32 = manifest["variants"]["fp32"]
    alone = {**fp32, "graphs": {"stepwise": fp32["graphs"]["stepwise"]}}
    manifest["variants"].update(dict.fromkeys(precisions, alone))
    (bundle / "gircse.json").write_text(json.dumps(manifest))


def edit_manifest(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = bundle / "gircse.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def point_weights_at(graph: Path, location: str) -> None:
    """Let every weight of a graph lie in another file."""
    model = onnx.load(graph, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    onnx.save(model, graph)


def rehash(bundle: Path) -> None:
    """Make the manifest agree with the files again, as if they had been exported so."""
    manifest = json.loads((bundle / "gircse.json").read_text())
    for name, entry in manifest["files"].items():
        path = bundle / name
        entry.update(bytes=path.stat().st_size, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    (bundle / "gircse.json").write_text(json.dumps(manifest))
