from __future__ import annotations

import shutil

import pytest

from bids_dgmseg.bids import validation as validate
from bids_dgmseg.bids.validation import summarize_validation
from bids_dgmseg.config import Settings


@pytest.fixture
def settings(dataset, tmp_path) -> Settings:
    root = dataset("ds", "README")
    (root / "README").write_text("A dataset without a scan, for tests. " * 5)
    return Settings(bids_dir=root, output_dir=tmp_path / "out", work_dir=tmp_path / "work")


@pytest.mark.parametrize("extra", ["not_bids.txt", "sub-01/anat/sub-01_hello.txt"])
def test_errors_are_said_in_one_line(settings, extra):
    if not shutil.which("bids-validator-deno", path=validate.search_path()):
        pytest.skip("bids-validator-deno is not installed")
    path = settings.bids_dir / extra
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    summary = summarize_validation(settings)
    assert summary is not None
    assert summary.startswith("ds: the BIDS validator reports ")
    assert "NOT_INCLUDED (1)" in summary
    assert "\n" not in summary


def test_without_a_validator_nothing_is_said(settings, monkeypatch):
    monkeypatch.setattr(validate, "search_path", lambda: "")
    assert summarize_validation(settings) is None


@pytest.mark.parametrize("script", ["exit 3", "echo '{\"issues\": 1}'", "sleep 5"])
def test_a_validator_that_fails_or_hangs_is_passed_over(settings, monkeypatch, tmp_path, script):
    fake = tmp_path / "bids-validator-deno"
    fake.write_text(f"#!/bin/sh\n{script}\n")
    fake.chmod(0o755)
    monkeypatch.setattr(validate, "search_path", lambda: str(tmp_path))
    monkeypatch.setattr(validate, "TIME_LIMIT_S", 0.5)
    assert summarize_validation(settings) is None
