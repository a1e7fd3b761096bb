"""A PEFT LoRA adapter, matched to the checkpoint tensors that it changes.

merged = W + scaling * B @ A        scaling = alpha / r, or alpha / sqrt(r) with rsLoRA
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gircse.checkpoint.safetensors_index import SafetensorsIndex
from gircse.checkpoint.source import read_json
from gircse.runtime.errors import CheckpointError

_MERGE_FIRST = "Merge the adapter with PEFT and use the merged model."


@dataclass(frozen=True)
class LoraPair:
    """The two factors of one adapted weight: its file, the names of A (r, in) and B (out, r), and the scaling."""

    file: Path
    a: str
    b: str
    scaling: float


class LoraAdapter:
    """A PEFT LoRA adapter.

    Attributes:
        config: content of adapter_config.json.
        index: the adapter's tensors.
        pairs: name of the checkpoint tensor that is changed, to its pair of factors.
    """

    def __init__(self, directory: Path) -> None:
        """Read the config and the header.

        Raises:
            CheckpointError: the adapter is not plain LoRA, or one of its tensors has no counterpart.
        """
        self.config = read_json(directory / "adapter_config.json")
        self._refuse_other_kinds(directory)
        self.index = SafetensorsIndex([directory / "adapter_model.safetensors"])
        self.pairs = dict(self._pair(directory))

    def _pair(self, directory: Path) -> Iterator[tuple[str, LoraPair]]:
        names = set(self.index.entries)
        if not names:
            raise CheckpointError(
                f"--adapter {directory}", "holds no tensors", None, "Train or download the adapter again."
            )
        while names:
            name = min(names)
            stem = name.removeprefix("base_model.model.")
            module, kind, _ = stem.rpartition(".lora_A.weight")
            partner = name.replace(".lora_A.", ".lora_B.")
            if not kind or partner not in names:
                raise CheckpointError(
                    f"--adapter {directory}",
                    f"holds a tensor {name}",
                    "only pairs of lora_A.weight and lora_B.weight, plain LoRA on linear layers, can be merged",
                    _MERGE_FIRST,
                )
            names -= {name, partner}
            yield f"{module}.weight", LoraPair(self.index.entries[name].file, name, partner, self._scaling(module))

    def _scaling(self, module: str) -> float:
        try:
            rank = _by_pattern(self.config.get("rank_pattern"), module, self.config["r"])
            alpha = _by_pattern(self.config.get("alpha_pattern"), module, self.config["lora_alpha"])
            scaling = alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)
        except (ArithmeticError, AttributeError, TypeError, ValueError, re.error):  # whatever stands in the file
            scaling = math.nan
        if not math.isfinite(scaling):
            raise CheckpointError(
                "adapter_config.json", f"gives {module} no scaling", "it needs numbers for rank and alpha", _MERGE_FIRST
            )
        return scaling

    def _refuse_other_kinds(self, directory: Path) -> None:
        config = self.config
        wrong = [f"peft_type {config.get('peft_type')!r}"] if config.get("peft_type") != "LORA" else []
        wrong += [
            f"{field} {config[field]!r}"
            for field in (
                "use_dora",
                "fan_in_fan_out",
                "use_qalora",
                "modules_to_save",
                "lora_bias",
                "trainable_token_indices",
                "target_parameters",
                "layer_replication",
            )
            if config.get(field)
        ]
        if config.get("bias", "none") != "none":
            wrong.append(f"bias {config['bias']!r}")
        if not all(isinstance(config.get(field), (int, float)) for field in ("r", "lora_alpha")):
            wrong.append("no number for r or lora_alpha")
        if wrong:
            raise CheckpointError(
                str(directory / "adapter_config.json"),
                f"has {', '.join(wrong)}",
                "only plain LoRA can be merged",
                _MERGE_FIRST,
            )


def _by_pattern(patterns: Any, module: str, default: float) -> float:
    """Look a module up in PEFT's ``rank_pattern`` or ``alpha_pattern``; its keys match the ends of module names."""
    for key, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({key})", module):
            return float(value)
    return float(default)
