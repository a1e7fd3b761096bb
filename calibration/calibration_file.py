"""``calibration.json``: what ``gircse-calibrate`` measured, and ``gircse-export`` builds INT8 variants from.

Its fields are those of :class:`Calibration`. Every number is finite. The file names the model, the adapter and the
settings that it was measured with, and ``check`` refuses it for any other.
"""

import math
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Self

from gircse.runtime.errors import CalibrationError
from gircse.runtime.manifest import AdapterSource, ModelSource, Pooling, TokenizerKind
from gircse.runtime.precision import Precision
from gircse.runtime.records import Record, decode_versioned, encode_record

SCHEMA_VERSION = 3
OLDEST_SCHEMA_VERSION = 2
"""Version 2 had no ``tokenizer``, ``add_eos``, ``dtype`` and ``device``; all have defaults."""


class ModelFingerprint(Record, frozen=True):
    """What a calibration belongs to.

    Attributes:
        model: the backbone.
        norm_sha256: SHA-256 of the bytes of ``model.norm.weight``, which distinguishes fine-tuned checkpoints
            with the same config.
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
    """The calibration texts.

    Attributes:
        sha256: SHA-256 of the texts that were used, in order.
        samples: their number.
        tokens: their tokens.
        seed: what they were drawn with.
    """

    sha256: str
    samples: int
    tokens: int
    seed: int


class InputCalibration(Record, frozen=True):
    """Calibration of one quantized input; see ``int8/scheme.py`` and ``int8/smoothing.py``.

    Attributes:
        migration: SmoothQuant's migration strength, or None for no smoothing.
        smoothing: (in,) divisors of the activations; empty where all are 1.
        outlier_channels: channels that are excluded from quantization.
        ranges: (K + 1,) largest magnitude after smoothing, without outlier channels, in the prompt and at each step.
        thresholds: (K + 1,) magnitude that becomes 127, chosen by the method; at most the range.
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
        """The threshold of a graph, which runs the prompt and all steps."""
        return max(self.thresholds)


class SoftTokenCalibration(Record, frozen=True):
    """How INT8 variants make soft tokens: the sum over the top-k tokens, and a tail vector for the rest.

    Attributes:
        top_k: number of tokens that are summed.
        tail: (hidden,) vector that is multiplied with the remaining probability.
    """

    top_k: int
    tail: tuple[float, ...]


class Fidelity(Record, frozen=True):
    """How close the vectors stay to FP32 with something quantized, on held-out texts if there are enough.

    Attributes:
        name: what is quantized; for a trade-off curve, how much is excluded.
        rank_correlation: Spearman correlation of all pairwise similarities, after K steps.
        overlap: mean share of common ten nearest neighbors, after K steps.
    """

    name: str
    rank_correlation: float
    overlap: float


class SensitivityMode(StrEnum):
    """What the sensitivity is measured on."""

    FULL = "full"
    KINDS = "kinds"
    OFF = "off"


class Sensitivity(Record, frozen=True):
    """What ``int8`` costs in fidelity, and where.

    Attributes:
        excluded: inputs that are excluded from quantization, the most sensitive first; none if nothing was measured.
        result: fidelity with everything else quantized; None if nothing was measured.
        kinds: with one kind of input quantized alone.
        layers: with one layer quantized alone; empty unless the mode is ``full``.
        curve: with more and more inputs excluded, the most sensitive first; empty if none had to be.
        mode: ``full``; ``kinds``, where inputs are ranked by the error of their product alone; or ``off``, where
            nothing was measured.
    """

    excluded: tuple[str, ...]
    result: Fidelity | None
    kinds: tuple[Fidelity, ...]
    layers: tuple[Fidelity, ...]
    curve: tuple[Fidelity, ...]
    mode: SensitivityMode = SensitivityMode.FULL


