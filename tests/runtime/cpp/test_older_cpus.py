"""The C++ runtime, too, gives the vectors of INT8 on x86 CPUs without VNNI."""

from pathlib import Path

import numpy as np
import pytest
from support.int8_bundles import INT8, int8_bundle
from support.older_cpus import AVX2, MAX_DIFFERENCE, TEXTS, needs_qemu, run_on
from support.small_models import SmallModels

from gircse.runtime import Embedder
from gircse.runtime.integer_products import PROBE

SOURCE = Path(__file__).parents[3] / "runtime" / "cpp" / "src" / "ort" / "integer_products.cpp"


@needs_qemu
@pytest.mark.usefixtures("find_onnxruntime")
@pytest.mark.parametrize("precision", INT8)
def test_vectors_without_vnni(small_models: SmallModels, cpp_command: Path, tmp_path: Path, precision: str) -> None:
    bundle, output = int8_bundle(small_models, "llama"), tmp_path / "vectors.npy"
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(TEXTS), encoding="utf-8")
    files = ("--input", texts, "--output", output)
    run_on(AVX2, cpp_command, bundle, "--precision", precision, "--threads", "1", *files)
    with Embedder(bundle, precision=precision, threads=1) as embedder:
        np.testing.assert_allclose(np.load(output), embedder.encode(TEXTS), atol=MAX_DIFFERENCE[AVX2])


def test_the_probe_is_that_of_python() -> None:
    numbers = SOURCE.read_text(encoding="utf-8").split("kProbe[] = {")[1].split("}")[0]
    assert bytes(int(number, 16) for number in numbers.replace(",", " ").split()) == PROBE
