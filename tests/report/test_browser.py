"""All pages in a real browser: no requests, no errors, accessible, fitting; sorting by mouse and keyboard."""

import os
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from bids_dgmseg.cli.main import main
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.report.group_page import write_group_page
from bids_dgmseg.report.mosaic import PLANES, draw_mosaic
from bids_dgmseg.report.review_page import ReviewScan, render_review_page
from bids_dgmseg.report.scan_figures import write_viewer
from bids_dgmseg.report.scan_page import write_participant_page
from bids_dgmseg.study.review_decisions import read_decisions
from tests.report.conftest import DENTATES, write_scan
from tests.report.group_study import HOSTILE, make_data, make_study, scan_row

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PAGES = ("evaluation", "group", "participant")
UNNAMED = """[...document.querySelectorAll("a, button, img, table, section, nav, [role=region]")].filter(element =>
  !(element.getAttribute("aria-label") || element.alt || element.caption?.textContent.trim() ||
    document.getElementById(element.getAttribute("aria-labelledby"))?.textContent.trim() ||
    (element.matches("a, button") && (element.textContent.trim() || element.querySelector("img")?.alt))
  )).map(element => element.outerHTML)"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, controlled by playwright."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no browser tests: playwright is not installed")
    program = os.environ.get("BIDS_DGMSEG_BROWSER") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if not program:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} on PATH and BIDS_DGMSEG_BROWSER is not set")
    with playwright.sync_playwright() as started:
        yield started.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-dev-shm-usage"])


class Tab:
    """A page in the browser, with what it has requested and reported."""

    def __init__(self, browser: Any, width: int) -> None:
        self.page = browser.new_page(viewport={"width": width, "height": 900})
        self.run, self.click, self.press = self.page.evaluate, self.page.click, self.page.keyboard.press
        self.requests: list[str] = []
        self.problems: list[Any] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        for event in ("console", "pageerror", "requestfailed"):
            self.page.on(event, lambda problem: self.problems.append(problem))


@pytest.fixture
def open_tab(browser) -> Iterator[Callable[..., Tab]]:
    """Function that opens a file, with a script that runs before those of the page."""
    tabs = []

    def load(path: Path, *, width: int = 1280, first: str = "") -> Tab:
        tabs.append(Tab(browser, width))
        tabs[-1].page.add_init_script(first)
        tabs[-1].page.goto(path.as_uri())
        return tabs[-1]

    yield load
    for tab in tabs:
        tab.page.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """A page of two raters of three scans, one of six scans, and one with real mosaics and long values."""
    root = Path(tmp_path_factory.mktemp("pages"))
    for rater, more in (("A", 0), ("B", 1)):
        for number in range(1, 4):
            labels = np.zeros((12, 16, 8), np.int16)
            labels[2:5, 2 : 6 + number + more, 2:5], labels[7:10, 2 : 7 + number, 2:5] = 1, 2
            path = root / rater / f"sub-{number}/anat/sub-{number}_dseg.nii.gz"
            path.parent.mkdir(parents=True)
            nib.Nifti1Image(labels, np.eye(4)).to_filename(path)
    assert main(["evaluate", *(str(root / rater) for rater in "AB"), "--raters", "--out", str(root / "out")]) == 0
    reference = {"region": "csf", "source": "lateral ventricles labelled by dgm16, eroded by 1.5 mm", "mean_ppm": 0.02}
    settings = {"a setting with a name that is rather long": "and a value of some length"}
    out = write_scan(root / "participant", "sub-01_ses-1", reference=reference, settings=settings)
    dseg = np.zeros((40, 40, 40), np.uint8)
    dseg[10:16, 18:24, 18:24], dseg[24:30, 18:24, 18:24] = 1, 2
    chi = Volume(np.where(dseg > 0, 0.12, 0.01).astype(np.float32), np.eye(4))
    for plane in PLANES:
        figure = out / "figures" / f"sub-01_ses-1_seg-dgm16_desc-{plane}_dseg.png"
        draw_mosaic(chi, chi.with_array(dseg), figure, plane=plane, structures=STRUCTURES[:2])
    return {
        "evaluation": root / "out" / "evaluate.html",
        "group": write_group_page(make_study(root / "group"), root / "group"),
        "participant": write_participant_page(out, "01"),
    }


@pytest.fixture
def group(open_tab, pages) -> Tab:
    tab: Tab = open_tab(pages["group"])
    return tab


@pytest.mark.parametrize("width", [1400, 390], ids=["desktop", "phone"])
@pytest.mark.parametrize("name", PAGES)
def test_page_is_complete_and_fits(open_tab, pages, name, width):
    """No network, no errors; images, tables and headings are accessible; the page is no wider than the window."""
    tab = open_tab(pages[name], width=width)
    images = "[...document.images].map(image => { image.loading = 'eager'; return image.decode(); })"
    n_images = tab.run(f"Promise.all({images}).then(loaded => loaded.length)")
    alts = tab.run("[...document.images].map(image => image.alt)")
    tables = tab.run(
        "[...document.querySelectorAll('table')].map(table => [table.caption?.textContent.trim(), "
        "[...table.querySelectorAll('th')].every(head => head.scope)])"
    )
    levels = tab.run("[...document.querySelectorAll('h1, h2, h3, h4')].map(head => +head.tagName[1])")
    assert n_images == {"evaluation": 2, "group": 2, "participant": 3}[name]
    assert len(set(filter(None, alts))) == n_images
    assert all(caption and scoped for caption, scoped in tables)
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert tab.run("document.documentElement.scrollWidth <= innerWidth")
    frames = "[...document.querySelectorAll('table')].map(table => table.parentElement)"
    assert tab.run(f"{frames}.filter(at => at.scrollWidth > at.clientWidth).every(at => at.tabIndex >= 0)")
    if width == 1400:
        assert tab.run(f"{frames}.every(at => at.scrollWidth <= at.clientWidth)")
    assert tab.run(UNNAMED) == []
    requests = {url for url in tab.requests if not url.startswith("data:")}
    assert len(requests) == 1 + (0 if name == "evaluation" else n_images)
    assert all(url.startswith(pages[name].parent.as_uri()) for url in requests)
    assert not tab.problems


def column(tab: Tab, table: str, number: int) -> list[str]:
    cells = f"document.querySelectorAll('#{table} tbody tr > :nth-child({number})')"
    return list(tab.run(f"[...{cells}].map(cell => cell.textContent.trim())"))


def directions(tab: Tab, table: str) -> list[str | None]:
    return list(tab.run(f"[...document.querySelectorAll('#{table} th[scope=col]')].map(th => th.ariaSort)"))


def test_click_sorts_by_number(group):
    """Missing values stay last in both directions."""
    assert column(group, "scans-table", 9) == ["4", "2", "5", "3", "1", "0"]  # warnings, worst scan first
    group.run("for (const part of document.querySelectorAll('details')) part.open = true")
    group.run("document.querySelector('#scans-table tbody tr td:last-child').textContent = 'n/a'")
    numbers, last = list("01235"), ["n/a"]
    for direction, expected in (("ascending", numbers), ("descending", numbers[::-1])):
        group.click("#scans-table th:nth-child(9) button")
        assert column(group, "scans-table", 9) == expected + last
        assert directions(group, "scans-table") == [None] * 8 + [direction]


def test_decisions_are_kept_saved_and_read_back(open_tab, tmp_path):
    """Notes begin with a quotation mark, which starts a quoted cell in a table."""
    scans = [ReviewScan(f"sub-{number + 1}", "dgm16", Path("x"), None, "", {}, f"{number}" * 64) for number in (0, 1)]
    page = tmp_path / "review.html"
    page.write_bytes(render_review_page(tmp_path, scans, ["CN_L"], {"CN_L": [True, True]}))
    tab = open_tab(page)
    tab.page.on("dialog", lambda dialog: dialog.accept('"leaks'))
    tab.page.fill("#rater", "AB")
    tab.run("document.querySelector('#montage').focus()")
    for key in "nfnp":  # each decision goes to the next scan
        tab.press(key)
    is_closable = "window.dispatchEvent(new Event('beforeunload', { cancelable: true }))"
    assert not tab.run(is_closable)  # the browser asks before it closes the page
    assert open_tab(page).page.text_content("#progress") == "CN_L: 0 of 2 scans decided"  # in another browser
    tab.page.reload()
    assert tab.page.text_content("#progress") == "CN_L: 2 of 2 scans decided"
    with tab.page.expect_download() as download:
        tab.click("#save")
    assert tab.run(is_closable)
    file = tmp_path / "qc_decisions.tsv"
    download.value.save_as(file)
    table = read_decisions([file])
    assert table[["scan", "decision", "note", "rater"]].to_numpy().tolist() == [
        ["sub-1", "fail", '"leaks', "AB"],
        ["sub-2", "pass", '"leaks', "AB"],
    ]
    assert table["labels"].tolist() == ["0" * 64, "1" * 64]
    other = "sub-1\tdgm16\tall\tfail\tn/a\tAB\tn/a\tffff\n"  # on other labels
    file.write_text(file.read_text() + other)
    again = open_tab(page)
    again.page.set_input_files("#read", file)
    again.page.wait_for_function("document.querySelector('#rater').value === 'AB'")
    assert again.page.text_content("#state") == "2 decision(s) read, 1 of other raters, scans, models or labels kept"
    with again.page.expect_download() as download:
        again.click("#save")
    download.value.save_as(file)
    assert sorted(read_decisions([file])["scan"]) == ["sub-1", "sub-1", "sub-2"]


def test_hostile_names_are_only_text(open_tab, tmp_path):
    """Names of participants, sites, groups, reasons and warnings; each is shown as written."""
    rows = []
    for place, text in enumerate(HOSTILE):
        scan = scan_row(f"{text}{place}", site=text, group=HOSTILE[place % 2], age_years=20 + place, input_units=text)
        values = {"volume_mm3": 600 + place, "mean_ppm": 0.1 + place / 100}
        rows.append({**scan, **values, "rating": "red", "reasons": text, "page": "javascript:hit(3).html"})
    (tmp_path / "javascript:hit(3).html").write_text("")
    page = write_group_page(make_data(rows, rows), tmp_path, warnings=HOSTILE)
    tab = open_tab(page, first="window.hits = []; window.hit = n => hits.push(n);")
    tab.run(
        "document.querySelectorAll('*').forEach(element => ['mouseover', 'load', 'error', 'focus'].forEach("
        "kind => element.dispatchEvent(new Event(kind))))"
    )
    assert tab.run("window.hits") == []
    assert tab.run("[...document.querySelectorAll('script:not([type])')].length") == 1
    assert tab.run("[...document.querySelectorAll('img:not(.plot), iframe, object, embed, svg')].length") == 0
    attributes = "[...document.querySelectorAll('*')].flatMap(element => element.getAttributeNames())"
    assert tab.run(f"{attributes}.filter(name => name.startsWith('on'))") == []
    links = "[...document.links].map(link => link.getAttribute('href'))"
    assert tab.run(f"{links}.map(link => new URL(link, location).protocol).every(kind => kind === 'file:')")
    assert not tab.problems


@pytest.mark.parametrize("two_sides", ["oblique"], indirect=True)
def test_button_of_viewer_moves_to_nucleus(open_tab, two_sides, tmp_path):
    (chi, dseg), out = two_sides, tmp_path / "viewer.html"
    viewer = write_viewer(chi, dseg, out, structures=DENTATES, scan="sub-01_ses-1", model="dgm16")
    tab = open_tab(viewer)
    positions = {}
    for structure in DENTATES:
        tab.click(f"button[title='{structure.name}']")
        positions[structure.hemisphere] = tab.run("window.nuclei.coordinatesSlice")["X"]
    link = tab.run("document.querySelector('a').getAttribute('href')")
    requests = tab.requests
    assert positions == {"L": pytest.approx(-20, abs=2), "R": pytest.approx(20, abs=2)}
    assert link == "../sub-01.html#sub-01_ses-1_dgm16"
    assert all(url.startswith(("file:", "data:")) for url in requests)


def test_phone_and_dark_mode(open_tab, pages):
    """Two columns of slices at 400 px; colours follow the system, and are legible in both schemes."""
    tab = open_tab(pages["participant"], width=400)
    widths = (
        "[...document.querySelectorAll('.slices span')].map(part => parseFloat(getComputedStyle(part).backgroundSize))"
    )
    assert set(tab.run(widths)) == {300, 250}  # of the image, with six and five columns
    colours = "['color', 'backgroundColor'].map(name => getComputedStyle(document.body)[name].match(/\\d+/)[0])"
    light = [int(red) for red in tab.run(colours)]
    tab.page.emulate_media(color_scheme="dark")
    dark = [int(red) for red in tab.run(colours)]
    assert light[1] - light[0] > 150
    assert dark[0] - dark[1] > 150
