"""The group page in a real browser: no requests, no errors, sorting by mouse and keyboard."""

from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from bids_dgmseg.report.group_page import write_group_page
from tests.report.devtools import Tab, open_tab
from tests.report.group_tables import write_tables

UNNAMED = """[...document.querySelectorAll("a, button, img, table, section, nav, [role=region]")].filter(element =>
  !(element.getAttribute("aria-label") || element.alt || element.caption?.textContent.trim() ||
    document.getElementById(element.getAttribute("aria-labelledby"))?.textContent.trim() ||
    (element.matches("a, button") && (element.textContent.trim() || element.querySelector("img")?.alt))
  )).map(element => element.outerHTML)"""
LOW_CONTRAST = """(() => {
  const parse = colour => colour.match(/[\\d.]+/g).map(Number);
  const ground = element => {
    for (let at = element; at; at = at.parentElement) {
      const colour = parse(getComputedStyle(at).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const light = colour => [0.2126, 0.7152, 0.0722].reduce((sum, weight, channel) => {
    const value = colour[channel] / 255;
    return sum + weight * (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
  }, 0);
  return [...document.querySelectorAll("body *")].filter(element =>
    [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim()) && element.offsetParent
  ).filter(element => {
    const [high, low] = [light(parse(getComputedStyle(element).color)), light(ground(element))].sort((a, b) => b - a);
    return (high + 0.05) / (low + 0.05) < 4.5;
  }).map(element => element.outerHTML);
})()"""
"""Elements whose text has a contrast below 4.5 to 1 (WCAG 2, AA)."""


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    return write_group_page(write_tables(tmp_path_factory.mktemp("out")))


@pytest.fixture
def tab(browser, page, tmp_path):
    with open_tab(browser, tmp_path / "profile") as opened:
        opened.open(page.as_uri())
        yield opened


def column(tab: Tab, table: str, number: int) -> list[str]:
    cells = f"document.querySelectorAll('#{table} tbody tr > :nth-child({number})')"
    return list(tab.run(f"[...{cells}].map(cell => cell.textContent.trim())"))


def directions(tab: Tab, table: str) -> list[str | None]:
    return list(tab.run(f"[...document.querySelectorAll('#{table} th[scope=col]')].map(th => th.ariaSort)"))


def test_page_makes_no_requests_and_no_errors(tab, page):
    images = "[...document.images].map(image => { image.loading = 'eager'; return image.decode(); })"
    n_images = tab.run(f"Promise.all({images}).then(loaded => loaded.length)")
    requests = {event["request"]["url"] for event in tab.events_of("Network.requestWillBeSent")}
    assert len(requests) == 1 + n_images > 1
    assert all(url.startswith(page.parent.as_uri()) for url in requests)
    for event in ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Network.loadingFailed"):
        assert not tab.events_of(event)


def test_click_sorts_by_number(tab):
    heading = "#scans-table th:nth-child(9) button"  # warnings: 0 to 5, worst scan first
    assert column(tab, "scans-table", 9) == ["4", "2", "5", "3", "1", "0"]
    tab.click(heading)
    assert column(tab, "scans-table", 9) == ["0", "1", "2", "3", "4", "5"]
    assert directions(tab, "scans-table") == [None] * 8 + ["ascending"]
    tab.click(heading)
    assert column(tab, "scans-table", 9) == ["5", "4", "3", "2", "1", "0"]
    assert directions(tab, "scans-table") == [None] * 8 + ["descending"]


def test_missing_values_stay_last_in_both_directions(tab):
    tab.run("document.querySelector('#scans-table tbody tr td:last-child').textContent = 'n/a'")  # the first row's 4
    for expected in (["0", "1", "2", "3", "5", "n/a"], ["5", "3", "2", "1", "0", "n/a"]):
        tab.click("#scans-table th:nth-child(9) button")
        assert column(tab, "scans-table", 9) == expected


def test_keyboard_sorts_and_order_is_announced(tab):
    tab.run("document.querySelector('#nuclei-table th:nth-child(1) button').focus()")
    tab.press("Tab")
    assert tab.run("document.activeElement.textContent") == "Scans"
    tab.press("Tab")
    tab.press("Enter")
    assert directions(tab, "nuclei-table")[2] == "ascending"
    assert column(tab, "nuclei-table", 3) == ["5", "6"]
    assert tab.run("document.querySelector('[role=status]').textContent") == "Sorted by Volume: n, ascending."


def test_first_tab_skips_header(tab):
    tab.press("Tab")
    assert tab.run("document.activeElement.getAttribute('href')") == "#content"
    tab.press("Enter")
    assert tab.run("document.activeElement.id") == "content"


def test_links_resolve(tab, page):
    links = tab.run("[...document.links].map(link => link.getAttribute('href'))")
    assert links
    for link in links:
        parts = urlsplit(link)
        assert not parts.netloc
        target = page.parent / unquote(parts.path) if parts.path else page
        assert target.is_file(), link
        if parts.fragment and target.suffix == ".html":
            assert f'id="{parts.fragment}"' in target.read_text(encoding="utf-8"), link


def test_elements_have_names_and_contrast(tab):
    assert tab.run(UNNAMED) == []
    assert tab.run(LOW_CONTRAST) == []
    assert tab.run(
        "new Set([...document.querySelectorAll('[id]')].map(e => e.id)).size === "
        "document.querySelectorAll('[id]').length"
    )


def test_headings_stay_visible_while_scrolling(tab):
    frame = "document.querySelector('#scans-table').closest('.framed')"
    tab.run(f"{frame}.style.maxHeight = '9rem'; {frame}.scrollTo(0, 80)")
    assert tab.run(f"{frame}.scrollTop") == 80
    top = "getBoundingClientRect().top"
    assert tab.run(f"document.querySelector('#scans-table th').{top} - {frame}.{top}") == 0


def test_page_fits_on_phone(browser, page, tmp_path):
    with open_tab(browser, tmp_path / "profile", width=500) as phone:
        phone.open(page.as_uri())
        assert phone.run("document.documentElement.scrollWidth <= innerWidth")
