"""CPUs and memory of this process."""

import platform
import subprocess
import sys
from collections.abc import Callable, Mapping

import pytest

from bids_dgmseg import resources

_TAKE_AND_FREE = """
import resource
import sys
import numpy as np
from bids_dgmseg.resources import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
np.ones(3_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    np.ones(3_000_000)
    np.ones(2_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's own")
def test_freed_memory_is_reused():
    faults = {}
    for choice in ("keep", "leave"):
        run = subprocess.run([sys.executable, "-c", _TAKE_AND_FREE, choice], capture_output=True, text=True, check=True)
        faults[choice] = int(run.stdout)
    assert faults["keep"] < faults["leave"] / 2  # pages that the system had to give


@pytest.fixture
def machine(monkeypatch, tmp_path) -> Callable[..., None]:
    """Function that writes the control groups of a machine with 16 CPUs and 50 GB of free memory."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.setattr(resources, "_free_bytes", lambda: 50_000_000_000)
    monkeypatch.setattr(resources, "_CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(resources, "_PROC_CGROUP", tmp_path / "proc")

    def write(own: str, files: Mapping[str, str]) -> None:
        (tmp_path / "proc").write_text(own)
        for name, content in files.items():
            path = tmp_path / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content + "\n")

    return write


CPU_1 = {"cpu.cfs_quota_us": "350000", "cpu.cfs_period_us": "100000"}
MEMORY_1 = {"memory.limit_in_bytes": "4000000000", "memory.usage_in_bytes": "1500000000"}
MEMORY_2 = {"memory.max": "4000000000", "memory.current": "1500000000"}
V1, DOCKER_V1 = "9:memory:{0}\n4:cpu,cpuacct:{0}\n1:name=systemd:{0}\n", "/docker/4f1c"


def inside(folder: str, files: Mapping[str, str]) -> dict[str, str]:
    return {f"{folder}/{name}": content for name, content in files.items()}


@pytest.mark.parametrize(
    ("own", "files", "cpus", "memory_gb"),
    [
        pytest.param("", {}, 16, 50, id="no control groups"),
        pytest.param("0::/\n", {"cpu.max": "350000 100000", **MEMORY_2}, 3, 2.5, id="version 2, container"),
        pytest.param("0::/\n", {"cpu.max": "max 100000", "memory.max": "max"}, 16, 50, id="version 2, unlimited"),
        pytest.param(
            "0::/a/b\n",
            {"a/cpu.max": "400000 100000", "a/b/cpu.max": "800000 100000", **inside("a", MEMORY_2)},
            4,
            2.5,
            id="version 2, limits of the parent",
        ),
        pytest.param(
            "0::/\n",
            {**MEMORY_2, "memory.stat": "anon 5\ninactive_file 500000000"},
            16,
            3,
            id="version 2, cached files",
        ),
        pytest.param(
            V1.format(DOCKER_V1),
            {**inside("cpu,cpuacct", CPU_1), **inside("memory", MEMORY_1)},
            3,
            2.5,
            id="version 1, own group is the root",
        ),
        pytest.param(
            V1.format("/slurm/job_7/step_0") + "0::/system.slice\n",
            {**inside("cpu/slurm/job_7", CPU_1), **inside("memory/slurm/job_7/step_0", MEMORY_1)},
            3,
            2.5,
            id="version 1 and 2, nested",
        ),
        pytest.param(
            V1.format("/"),
            {
                **inside("cpu", {**CPU_1, "cpu.cfs_quota_us": "-1"}),
                **inside("memory", {**MEMORY_1, "memory.limit_in_bytes": "9223372036854771712"}),
            },
            16,
            50,
            id="version 1, unlimited",
        ),
        pytest.param(
            V1.format("/"),
            inside("memory", {**MEMORY_1, "memory.stat": "inactive_file 1\ntotal_inactive_file 500000000"}),
            16,
            3,
            id="version 1, cached files",
        ),
    ],
)
def test_limits_of_containers_and_jobs_count(machine, own, files, cpus, memory_gb):
    machine(own, files)
    assert resources.count_cpus() == cpus
    assert resources.available_memory_gb() == pytest.approx(memory_gb)
