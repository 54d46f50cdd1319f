import io

import pytest

from bids_dgmseg.console import StatusLine
from tests.terminal import Terminal


def test_on_a_terminal_a_shown_line_gives_way_to_the_next(monkeypatch):
    terminal, line = Terminal.connected(monkeypatch), StatusLine()
    for text in ("step 1", "step 2"):
        line.update(text)
    assert terminal.lines == ["step 2"]
    line.log("epoch 1 is over")
    line.update("step 3")
    assert terminal.lines == ["epoch 1 is over", "step 3"]


def test_a_shown_line_stays_on_one_row_and_a_kept_one_whole(monkeypatch):
    terminal, line = Terminal.connected(monkeypatch, columns=20), StatusLine()
    line.log("x" * 30)
    line.update("y" * 30)
    assert terminal.lines == ["x" * 30, "y" * 19]


def test_an_error_finds_an_empty_row(monkeypatch):
    def stop(line):
        line.update("step 1")
        raise ValueError("stop")

    terminal = Terminal.connected(monkeypatch)
    with pytest.raises(ValueError, match="stop"), StatusLine() as line:
        stop(line)
    assert terminal.lines == [""]


def test_a_file_gets_what_is_said_alone(capsys):
    with StatusLine() as line:
        line.update("step 1")
        line.log("epoch 1")
    assert capsys.readouterr().out == "epoch 1\n"


def test_what_is_silenced_later_does_not_silence_it(monkeypatch):
    terminal, line = Terminal.connected(monkeypatch), StatusLine()
    monkeypatch.setattr("sys.stdout", io.StringIO())
    line.update("step 1")
    assert terminal.lines == ["step 1"]
