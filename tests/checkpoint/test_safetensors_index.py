"""Tensors are found across files and read as FP32; files that cannot be used are refused by their headers."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gircse.checkpoint.safetensors_index import SafetensorsIndex
from gircse.runtime.errors import CheckpointError


def test_rows_of_every_file_are_read_as_fp32(tmp_path: Path) -> None:
    first, second = torch.arange(12.0).reshape(4, 3), torch.arange(6.0).reshape(2, 3)
    save_file({"a": first.bfloat16()}, tmp_path / "1.safetensors")
    save_file({"b": second}, tmp_path / "2.safetensors")
    index = SafetensorsIndex([tmp_path / "1.safetensors", tmp_path / "2.safetensors"])
    assert {name: stored.shape for name, stored in index.entries.items()} == {"a": (4, 3), "b": (2, 3)}
    assert torch.equal(index.read_rows("a", slice(1, 3)), first[1:3])
    assert torch.equal(index.read_rows("b"), second)
    assert index.read_rows("a").dtype is torch.float32


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(2, dtype=torch.int8)}, path)
    message = r"x\.safetensors holds a as I8; weights can be F32, F16, BF16\. Use a checkpoint that is not quantized\.$"
    with pytest.raises(CheckpointError, match=message):
        SafetensorsIndex([path])


@pytest.mark.parametrize("left", [0, 4, 40])
def test_truncated_files_are_refused(tmp_path: Path, left: int) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(CheckpointError, match=r"x\.safetensors cannot be read as safetensors: .*truncated or damaged"):
        SafetensorsIndex([path])
