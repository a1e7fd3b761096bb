"""Hidden states stay in their file, and a disk without room for them is an error."""

import errno
import os
from pathlib import Path

import pytest
import torch

from gircse.calibration.hidden_states import HiddenStates

SHAPES = [(2, 3, 4), (1, 5, 4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_are_there_when_the_file_is_mapped_again(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "states.bin"
    values = [torch.arange(24.0).reshape(2, 3, 4), -torch.arange(20.0).reshape(1, 5, 4)]
    states = HiddenStates(path, SHAPES, dtype)
    for index, value in enumerate(values):
        states[index].copy_(value)
    del states
    assert path.stat().st_size == 44 * dtype.itemsize
    again = HiddenStates(path, SHAPES, dtype)
    assert all(torch.equal(again[index], value.to(dtype)) for index, value in enumerate(values))


def test_a_full_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        HiddenStates(tmp_path / "states.bin", SHAPES, torch.float32)
