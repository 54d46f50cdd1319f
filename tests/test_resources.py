"""CPUs and memory of this process."""

import platform
import subprocess
import sys

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


def test_affinity_and_quota_limit_the_cpus(monkeypatch, tmp_path):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr(resources, "_own_cgroups", lambda: [tmp_path])
    assert resources.count_cpus() == 16
    for quota, cpus in (("350000 100000\n", 3), ("max 100000\n", 16)):
        (tmp_path / "cpu.max").write_text(quota)
        assert resources.count_cpus() == cpus


def test_container_limit_counts_for_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(resources, "_free_bytes", lambda: 50_000_000_000)
    monkeypatch.setattr(resources, "_own_cgroups", lambda: [tmp_path])
    assert resources.available_memory_gb() == 50
    (tmp_path / "memory.max").write_text("4000000000\n")
    (tmp_path / "memory.current").write_text("1000000000\n")
    assert resources.available_memory_gb() == 3
