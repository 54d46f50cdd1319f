from __future__ import annotations

import io

import pytest
from rich.console import Console

from bids_dgmseg.console import RunProgress


def test_lines_are_plain_and_whole_when_there_is_no_terminal(capsys):
    long = "sub-02: " + "word " * 60 + "[not markup]"
    with RunProgress(2) as progress:
        progress.start("sub-01", "check")
        progress.start("sub-01", "save")
        progress.finish("sub-01")
        progress.fail("sub-02", long)
    out, err = capsys.readouterr()
    assert out == "sub-01: check\nsub-01: save\nsub-01: done (1 of 2)\n"
    assert err == long + "\n"


def test_done_and_failed_scans_are_counted_apart(capsys):
    with RunProgress(3) as progress:
        progress.fail("sub-01", "sub-01: all voxels are 0")
        progress.finish("sub-02")
    assert capsys.readouterr().out == "sub-02: done (1 of 3, 1 failed)\n"


def test_whatever_users_wrote_is_shown_on_one_line(capsys):
    progress = RunProgress(2)
    progress.info("sub-01: CSF \ud800")
    progress.info("sub-02: two\nlines")
    assert capsys.readouterr().out == "sub-01: CSF \\ud800\nsub-02: two\\nlines\n"


def test_the_display_counts_scans_and_names_steps():
    progress = RunProgress(3)
    progress.start("sub-01", "check")
    progress.start("sub-01", "segment")
    progress.finish("sub-02")
    progress.fail("sub-03", "sub-03: all voxels are 0")
    shown = io.StringIO()
    Console(file=shown, width=100).print(progress._draw())
    lines = shown.getvalue().splitlines()
    assert lines[0].rstrip() == "1 of 3 scans done, 1 failed, 1 running"
    assert lines[1].split()[:2] == ["sub-01", "segment"]


def test_a_terminal_gets_the_live_display(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # what rich takes for a terminal
    monkeypatch.setenv("TERM", "xterm")
    with RunProgress(1) as progress:
        progress.start("sub-01", "segment")
        progress.warn("sub-01: DN_L was not found")
    out, err = capsys.readouterr()
    assert "sub-01: DN_L was not found" in out
    assert "0 of 1 scans done" in out
    assert err == ""


@pytest.mark.parametrize("total", [0, 1])
def test_no_scan_is_no_trouble(total, capsys):
    with RunProgress(total):
        pass
    assert capsys.readouterr().out == ""
