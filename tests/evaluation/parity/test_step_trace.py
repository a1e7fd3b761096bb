"""Values that are not finite stop a run, and the message names the step where they began."""

import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from support.small_models import SmallModels, rehash

from gircse.evaluation import parity_command
from gircse.evaluation.parity.backends import BundleBackend
from gircse.evaluation.parity.step_trace import check_finite
from gircse.runtime import MeasurementError
from gircse.runtime.bundle import Bundle
from gircse.runtime.manifest import Layout

SOFT_TOKENS = np.zeros((1, 5, 48), np.float32)


def test_the_first_step_that_is_not_finite_is_named() -> None:
    values = np.zeros((5, 4, 3), np.float32)
    check_finite("b:fp16", "state h", values, first_step=1)
    values[4, 3] = np.nan
    values[2:4, 2, 1] = np.inf
    with pytest.raises(
        MeasurementError, match=r"b:fp16, step 3: state h_3 has NaN .* in 2 of 5 texts, first in text 2"
    ):
        check_finite("b:fp16", "state h", values, first_step=1)


@pytest.mark.parametrize(("start", "message"), [(-1, r"step 1: entropy of soft token s_1"), (0, r"step 0: ")])
@pytest.mark.parametrize("layout", Layout)
def test_nan_names_the_step(
    small_models: SmallModels, tmp_path: Path, layout: Layout, start: int, message: str
) -> None:
    """A vocabulary row that only the projection reads breaks step 1; the final norm breaks the prompt."""
    bundle = tmp_path / "bundle"
    shutil.copytree(small_models.bundle("llama"), bundle)
    path = bundle / "fp32" / "weights.bin"
    content = path.read_bytes()
    model = small_models.load("llama")
    tensor = model.get_input_embeddings().weight[-1] if start else model.model.norm.weight
    needle = tensor.detach().numpy().tobytes()
    assert content.count(needle) == 1
    path.write_bytes(content.replace(needle, np.full(48, np.nan, np.float32).tobytes()))
    rehash(bundle)
    backend = BundleBackend(Bundle.open(bundle), "fp32", layout=layout, threads=1)
    trace = backend.embed_and_trace if start == 0 else partial(backend.trace_and_force, soft_tokens=SOFT_TOKENS)
    with pytest.raises(MeasurementError, match=message):
        trace([[1, 2, 3]], advance=lambda _: None)
    assert parity_command.main([str(bundle), "--layout", layout]) == 2
