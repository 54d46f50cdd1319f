"""The page in a real browser."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageColor

from bids_dgmseg.image.volume import Volume
from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.report.mosaic import draw_mosaic
from bids_dgmseg.report.page import write_page
from tests.report.devtools import open_tab

COUNT = """<script>
addEventListener("load", () => {
  const images = [...document.images];
  const loaded = images.filter(image => image.naturalWidth > 1 && image.getBoundingClientRect().width > 300);
  document.title = `${loaded.length} of ${images.length} loaded, ${
    document.documentElement.scrollWidth > innerWidth ? "too wide" : "fits"}`;
});
</script>"""


@pytest.fixture
def page(add_scan, tmp_path) -> Path:
    out = Path(add_scan("sub-01_ses-1"))
    dseg = np.zeros((40, 40, 40), np.uint8)
    dseg[10:16, 18:24, 18:24], dseg[24:30, 18:24, 18:24] = 1, 2
    chi = Volume(np.where(dseg > 0, 0.12, 0.01).astype(np.float32), np.eye(4))
    for picture in (out / "figures").iterdir():
        plane = picture.name.split("_desc-")[1].split("_")[0]
        draw_mosaic(chi, Volume(dseg, np.eye(4)), picture, plane=plane, structures=STRUCTURES[:2])  # type: ignore[arg-type]
    return write_page(out, "01")


def run_browser(browser: str, profile: Path, *arguments: str) -> str:
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
        f"--user-data-dir={profile}",
        "--hide-scrollbars",
        "--virtual-time-budget=10000",
        *arguments,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.parametrize("width", [1280, 400], ids=["desk", "phone"])
def test_pictures_load_and_nothing_runs_over(browser, page, tmp_path, width):
    # A copy, because the page itself has no script, and loads pictures only when they are near.
    source = page.read_text(encoding="utf-8").replace('loading="lazy"', "").replace("</body>", COUNT + "</body>")
    copy = page.with_name("counted.html")
    copy.write_text(source, encoding="utf-8")
    dom = run_browser(browser, tmp_path / "profile", f"--window-size={width},900", "--dump-dom", copy.as_uri())
    assert "<title>3 of 3 loaded, fits</title>" in dom


@pytest.mark.parametrize("width", [1280, 400], ids=["desk", "phone"])
def test_values_of_settings_stand_in_words_not_in_letters(browser, add_scan, tmp_path, width):
    reference = {"region": "csf", "source": "lateral ventricles labelled by dgm16, eroded by 1.5 mm", "mean_ppm": 0.02}
    settings = {"a setting with a name that is rather long": "and a value of some length"}
    page = write_page(Path(add_scan(reference=reference, settings=settings)), "01")
    with open_tab(browser, tmp_path / "profile", width=width) as tab:
        tab.open(page.as_uri())
        widths = tab.run("[...document.querySelectorAll('dd')].map(value => value.clientWidth)")
    assert min(widths) >= 96  # 6 rem: a longer word is seldom


def test_a_screenshot_shows_the_outlines(browser, page, tmp_path):
    shot = tmp_path / "page.png"
    run_browser(browser, tmp_path / "profile", "--window-size=1280,3000", f"--screenshot={shot}", page.as_uri())
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    assert pixels.shape[1] == 1280
    for structure in STRUCTURES[:2]:
        near = np.abs(pixels - ImageColor.getrgb(structure.color)).max(axis=-1) < 40
        assert near.sum() > 200, structure.abbreviation
