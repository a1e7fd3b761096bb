"""How much memory there is: of the machine, or of the control group that a container or a batch job has been put in."""

from collections.abc import Iterator
from pathlib import Path

import psutil

_FILES = (
    # controller in /proc/self/cgroup, its folder, limit, usage, and the prefix of the totals in memory.stat
    ("", "sys/fs/cgroup", "memory.max", "memory.current", ""),
    ("memory", "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
)
"""Version 2 of control groups, then version 1."""


def available_memory(root: Path = Path("/")) -> int:
    """Return the bytes that this process can still take.

    The system does not count what a control group allows: a container of 8 GB on a machine of 64 would be told that 64
    are free, and be killed. What the page cache holds counts as available, as it does for the system.

    Args:
        root: where ``proc`` and ``sys`` are.
    """
    return max(0, min((psutil.virtual_memory().available, *_left_by_groups(root))))


def _left_by_groups(root: Path) -> Iterator[int]:
    """Yield what every group leaves that the process is in; none where the system has no control groups."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, name = line.split(":", 2)
        for controller, folder, limit, usage, prefix in _FILES:
            if controller not in controllers.split(","):
                continue
            top = root / folder
            group = top / name.lstrip("/")
            for each in (group, *group.parents):  # a limit holds for all groups inside; a container sees its own as top
                if each.is_relative_to(top) and (left := _left(each, limit, usage, prefix)) is not None:
                    yield left


def _left(group: Path, limit: str, usage: str, prefix: str) -> int | None:
    """Return what a group leaves; None where it is not limited."""
    try:
        allowed = int((group / limit).read_text())
        used = int((group / usage).read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        cached = sum(int(statistics[f"{prefix}{kind}_file"]) for kind in ("active", "inactive"))
    except (OSError, ValueError, KeyError):  # not there, or "max"
        return None
    return allowed - used + cached