class Calibration(Record, frozen=True):
    """Everything in ``calibration.json``.

    Attributes:
        schema_version: version of these fields.
        fingerprint: what it belongs to.
        texts: what it was measured on.
        method: how thresholds were chosen.
        max_tokens: number of tokens that texts were truncated to.
        max_drop: largest allowed loss of rank correlation, which ``excluded`` was chosen for.
        inputs: input name to its calibration.
        soft_token: how soft tokens are made; None for K = 0.
        moments_sha256: SHA-256 of the file of second moments next to this one, see ``moments_file.py``.
        sensitivity: of ``int8``, with the inputs that it excludes from quantization.
        tools: versions of the packages that made the file.
        tokenizer: which token ids the texts were given.
        add_eos: whether the end-of-sequence token was appended to each.
        dtype: type that PyTorch's model computed in.
        device: where, such as ``cpu`` or ``cuda``.
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
    tokenizer: TokenizerKind = TokenizerKind.JSON
    add_eos: bool = False
    dtype: Precision = Precision.FP32
    device: str = "cpu"

    @property
    def settings(self) -> dict[str, str | int | float | None]:
        """The settings that it was made with, by the names of ``ModelSettings``: the defaults of an export."""
        made = self.fingerprint
        return {
            "model": made.model.name,
            "adapter": made.adapter.name if made.adapter else "none",
            "revision": made.model.revision,
            "steps": made.steps,
            "pooling": made.pooling,
            "temperature": made.temperature,
            "max_tokens": self.max_tokens,
            "tokenizer": self.tokenizer,
            "add_eos": self.add_eos,
        }

    def to_json(self) -> bytes:
        """Return the content of the file.

        Raises:
            CalibrationError: a number is NaN or infinite.
        """
        self._check_finite("The calibration")
        return encode_record(self, indent=0)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file.

        Raises:
            CalibrationError: it cannot be read, is not a calibration, has another schema version, holds NaN or
                infinity, or values that no calibration gives.
        """
        try:
            content = path.read_bytes()
        except OSError as err:
            raise CalibrationError(
                f"--calibration {path}", f"cannot be read: {err.strerror}", None, "Check the path."
            ) from err
        calibration = decode_versioned(
            cls,
            content,
            where=f"--calibration {path}",
            oldest=OLDEST_SCHEMA_VERSION,
            newest=SCHEMA_VERSION,
            error=CalibrationError,
            remake="Calibrate again with gircse-calibrate.",
        )
        calibration._check_finite(f"--calibration {path}")
        calibration._check_inputs(f"--calibration {path}")
        return calibration

    def check(self, fingerprint: ModelFingerprint, path: Path) -> None:
        """Refuse to be used for anything but what was calibrated.

        Args:
            fingerprint: of what is exported.
            path: of this calibration, for the error.

        Raises:
            CalibrationError: model, adapter, K, pooling or temperature differ; the message names which.
        """
        ours, theirs = _facts(self.fingerprint), _facts(fingerprint)
        for name, value in theirs.items():
            if ours[name] != value:
                raise CalibrationError(
                    f"--calibration {path}",
                    f"was made with {name} {ours[name]}",
                    f"this export has {value}",
                    "Calibrate again with the same --model, --adapter, --steps, --pooling and --temperature.",
                )

    def _check_inputs(self, where: str) -> None:
        """Refuse inputs whose finite numbers no calibration gives."""
        passes = self.fingerprint.steps + 1
        for name, found in self.inputs.items():
            if not len(found.ranges) == len(found.thresholds) == passes:
                wrong = f"it has {passes} thresholds and ranges, for the prompt and each step"
            elif min(*found.thresholds, *found.ranges) < 0:
                wrong = "thresholds and ranges are 0 or more"
            elif min(found.smoothing, default=1.0) <= 0:
                wrong = "smoothing divides by numbers above 0"
            elif min(found.outlier_channels, default=0) < 0:
                wrong = "outlier channels are numbered from 0"
            else:
                continue
            raise CalibrationError(
                where, f"has values of input {name} that no calibration gives", wrong, "Calibrate again."
            )

    def _check_finite(self, where: str) -> None:
        groups: dict[str, tuple[float, ...]] = {
            f"input {name}": (*found.smoothing, *found.ranges, *found.thresholds, found.error, found.migration or 0.0)
            for name, found in self.inputs.items()
        }
        groups["settings"] = (self.max_drop, self.fingerprint.temperature)
        if self.soft_token is not None:
            groups["soft_token"] = self.soft_token.tail
        measured = self.sensitivity
        result = () if measured.result is None else (measured.result,)
        every = (*result, *measured.kinds, *measured.layers, *measured.curve)
        groups["sensitivity"] = tuple(x for f in every for x in (f.rank_correlation, f.overlap))
        for name, numbers in groups.items():
            if not all(map(math.isfinite, numbers)):
                raise CalibrationError(where, f"holds NaN or infinity in {name}", None, "Calibrate again.")


def _facts(fingerprint: ModelFingerprint) -> dict[str, object]:
    return {
        "config.json with SHA-256": fingerprint.model.config_sha256,
        "model.norm.weight with SHA-256": fingerprint.norm_sha256,
        "adapter with SHA-256": fingerprint.adapter.sha256 if fingerprint.adapter else "none",
        "steps": fingerprint.steps,
        "pooling": str(fingerprint.pooling),
        "temperature": fingerprint.temperature,
    }
