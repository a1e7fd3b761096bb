"""Progress of a TensorRT build: the fraction done, from the builder's nested phases.

A phase of n steps runs inside one step of its parent, so its k-th step is at::

    start of the phase + k / n * (width of one step of the parent)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass
class _Phase:
    start: float
    width: float
    steps: int
    done: int = 0

    @property
    def position(self) -> float:
        return self.start + self.width * self.done / self.steps


class PhaseProgress:
    """Follows the phases and reports how much the fraction done has grown."""

    def __init__(self, on_growth: Callable[[float], None]) -> None:
        """Take a function that is called with the growth, as a fraction of 1."""
        self._on_growth = on_growth
        self._phases: dict[str, _Phase] = {}
        self._done = 0.0

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        """Begin a phase of so many steps inside the current step of its parent."""
        outer = self._phases.get(parent or "")
        start, width = (outer.position, outer.width / outer.steps) if outer else (0.0, 1.0)
        self._phases[phase] = _Phase(start, width, max(steps, 1))

    def step(self, phase: str, step: int) -> None:
        """Finish a step, counted from 0."""
        found = self._phases.get(phase)
        if found is not None:
            found.done = min(step + 1, found.steps)
            self._reach(found.position)

    def finish(self, phase: str) -> None:
        """End a phase, whether or not every step was reported."""
        found = self._phases.pop(phase, None)
        if found is not None:
            self._reach(found.start + found.width)

    def _reach(self, position: float) -> None:
        position = min(position, 1.0)  # a phase that begins after its parent's last step would lie beyond the end
        if position > self._done:
            self._on_growth(position - self._done)
            self._done = position


def progress_monitor(module: Any, on_growth: Callable[[float], None]) -> Any:
    """Return an ``IProgressMonitor`` of a TensorRT module that calls ``on_growth`` with the fraction of 1 just done."""
    progress = PhaseProgress(on_growth)

    class Monitor(module.IProgressMonitor):  # type: ignore[misc]  # a class of the module passed in
        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            progress.start(phase_name, parent_phase, num_steps)

        def phase_finish(self, phase_name: str) -> None:
            progress.finish(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            progress.step(phase_name, step)
            return True

    return Monitor()
