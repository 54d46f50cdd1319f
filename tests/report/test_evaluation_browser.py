"""The page of `dgmseg evaluate` in a real browser."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from bids_dgmseg.cli.main import main
from tests.report.devtools import Tab, open_tab


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """The page of three raters of five scans."""
    root = Path(tmp_path_factory.mktemp("raters"))
    for rater, more in (("A", 0), ("B", 1), ("C", 2)):
        for number in range(1, 6):
            labels = np.zeros((12, 16, 8), np.int16)
            labels[2:5, 2 : 6 + number + more, 2:5], labels[7:10, 2 : 7 + number, 2:5] = 1, 2
            path = root / rater / f"sub-{number}/anat/sub-{number}_dseg.nii.gz"
            path.parent.mkdir(parents=True)
            nib.Nifti1Image(labels, np.eye(4)).to_filename(path)
    assert main(["evaluate", *(str(root / rater) for rater in "ABC"), "--raters", "--out", str(root / "out")]) == 0
    return root / "out/evaluate.html"


@pytest.fixture(scope="module", params=[1280, 400], ids=["desktop", "phone"])
def tab(request, browser, page, tmp_path_factory) -> Iterator[Tab]:
    with open_tab(browser, tmp_path_factory.mktemp("profile"), width=request.param) as opened:
        opened.open(page.as_uri())
        yield opened


def test_page_loads_one_file_without_errors(tab):
    assert not tab.events_of("Log.entryAdded")
    requests = [event["request"]["url"] for event in tab.events_of("Network.requestWillBeSent")]
    assert {url.partition(":")[0] for url in requests} <= {"file", "data"}
    assert sum(url.startswith("file") for url in requests) == 1


def test_plots_load_and_have_alternative_text(tab):
    shown = tab.run("[...document.images].map(one => [one.naturalWidth > 300, one.alt])")
    assert len(shown) == 6  # overlap and volumes of three pairs
    assert all(loaded for loaded, _ in shown)
    assert len({alt for _, alt in shown if alt}) == 6


def test_tables_have_captions_and_scoped_headings(tab):
    tables = tab.run(
        "[...document.querySelectorAll('table')].map(table => [table.caption?.textContent.trim(), "
        "[...table.querySelectorAll('th')].every(head => head.scope)])"
    )
    assert len(tables) == 7
    assert all(caption and scoped for caption, scoped in tables)


def test_heading_levels_are_not_skipped(tab):
    levels = tab.run("[...document.querySelectorAll('h1, h2, h3, h4')].map(head => +head.tagName[1])")
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


def test_page_fits_and_wide_tables_scroll_by_keyboard(tab):
    assert tab.run("document.documentElement.scrollWidth <= innerWidth")
    script = """[...document.querySelectorAll('table')].map(table => table.parentElement)
      .filter(frame => frame.scrollWidth > frame.clientWidth).every(frame => frame.tabIndex >= 0)"""
    assert tab.run(script)
