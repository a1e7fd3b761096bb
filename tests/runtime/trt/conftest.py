"""A fixture that makes sessions on the simulated GPU."""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.engine_rig import MakeRig, Rig


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[MakeRig]:
    """Make rigs; at the end, nothing of theirs may be left on the GPU."""
    made: list[Rig] = []

    def make(*args: Any, **options: Any) -> Rig:
        made.append(Rig(tmp_path, *args, **options))
        return made[-1]

    yield make
    for each in made:
        each.session.close()
        each.session.close()
        assert each.cuda.left() == {}
        if each.module.engines:
            gc.collect()  # errors that the test caught may have held on to it
        assert not each.module.engines
        assert not each.module.contexts
