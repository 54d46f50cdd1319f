from __future__ import annotations

import os
import signal

import pytest

from bids_dgmseg.workflow.environment import terminate_as_interrupt


def test_sigterm_interrupts_the_block():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt, match=r"^$"), terminate_as_interrupt():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
