"""``dgmseg view``."""

from __future__ import annotations

from pathlib import Path

import pytest

from bids_dgmseg.cli.main import main


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Addresses that were opened in the browser."""
    addresses: list[str] = []

    def browse(address: str) -> bool:
        addresses.append(address)
        return True

    monkeypatch.setattr("webbrowser.open", browse)
    return addresses


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Output with two pages."""
    for name in ("sub-01.html", "sub-02.html"):
        (tmp_path / name).write_text("page")
    return tmp_path


def test_pages_of_participants_are_opened(out, opened, capsys):
    assert main(["view", str(out), "--participant-label", "sub-02", "01"]) == 0
    assert opened == [(out / f"sub-{label}.html").as_uri() for label in ("02", "01")]
    assert capsys.readouterr().out.splitlines() == [str(out / "sub-02.html"), str(out / "sub-01.html")]


def test_group_page_is_opened(out, opened):
    assert main(["view", str(out)]) == 0
    (out / "group.html").write_text("page")
    assert main(["view", str(out)]) == 0
    assert opened == [(out / name).as_uri() for name in ("sub-01.html", "group.html")]


def test_missing_page_is_named(out, opened, capsys):
    assert main(["view", str(out), "--participant-label", "03"]) == 2
    assert "no page of 03; it has 01, 02; run the participant level first" in capsys.readouterr().err
