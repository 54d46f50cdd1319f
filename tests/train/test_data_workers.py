"""Processes that make a training's samples end with it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

_TRAINING = """
import os, signal, sys
import torch
from pathlib import Path
from torch.utils.data import DataLoader, TensorDataset
from bids_dgmseg.train.data_workers import in_workers

def stay(samples):
    for _ in DataLoader(samples, **in_workers(1)):
        print(os.getpid(), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    stay(TensorDataset(torch.zeros(1000, 1)))
"""


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="counts processes as Linux shows them")
def test_a_training_that_is_killed_leaves_no_process_behind(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(_TRAINING)
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, start_new_session=True) as training:
        assert training.stdout
        assert training.stdout.readline().strip() == str(training.pid).encode()
        training.wait()
        deadline = time.monotonic() + 60
        while (left := group_members(training.pid)) and time.monotonic() < deadline:
            time.sleep(0.2)
    for process in left:
        os.kill(process, signal.SIGKILL)
    assert left == []


def group_members(leader: int) -> list[int]:
    """List living processes of a process group."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            group, state = os.getpgid(int(folder.name)), (folder / "stat").read_text().rsplit(")", 1)[1].split()[0]
        except (ProcessLookupError, FileNotFoundError):
            continue
        if group == leader and state != "Z":
            found.append(int(folder.name))
    return found
