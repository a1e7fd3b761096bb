"""Progress of a build: from TensorRT's nested phases to one fraction."""

import random

import pytest

from gircse.export.engine.progress import PhaseProgress, progress_monitor


def test_progress_of_nested_phases() -> None:
    """By hand: two steps of the root, whose first one holds a phase of four."""
    grown: list[float] = []
    progress = PhaseProgress(grown.append)
    progress.start("build", None, 2)
    progress.start("tactics", "build", 4)
    for step in range(4):
        progress.step("tactics", step)
    progress.finish("tactics")
    assert grown == pytest.approx([0.125] * 4)
    progress.step("build", 0)
    assert sum(grown) == pytest.approx(0.5)
    progress.start("serialize", "build", 1)
    progress.start("copy", "serialize", 2)
    progress.step("copy", 0)
    assert sum(grown) == pytest.approx(0.75)
    progress.finish("copy")
    progress.finish("serialize")
    progress.finish("build")
    assert sum(grown) == pytest.approx(1.0)


def test_progress_reported_in_a_strange_order() -> None:
    grown: list[float] = []
    progress = PhaseProgress(grown.append)
    progress.step("nobody", 3)  # never began
    progress.finish("nobody")
    assert not grown
    progress.start("build", None, 4)
    progress.step("build", 2)
    progress.step("build", 0)  # late: nothing goes back
    assert sum(grown) == pytest.approx(0.75)
    progress.start("orphan", "gone", 2)  # its parent is unknown
    progress.step("orphan", 0)
    assert sum(grown) == pytest.approx(0.75)
    progress.step("build", 99)  # more steps than were announced
    assert sum(grown) == pytest.approx(1.0)
    progress.start("late", "build", 2)  # begins when its parent has no step left
    progress.finish("late")
    progress.finish("build")
    progress.finish("build")
    assert sum(grown) == pytest.approx(1.0)


def test_phase_without_steps() -> None:
    grown: list[float] = []
    progress = PhaseProgress(grown.append)
    progress.start("build", None, 0)
    progress.finish("build")
    assert grown == [1.0]


@pytest.mark.parametrize("seed", range(20))
def test_progress_grows_to_one_whatever_is_reported(seed: int) -> None:
    """Random phases, steps and ends in any order, then the end of the root."""
    draw = random.Random(seed)
    grown: list[float] = []
    progress = PhaseProgress(grown.append)
    progress.start("root", None, draw.randint(0, 4))
    for _ in range(200):
        name = draw.choice("abcde")
        match draw.randint(0, 3):
            case 0:
                progress.start(name, draw.choice(["root", None, *"abcde"]), draw.randint(0, 5))
            case 1:
                progress.finish(name)
            case _:
                progress.step(draw.choice(["root", name]), draw.randint(0, 6))
        assert all(amount > 0 for amount in grown)
        assert sum(grown) <= 1 + 1e-9
    progress.finish("root")
    assert sum(grown) == pytest.approx(1.0)


def test_monitor_of_a_module() -> None:
    """The base class must be initialized by name, as pybind11 requires, and no step may cancel the build."""

    class Base:
        ready = False

        def __init__(self) -> None:
            self.ready = True

    class Module:
        IProgressMonitor = Base

    grown: list[float] = []
    monitor = progress_monitor(Module, grown.append)
    assert monitor.ready
    monitor.phase_start("build", None, 2)
    assert monitor.step_complete("build", 0) is True
    assert grown == [0.5]
    monitor.phase_finish("build")
    assert grown == [0.5, 0.5]
