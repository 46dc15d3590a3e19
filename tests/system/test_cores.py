"""Cores that a process may use, under the quotas of both versions of control groups."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rayexp.system import cores as module
from rayexp.system.cores import cores, cpu_quota

V1, V2 = "40 31 0:29 {root} {point} rw - cgroup cgroup rw,cpu,cpuacct", "40 31 0:29 {root} {point} rw - cgroup2 none rw"
HYBRID = "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw"
TMPFS = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755"


class Machine:
    """Files as procfs and the control groups' file system show them."""

    def __init__(self, top: Path) -> None:
        self.top, self.process = top, top / "proc/self"
        self.process.mkdir(parents=True)

    def write(self, path: str, text: str) -> None:
        file = self.top / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def quota(self, group: str, *mounts: str) -> float | None:
        self.write("proc/self/cgroup", group)
        self.write("proc/self/mountinfo", "\n".join((TMPFS, *mounts)))
        return cpu_quota(self.process, self.top)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def v1(machine: Machine, folder: str, quota: int, period: int = 100_000) -> None:
    machine.write(f"{folder}/cpu.cfs_quota_us", f"{quota}\n")
    machine.write(f"{folder}/cpu.cfs_period_us", f"{period}\n")


def test_no_groups_no_quota(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path, tmp_path) is None


@pytest.mark.parametrize(
    ("text", "quota"),
    [("max 100000", None), ("100000 100000", 1), ("250000 100000", 2.5), ("50000 100000", 0.5), ("", None)],
)
def test_unified(machine: Machine, text: str, quota: float | None) -> None:
    machine.write("sys/fs/cgroup/user.slice/job/cpu.max", text)
    assert machine.quota("0::/user.slice/job", V2.format(root="/", point="/sys/fs/cgroup")) == quota


@pytest.mark.parametrize(("number", "quota"), [(-1, None), (0, None), (100_000, 1), (150_000, 1.5)])
def test_divided(machine: Machine, number: int, quota: float | None) -> None:
    v1(machine, "sys/fs/cgroup/cpu/job", number)
    group = "5:cpuset:/\n4:cpu,cpuacct:/job\n0::/"
    assert machine.quota(group, V1.format(root="/", point="/sys/fs/cgroup/cpu"), HYBRID) == quota


def test_the_tightest_of_the_groups_above_counts(machine: Machine) -> None:
    machine.write("sys/fs/cgroup/a/b/c/cpu.max", "400000 100000")
    machine.write("sys/fs/cgroup/a/cpu.max", "150000 100000")
    machine.write("sys/fs/cgroup/a/b/cpu.max", "max 100000")
    assert machine.quota("0::/a/b/c", V2.format(root="/", point="/sys/fs/cgroup")) == 1.5
    v1(machine, "sys/fs/cgroup/cpu", 300_000)
    v1(machine, "sys/fs/cgroup/cpu/x/y", 200_000)
    assert machine.quota("4:cpu:/x/y", V1.format(root="/", point="/sys/fs/cgroup/cpu")) == 2
    assert machine.quota("4:cpu:/x", V1.format(root="/", point="/sys/fs/cgroup/cpu")) == 3


@pytest.mark.parametrize("group", ["0::/docker/abc", "0::/", "0::/../elsewhere", "0::/other"])
def test_a_container_sees_its_own_group_as_the_root(machine: Machine, group: str) -> None:
    machine.write("sys/fs/cgroup/cpu.max", "100000 100000")
    root = "/docker/abc" if group == "0::/docker/abc" else "/"
    assert machine.quota(group, V2.format(root=root, point="/sys/fs/cgroup")) == 1


def test_a_mount_point_with_a_blank(machine: Machine) -> None:
    machine.write("mnt/control groups/job/cpu.max", "200000 100000")
    assert machine.quota("0::/job", V2.format(root="/", point="/mnt/control\\040groups")) == 2


@pytest.mark.parametrize(("quota", "found"), [(None, 4), (1.0, 1), (1.9, 1), (0.25, 1), (2.0, 2), (64.0, 4)])
def test_whole_cores(monkeypatch: pytest.MonkeyPatch, quota: float | None, found: int) -> None:
    monkeypatch.setattr(module, "cpu_quota", lambda: quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)), raising=False)
    assert cores() == found


@pytest.fixture
def group_of_one_core() -> Iterator[Path]:
    top = next((p for p in (Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")) if (p / "cgroup.procs").exists()), None)
    if top is None or not os.access(top, os.W_OK) or cores() < 2:
        pytest.skip("needs two cores and the right to make control groups")
    group = top / f"rayexp-test-{os.getpid()}"
    try:
        group.mkdir()
        if (group / "cpu.max").exists():
            (group / "cpu.max").write_text("100000 100000")
        else:
            (group / "cpu.cfs_quota_us").write_text("100000")
    except OSError as error:
        if group.exists():
            group.rmdir()
        pytest.skip(f"no quota can be set here: {error}")
    yield group
    group.rmdir()


def test_a_real_quota_of_one_core(group_of_one_core: Path) -> None:
    code = (
        "import os, sys, pathlib\n"
        "pathlib.Path(sys.argv[1], 'cgroup.procs').write_text(str(os.getpid()))\n"
        "from rayexp.launch.local import here\n"
        "from rayexp.engine.runtime import replicas_of\n"
        "from rayexp.config import ExperimentConfig\n"
        "print(here().cpus, replicas_of(ExperimentConfig(), 8))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(group_of_one_core)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["1", "1"]
