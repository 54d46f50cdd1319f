from __future__ import annotations

import io

from rich.console import Console

from bids_dgmseg.console import RunProgress, StatusLine
from tests.terminal import Terminal


def test_lines_are_plain_without_a_terminal(capsys):
    long = "sub-02: " + "word " * 60 + "[not markup]"
    with RunProgress(2) as progress:
        progress.start("sub-01", "prepare")
        progress.start("sub-01", "save")
        progress.finish("sub-01")
        progress.fail("sub-02", long)
    out, err = capsys.readouterr()
    assert out == "sub-01: prepare\nsub-01: save\nsub-01: done (1 of 2)\n"
    assert err == long + "\n"


def test_parameters_are_printed_as_options(capsys):
    progress = RunProgress(2)
    progress.info("set `mem_gb`; see `dgmseg status`")
    StatusLine().log("use `start`")
    assert capsys.readouterr().out == "set --mem-gb; see `dgmseg status`\nuse --from\n"
    progress.fail("sub-01", "sub-01: use `weights` FOLDER")
    assert capsys.readouterr().err == "sub-01: use --weights FOLDER\n"


def test_display_shows_counts_and_steps():
    progress = RunProgress(3)
    progress.start("sub-01", "prepare")
    progress.start("sub-01", "segment")
    progress.finish("sub-02")
    progress.fail("sub-03", "sub-03: all voxels are 0")
    shown = io.StringIO()
    Console(file=shown, width=100).print(progress._draw())
    lines = shown.getvalue().splitlines()
    assert lines[0].rstrip() == "1 of 3 scan(s) done, 1 failed, 1 running"
    assert lines[1].split()[:2] == ["sub-01", "segment"]


def test_terminal_has_a_live_display(monkeypatch, capsys):
    terminal = Terminal.connected(monkeypatch)
    with RunProgress(1) as progress:
        progress.start("sub-01", "segment")
        progress.warn("sub-01: DN_L was not found")
    out, err = terminal.getvalue(), capsys.readouterr().err
    assert "sub-01: DN_L was not found" in out
    assert "0 of 1 scan(s) done" in out
    assert err == ""


def test_status_is_replaced_on_a_terminal(monkeypatch):
    terminal, line = Terminal.connected(monkeypatch), StatusLine()
    for text in ("step 1", "step 2"):
        line.update(text)
    assert terminal.lines == ["step 2"]
    line.log("epoch 1 is over")
    line.update("step 3")
    assert terminal.lines == ["epoch 1 is over", "step 3"]


def test_file_has_no_status(capsys):
    with StatusLine() as line:
        line.update("step 1")
        line.log("epoch 1")
    assert capsys.readouterr().out == "epoch 1\n"
