"""``calibration.json``: what ``gircse-calibrate`` found, and what ``gircse-export`` builds INT8 variants from.

The fields are those of :class:`Calibration`. Every number is finite. The file names the model, the adapter and the
settings that it was measured with, and ``check`` refuses it for any other.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from gircse.runtime.errors import CheckpointError
from gircse.runtime.manifest import AdapterSource, ModelSource, Pooling
from gircse.runtime.records import Record, decode_versioned, encode_record

SCHEMA_VERSION = 2


class ModelFingerprint(Record, frozen=True):
    """What a calibration belongs to.

    Attributes:
        model: the backbone.
        norm_sha256: SHA-256 of the bytes of ``model.norm.weight``, which tells fine-tuned checkpoints of one config apart.
        adapter: the LoRA, or None.
        steps: K.
        pooling: ``mean`` or ``last``; the sensitivity is that of the pooled vectors.
        temperature: divisor of the logits.
    """

    model: ModelSource
    norm_sha256: str
    adapter: AdapterSource | None
    steps: int
    pooling: Pooling
    temperature: float


class TextsUsed(Record, frozen=True):
    """The calibration texts: SHA-256 of those that were used, in order, their number and tokens, and the seed."""

    sha256: str
    samples: int
    tokens: int
    seed: int


class InputCalibration(Record, frozen=True):
    """One quantized input; see ``sites.py`` and ``smoothing.py``.

    Attributes:
        migration: SmoothQuant's migration strength, or None for no smoothing.
        smoothing: (in,) divisors of the activations, or nothing where all are 1.
        outlier_channels: channels that stay in float.
        ranges: (K + 1,) largest magnitude after smoothing, float channels apart, in the prompt and at each step.
        thresholds: (K + 1,) magnitude that becomes 127, by the method; at most the range.
        error: root of the mean squared relative error of the quantized product, over the sampled rows.
    """

    migration: float | None
    smoothing: tuple[float, ...]
    outlier_channels: tuple[int, ...]
    ranges: tuple[float, ...]
    thresholds: tuple[float, ...]
    error: float

    @property
    def threshold(self) -> float:
        """The threshold of one graph for the prompt and all steps."""
        return max(self.thresholds)


class SoftTokenCalibration(Record, frozen=True):
    """The soft token as the ``top_k`` most probable tokens, summed, and ``tail`` (hidden,) times the remaining mass."""

    top_k: int
    tail: tuple[float, ...]


class Fidelity(Record, frozen=True):
    """How near the vectors stay to FP32 with something quantized; on texts left out of the calibration, if enough were.

    Attributes:
        name: what is quantized, or for a trade-off curve, what is kept.
        rank_correlation: of all pairs' similarities, after K steps.
        overlap: of ten nearest neighbors, after K steps.
    """

    name: str
    rank_correlation: float
    overlap: float


class Sensitivity(Record, frozen=True):
    """What ``int8`` costs in fidelity, and where.

    Attributes:
        excluded: inputs whose products stay in float.
        result: fidelity with everything else quantized.
        kinds: with one kind of input quantized alone.
        layers: with one layer quantized alone.
        curve: with more and more inputs kept, the most sensitive first; empty if nothing had to be kept.
    """

    excluded: tuple[str, ...]
    result: Fidelity
    kinds: tuple[Fidelity, ...]
    layers: tuple[Fidelity, ...]
    curve: tuple[Fidelity, ...]


class Calibration(Record, frozen=True):
    """Everything in ``calibration.json``.

    Attributes:
        schema_version: version of these fields.
        fingerprint: what it belongs to.
        texts: what it was measured on.
        method: how thresholds were chosen.
        max_tokens: longest prompt that the texts were cut to.
        max_drop: largest loss of rank correlation that the kept inputs were chosen for.
        inputs: input name to its calibration.
        soft_token: how the soft token is made; None for K = 0.
        moments_sha256: SHA-256 of the file of second moments beside this one, see ``moments_file.py``.
        sensitivity: of ``int8``; the inputs that it keeps in float.
        tools: versions of the packages that made the file.
    """

    schema_version: int
    fingerprint: ModelFingerprint
    texts: TextsUsed
    method: str
    max_tokens: int
    max_drop: float
    inputs: Mapping[str, InputCalibration]
    soft_token: SoftTokenCalibration | None
    moments_sha256: str
    sensitivity: Sensitivity
    tools: Mapping[str, str]

    @property
    def settings(self) -> dict[str, str | int | float | None]:
        """What it was made with, by the names of ``ModelSettings``: what an export takes where it is told nothing else."""
        made = self.fingerprint
        return {
            "model": made.model.name,
            "adapter": made.adapter.name if made.adapter else "none",
            "revision": made.model.revision,
            "steps": made.steps,
            "pooling": made.pooling,
            "temperature": made.temperature,
            "max_tokens": self.max_tokens,
        }

    def to_json(self) -> bytes:
        """Return the content of the file.

        Raises:
            CheckpointError: a number is NaN or infinite.
        """
        self._check_finite("calibration")
        return encode_record(self, indent=0)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file.

        Raises:
            CheckpointError: it cannot be read, is no calibration, is of a newer schema, or holds NaN or infinity.
        """
        try:
            content = path.read_bytes()
        except OSError as err:
            raise CheckpointError(
                f"--calibration {path}: {err.strerror} | a file of gircse-calibrate | check the path"
            ) from err
        calibration = decode_versioned(
            cls,
            content,
            where=f"--calibration {path}",
            oldest=SCHEMA_VERSION,
            newest=SCHEMA_VERSION,
            error=CheckpointError,
            remake="Calibrate again.",
        )
        calibration._check_finite(str(path))
        return calibration

    def check(self, fingerprint: ModelFingerprint, path: Path) -> None:
        """Refuse to be used for anything but what was calibrated.

        Raises:
            CheckpointError: model, adapter, K, pooling or temperature differ; the message names which.
        """
        ours, theirs = _facts(self.fingerprint), _facts(fingerprint)
        for name, value in theirs.items():
            if ours[name] != value:
                raise CheckpointError(
                    f"--calibration {path}: {name} {ours[name]} | {value}, as this export has | calibrate again with the "
                    "same --model, --adapter, --steps, --pooling and --temperature"
                )

    def _check_finite(self, where: str) -> None:
        groups: dict[str, tuple[float, ...]] = {
            f"input {name}": (*s.smoothing, *s.ranges, *s.thresholds, s.error, s.migration or 0.0)
            for name, s in self.inputs.items()
        }
        groups["settings"] = (self.max_drop, self.fingerprint.temperature)
        if self.soft_token is not None:
            groups["soft_token"] = self.soft_token.tail
        found = self.sensitivity
        every = (found.result, *found.kinds, *found.layers, *found.curve)
        groups["sensitivity"] = tuple(x for f in every for x in (f.rank_correlation, f.overlap))
        for name, numbers in groups.items():
            if not all(map(math.isfinite, numbers)):
                raise CheckpointError(f"{where}: {name} holds NaN or infinity | finite numbers | calibrate again")


def _facts(fingerprint: ModelFingerprint) -> dict[str, object]:
    return {
        "config.json with SHA-256": fingerprint.model.config_sha256,
        "model.norm.weight with SHA-256": fingerprint.norm_sha256,
        "adapter with SHA-256": fingerprint.adapter.sha256 if fingerprint.adapter else None,
        "steps": fingerprint.steps,
        "pooling": str(fingerprint.pooling),
        "temperature": fingerprint.temperature,
    }
