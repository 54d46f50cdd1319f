import io

import pytest

from bids_dgmseg.console import Line
from tests.terminal import Terminal


def test_on_a_terminal_a_shown_line_gives_way_to_the_next(monkeypatch):
    terminal, line = Terminal.connected(monkeypatch), Line()
    for text in ("step 1", "step 2"):
        line.show(text)
    assert terminal.lines == ["step 2"]
    line.say("epoch 1 is over")
    line.show("step 3")
    assert terminal.lines == ["epoch 1 is over", "step 3"]


def test_a_shown_line_stays_on_one_row_and_a_kept_one_whole(monkeypatch):
    terminal, line = Terminal.connected(monkeypatch, columns=20), Line()
    line.say("x" * 30)
    line.show("y" * 30)
    assert terminal.lines == ["x" * 30, "y" * 19]


def test_an_error_finds_an_empty_row(monkeypatch):
    def stop(line):
        line.show("step 1")
        raise ValueError("stop")

    terminal = Terminal.connected(monkeypatch)
    with pytest.raises(ValueError, match="stop"), Line() as line:
        stop(line)
    assert terminal.lines == [""]


def test_a_file_gets_what_is_said_alone(capsys):
    with Line() as line:
        line.show("step 1")
        line.say("epoch 1")
    assert capsys.readouterr().out == "epoch 1\n"


def test_what_is_silenced_later_does_not_silence_it(monkeypatch):
    terminal, line = Terminal.connected(monkeypatch), Line()
    monkeypatch.setattr("sys.stdout", io.StringIO())
    line.show("step 1")
    assert terminal.lines == ["step 1"]
