"""Sides for tests: a process of its own imports them, by a name that it finds."""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gircse.reporting.progress import StageProgress


class Computed(NamedTuple):
    vectors: np.ndarray
    nothing: np.ndarray
    name: str


def compute(progress: StageProgress, size: int, *, name: str) -> Computed:
    with progress.stage("first", total=size) as advance:
        advance(size)
    progress.note("a note")
    with progress.stage("second"):
        return Computed(np.arange(size, dtype=np.float32).reshape(-1, 2).T, np.empty((0, 3, 5), np.float32), name)


def fail(progress: StageProgress, error: Exception) -> None:
    with progress.stage("never done"):
        raise error


def die(_: StageProgress, number: int) -> None:
    os.kill(os.getpid(), number)


def break_down(_: StageProgress) -> None:
    raise AssertionError("a fault of ours")


def fill_the_disk(_: StageProgress, folder: Path) -> np.ndarray:
    folder.rmdir()
    folder.symlink_to("/dev/full")  # cannot hold files
    return np.ones(3)
