"""Processes that make a training's samples."""

from __future__ import annotations

import multiprocessing
import os
import threading
from multiprocessing.process import BaseProcess
from typing import Any

from bids_dgmseg.resources import keep_freed_memory


def in_workers(count: int) -> dict[str, Any]:
    """Give the options of a DataLoader whose samples are made in so many processes of their own; 0 for in this one."""
    if count == 0:
        return {"num_workers": 0}
    return {"num_workers": count, "multiprocessing_context": "forkserver", "worker_init_fn": _begin}


def _begin(worker: int) -> None:
    keep_freed_memory()
    _end_with_training()


def _end_with_training() -> None:
    """End this process when the training's is killed; torch watches its parent, the server of new processes."""
    training = multiprocessing.parent_process()
    if training is None:
        return

    def wait(process: BaseProcess) -> None:
        process.join()
        os._exit(1)

    threading.Thread(target=wait, args=(training,), daemon=True).start()
