"""A limit of a control group counts, whichever version, and that of every group around it."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from gircse.checkpoint.available_memory import available_memory

GIB = 1 << 30


@pytest.fixture(autouse=True)
def free_in_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=20 * GIB))


def write_group(root: Path, group: str, **files: str) -> None:
    (root / group).mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (root / group / name.replace("__", ".")).write_text(content + "\n")


def write_membership(root: Path, line: str) -> None:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(f"1:cpu:/elsewhere\n{line}\n")


def test_without_control_groups_what_the_system_has_is_available(tmp_path: Path) -> None:
    assert available_memory(tmp_path) == 20 * GIB


@pytest.mark.parametrize("name", ["/", "/jobs/42"])
def test_version_2(tmp_path: Path, name: str) -> None:
    """What is cached counts as available."""
    write_membership(tmp_path, f"0::{name}")
    statistics = f"anon {2 * GIB}\ninactive_file {GIB}\nactive_file {GIB}"
    limit = {"memory__max": str(8 * GIB), "memory__current": str(4 * GIB), "memory__stat": statistics}
    write_group(tmp_path, f"sys/fs/cgroup/{name}", **limit)
    assert available_memory(tmp_path) == 6 * GIB


def test_the_limit_of_an_outer_group_holds_too(tmp_path: Path) -> None:
    write_membership(tmp_path, "0::/jobs/42")
    statistics = "inactive_file 0\nactive_file 0"
    for group, limit in (("sys/fs/cgroup/jobs", str(3 * GIB)), ("sys/fs/cgroup/jobs/42", "max")):
        write_group(tmp_path, group, memory__max=limit, memory__current=str(GIB), memory__stat=statistics)
    assert available_memory(tmp_path) == 2 * GIB


def test_version_1_in_a_container_that_sees_its_group_as_the_top(tmp_path: Path) -> None:
    write_membership(tmp_path, "4:memory:/docker/0123")
    statistics = f"inactive_file 5\nactive_file 5\ntotal_inactive_file {GIB}\ntotal_active_file 0"
    files = {
        "memory__limit_in_bytes": str(4 * GIB),
        "memory__usage_in_bytes": str(4 * GIB),
        "memory__stat": statistics,
    }
    write_group(tmp_path, "sys/fs/cgroup/memory", **files)
    assert available_memory(tmp_path) == GIB


def test_a_group_without_a_limit_changes_nothing(tmp_path: Path) -> None:
    write_membership(tmp_path, "0::/")
    write_group(tmp_path, "sys/fs/cgroup", memory__stat="anon 5")
    assert available_memory(tmp_path) == 20 * GIB


def test_a_group_that_is_over_its_limit_leaves_nothing(tmp_path: Path) -> None:
    write_membership(tmp_path, "0::/")
    statistics = "inactive_file 0\nactive_file 0"
    write_group(tmp_path, "sys/fs/cgroup", memory__max=str(GIB), memory__current=str(2 * GIB), memory__stat=statistics)
    assert available_memory(tmp_path) == 0
