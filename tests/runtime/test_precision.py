"""The table of precisions."""

import pytest

from gircse.runtime.precision import Precision, runs_on
from gircse.runtime.provider import Provider


@pytest.mark.parametrize(
    ("provider", "precisions"),
    [
        (Provider.AUTO, "fp32 fp16 bf16 int8 int8-weights int4-weights fp8"),
        (Provider.CPU, "fp32 fp16 int8 int8-weights int4-weights fp8"),
        (Provider.CUDA, "fp32 fp16 bf16"),
        (Provider.ORT_TENSORRT, "fp32 fp16 bf16"),
        (Provider.TENSORRT, "fp32 fp16 bf16 int8 int8-weights int4-weights fp8"),
        (Provider.TENSORRT_RTX, "fp32 fp16 bf16 int8 int8-weights int4-weights fp8"),
    ],
)
def test_what_a_provider_runs(provider: Provider, precisions: str) -> None:
    assert [precision for precision in Precision if runs_on(precision, provider)] == precisions.split()
    assert runs_on("of a later version", provider)
