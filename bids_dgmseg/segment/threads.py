"""How many threads the networks use."""

from __future__ import annotations


def limit_threads(count: int) -> None:
    """Let the networks of this process use `count` threads."""
    import torch

    torch.set_num_threads(count)
