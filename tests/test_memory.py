"""Memory that a process frees stays with it."""

import platform
import subprocess
import sys

import pytest

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
