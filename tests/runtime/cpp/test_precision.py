"""The C++ runtime's table of precisions says what Python's says."""

import re
from pathlib import Path

from gircse.runtime.precision import CPU_ORDER, GPU_ORDER, SPECS

SOURCE = (Path(__file__).parents[3] / "runtime" / "cpp" / "src" / "precision.cpp").read_text(encoding="utf-8")


def test_the_rows_are_those_of_python() -> None:
    rows = re.findall(r'\{"([a-z0-9-]+)"' + 4 * ", (true|false)" + r", ([0-9.]+), \{([^}]+)\}\}", SOURCE)
    found = [
        (name, *(flag == "true" for flag in flags), float(limit), oldest.replace(", ", "."))
        for name, *flags, limit, oldest in rows
    ]
    expected = [
        (
            str(precision),
            spec.calibrated,
            spec.cpu,
            spec.cuda,
            spec.integer_products,
            spec.self_test_min_cosine,
            spec.onnxruntime,
        )
        for precision, spec in SPECS.items()
    ]
    assert found == expected


def test_the_orders_are_those_of_python() -> None:
    (gpu,) = re.findall(r"gpu_order\(\) \{ return \{(.*)\}; \}", SOURCE)
    assert re.findall(r'"([^"]+)"', gpu) == list(GPU_ORDER)
    assert [name for name in SPECS if SPECS[name].cpu] == list(CPU_ORDER)
