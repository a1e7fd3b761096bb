"""The real demo backbone, without adapter, against vectors of the official code: every K and pooling there is."""

import json
from pathlib import Path

import numpy as np
import pytest
from support.tolerances import BATCH_MAX_DIFFERENCE_DEMO, OFFICIAL_MIN_COSINE, PREFIX_MAX_DIFFERENCE_DEMO

from gircse.export.exporter import export_bundle
from gircse.export.options import ExportOptions
from gircse.runtime import Embedder
from gircse.runtime.numerics import row_cosine

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("pooling", "layout"), [("mean", "unrolled"), ("last", "stepwise")])
def test_official_vectors(golden_directory: Path, tmp_path: Path, pooling: str, layout: str) -> None:
    inputs = json.loads((golden_directory / "inputs.json").read_text(encoding="utf-8"))
    official = np.load(golden_directory / "official_fp32.npz")
    options = ExportOptions(output=tmp_path / "bundle", steps=8, adapter="none", pooling=pooling)
    bundle = export_bundle(options)
    embedder = Embedder(bundle, layout=layout, threads=2, prefix_cache=False)
    assert embedder.self_test().passed

    suffix = {"mean": "generate_mean", "last": "last"}[pooling]
    compared = 0
    for number, instruction in enumerate(inputs["instructions"]):
        ours = embedder.encode(inputs["texts"], instruction=instruction, all_steps=True)
        for key in official:
            if key.startswith(f"i{number}_") and key.endswith(f"_{suffix}"):
                steps = int(key.split("_")[1].removeprefix("k"))
                assert row_cosine(ours[:, steps - 1], official[key]).min() > OFFICIAL_MIN_COSINE, key
                compared += 1
    assert compared == sum(key.endswith(f"_{suffix}") for key in official) > 0

    # Without an adapter the model amplifies rounding, and an instruction that is computed apart changes the last bits.
    both = [Embedder(bundle, layout="stepwise", threads=2, prefix_cache=cached) for cached in (True, False)]
    for instruction in inputs["instructions"]:
        found, whole = (one.encode(inputs["texts"], instruction=instruction) for one in both)
        assert np.abs(found - whole).max() < PREFIX_MAX_DIFFERENCE_DEMO[pooling]

    alone = np.concatenate([embedder.encode([text]) for text in inputs["texts"]])
    assert np.abs(alone - embedder.encode(inputs["texts"])).max() < BATCH_MAX_DIFFERENCE_DEMO[pooling]
