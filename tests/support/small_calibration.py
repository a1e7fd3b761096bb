"""A calibration made up by hand: what the file and the report are tested with."""

import msgspec

from gircse.calibration.calibration_file import (
    SCHEMA_VERSION,
    Calibration,
    Fidelity,
    InputCalibration,
    ModelFingerprint,
    Sensitivity,
    SoftTokenCalibration,
    TextsUsed,
)
from gircse.calibration.int8.scheme import InputKind, decoder_inputs
from gircse.runtime.manifest import AdapterSource, ModelSource, Pooling

EXCLUDED = ("model.layers.0.mlp_output", "lm_head")
ZERO = "model.layers.1.mlp_output"
FINGERPRINT = ModelFingerprint(
    model=ModelSource("local/mod|el", "abc123", "1" * 64),
    norm_sha256="2" * 64,
    adapter=AdapterSource("demo", None, "3" * 64),
    steps=2,
    pooling=Pooling.MEAN,
    temperature=1.0,
)


def small_calibration(steps: int = 2) -> Calibration:
    """Two layers; one input of the second is always zero, and two inputs have to be excluded."""
    inputs = {one.name: _input(one.kind, steps) for one in decoder_inputs(2)[: None if steps else -1]}
    inputs[EXCLUDED[0]] = _input(InputKind.MLP_OUTPUT, steps, prompt=800.0)
    inputs[ZERO] = InputCalibration(None, (), (), (0.0,) * (steps + 1), (0.0,) * (steps + 1), 0.0)
    kinds = tuple(Fidelity(kind, 0.998, 0.95) for kind in InputKind)
    soft_token = Fidelity("soft-token embedding", 1.0, 1.0)
    layers = (
        Fidelity("model.layers.0", 0.97, 0.8),
        Fidelity("model.layers.1", 0.9999, 0.99),
        Fidelity("lm_head", 0.99975, 0.99),
    )
    everything, one, two = (
        Fidelity("everything", 0.9375, 0.7),
        Fidelity("1 excluded", 0.99, 0.85),
        Fidelity("2 excluded", 0.9965, 0.925),
    )
    curve = (everything, one, two)
    return Calibration(
        schema_version=SCHEMA_VERSION,
        fingerprint=msgspec.structs.replace(FINGERPRINT, steps=steps),
        texts=TextsUsed("4" * 64, samples=48, tokens=1234, seed=7),
        method="entropy",
        max_tokens=48,
        max_drop=0.005,
        inputs=inputs,
        moments_sha256="5" * 64,
        soft_token=SoftTokenCalibration(128, (0.5, -0.25)) if steps else None,
        sensitivity=Sensitivity(EXCLUDED[: 2 if steps else 1], two, (*kinds, soft_token), layers, curve),
        tools={"torch": "2.11.0", "gircse-deploy": "0.1.0"},
    )


def _input(kind: InputKind, steps: int, *, prompt: float = 4.0) -> InputCalibration:
    ranges = (0.0 if kind is InputKind.VOCABULARY else prompt, *(2.0 + step for step in range(steps)))
    migration = 0.5 if kind is InputKind.MLP_INPUT else None
    return InputCalibration(migration, (1.0, 2.0), (3,), ranges, ranges, 0.016)
