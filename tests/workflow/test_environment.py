from __future__ import annotations

import logging
import os
import signal
import warnings

import pytest

from bids_dgmseg.workflow.environment import LOG_NAME, log_to, terminate_as_interrupt


def test_logs_and_warnings_go_only_to_the_file(tmp_path, capfd):
    with log_to(tmp_path):
        logging.getLogger("nipype.workflow").warning("a node is slow")
        logging.getLogger("nibabel.global").warning("sizeof_hdr should be 348")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("mean of empty slice", RuntimeWarning, stacklevel=1)
    text = (tmp_path / LOG_NAME).read_text()
    assert "nipype.workflow WARNING: a node is slow" in text
    assert "nibabel.global WARNING: sizeof_hdr should be 348" in text
    assert "RuntimeWarning: mean of empty slice" in text
    assert capfd.readouterr() == ("", "")


def test_no_messages_write_no_file(tmp_path):
    with log_to(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_verbose_run_prints_the_log(tmp_path, capsys):
    with log_to(tmp_path, verbose=True):
        logging.getLogger("nipype.workflow").warning("a node is slow")
    assert "a node is slow" in capsys.readouterr().err


def test_sigterm_interrupts_the_block():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt, match=r"^$"), terminate_as_interrupt():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
