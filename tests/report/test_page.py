import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from bids_dgmseg.errors import InputError
from bids_dgmseg.report.page import write_page
from tests.report.conftest import LOST, ROW


class Page(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def all(self, name: str) -> list[dict[str, Any]]:
        return [attributes for tag, attributes in self.tags if tag == name]


def test_links_and_pictures_resolve(add_scan):
    add_scan("sub-01_ses-1_run-1")
    out = add_scan("sub-01_ses-2_run-1")
    page = Page(write_page(out, "01"))
    links = [*(tag["href"] for tag in page.all("a")), *(tag["src"] for tag in page.all("img"))]
    identifiers = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(page.all("img")) == 6
    assert len(identifiers) == len(set(identifiers))
    for target in links:
        if target.startswith("#"):
            assert target[1:] in identifiers
        elif not target.startswith("https://"):  # a reference
            assert (out / unquote(target)).is_file()


def test_the_page_needs_no_network_and_no_script(add_scan):
    source = Page(write_page(add_scan(), "01")).source
    assert "<script" not in source
    assert not re.search(r"(src=|url\(|@import|<link)[\"' ]*(https?:)?//", source)


def test_a_screen_reader_finds_its_way(add_scan):
    page = Page(write_page(add_scan(), "01"))
    assert page.all("html")[0]["lang"] == "en"
    assert all(tag["alt"] for tag in page.all("img"))
    assert len(page.all("caption")) == len(page.all("table")) == 2
    assert all(tag["scope"] in ("col", "row", "colgroup") for tag in page.all("th"))
    assert page.all("a")[0]["href"] == "#content"


def test_names_and_warnings_are_escaped(add_scan):
    rows = [{**ROW, "name": "<b>bold</b> & co"}]
    out = add_scan(rows=rows, warnings=["<script>alert('x')</script>"], settings={"<i>": "\"'><img src=x>"})
    page = Page(write_page(out, "01", problems=["sub-01_run-2: <u>broken</u>"]))
    assert not {"script", "b", "i", "u"} & {tag for tag, _ in page.tags}
    assert len(page.all("img")) == 3
    assert "<script>alert('x')</script>" in page.text
    assert "<b>bold</b> & co" in page.text


def test_numbers_are_rounded_and_kept_in_full(add_scan):
    page = Page(write_page(add_scan(), "01"))
    cells = {tag["title"] for tag in page.all("td") if "title" in tag}
    assert {"0.110499", "651.26", "n/a"} <= cells
    assert "80 640.0 651.3 0.110 0.000 0.96" in page.text  # a mean of −0.0004 ppm is not written −0.000


def test_a_nucleus_without_voxels_is_na_and_named(add_scan):
    page = Page(write_page(add_scan(), "01"))
    assert "1 of 2 nuclei found" in page.text
    assert "right dentate nucleus DN_R not found 0 n/a n/a n/a n/a n/a" in page.text
    assert "Not found: DN_R" in page.text


def test_a_nucleus_that_was_found_and_fills_no_voxel_is_not_called_lost(add_scan):
    small = {**LOST, "volume_mm3": "0", "volume_pv_mm3": "12.5"}
    page = Page(write_page(add_scan(rows=[ROW, small]), "01"))
    assert "2 of 2 nuclei found" in page.text
    assert "right dentate nucleus DN_R found, fills no voxel 0 0.0 12.5" in page.text
    assert "Found, but without a voxel: DN_R" in page.text
    assert "not found" not in page.text.partition("How to read")[0]
    assert "with the outlines of 1 of 2 nuclei" in page.all("img")[0]["alt"]


def test_results_that_a_failed_run_did_not_make_are_said_to_be_of_an_earlier_one(add_scan):
    for session in ("1", "2"):
        out = add_scan(f"sub-01_ses-{session}")
    add_scan("sub-01_ses-2", model="other")
    page = Page(write_page(out, "01", problems=["sub-01_ses-2: is 4D"], earlier=[("sub-01_ses-2", "dgm16")]))
    assert page.text.count("Of an earlier run. The last run of this scan failed (why)") == 1
    section = page.source.partition('<section id="sub-01_ses-2_dgm16"')[2].partition("</section>")[0]
    assert "Of an earlier run." in section
    assert "ses-2 of an earlier run dgm16" in page.text  # in the summary
    assert page.text.count("of an earlier run") == 1


@pytest.mark.parametrize(
    ("scan", "masks", "said"),
    [
        pytest.param(
            "sub-01",
            ("label-DNleft_desc-dgm16", "label-brain_desc-dgm16"),
            ", and 2 masks beside them",
            id="of nuclei and regions",
        ),
        pytest.param(
            "sub-01",
            ("label-DNleft_desc-dgm16", "label-DNleft_desc-other"),
            ", and 1 mask beside them",
            id="not of another model",
        ),
        pytest.param("sub-01", ("acq-x_label-DNleft_desc-dgm16",), "", id="not of another scan"),
        pytest.param(
            "sub-01_desc-rts",
            ("label-DNleft_desc-rtsDgm16", "label-DNleft_desc-dgm16"),
            ", and 1 mask beside them",
            id="of a map with a desc of its own",
        ),
    ],
)
def test_masks_are_counted_beside_the_files(add_scan, scan, masks, said):
    out = add_scan(scan)
    for mask in masks:
        (out / "sub-01" / "anat" / f"sub-01_{mask}_mask.nii.gz").touch()
    text = Page(write_page(out, "01")).text
    assert f"Files of this scan (2{said})" in text


def test_warnings_come_before_pictures(add_scan):
    page = Page(write_page(add_scan(warnings=["sub-01: DN_R lies outside the image"]), "01"))
    assert page.source.index("lies outside the image") < page.source.index("<figure")
    assert "1 warning" in page.text


def test_the_input_is_told(add_scan):
    text = Page(write_page(add_scan(), "01")).text
    for fact in (
        "ppb (from the magnitude of the values)",
        "whole-brain",
        "1 × 1 × 3 mm",
        "48 × 48 × 5",
        "LPS",
        "Replaced voxels12",
        "x −50 to 50, y −80 to 40, z −60 to 50 mm",
        "torch2.6.0",
        "weightsshipped with the program",
    ):
        assert fact in text


def test_sessions_and_models_come_in_order(add_scan):
    for session in (10, 2, 1):
        out = add_scan(f"sub-01_ses-{session}")
    add_scan("sub-01_ses-2", model="other")
    page = Page(write_page(out, "01"))
    links = [tag["href"] for tag in page.all("a")][2:6]
    assert links == [f"#sub-01_ses-{scan}" for scan in ("1_dgm16", "2_dgm16", "2_other", "10_dgm16")]
    assert "3 scans in 3 sessions, segmented by dgm16, other" in page.text


def test_only_the_models_asked_for_are_shown(add_scan):
    add_scan(model="other")
    page = Page(write_page(add_scan(), "01", model_names=["dgm16"]))
    assert "1 scan, segmented by dgm16" in page.text


def test_a_participant_does_not_take_anothers_scans(add_scan):
    add_scan("sub-010")
    page = Page(write_page(add_scan("sub-01"), "01"))
    assert "sub-010" not in page.source


def test_a_scan_with_its_own_desc_finds_its_pictures(add_scan):
    out = add_scan("sub-01")
    anat = out / "sub-01" / "anat"
    for path in list(anat.iterdir()):
        path.rename(path.with_name(path.name.replace("_seg-dgm16", "_seg-dgm16_desc-total")))
    for path in list((out / "figures").iterdir()):
        path.rename(path.with_name(path.name.replace("_desc-", "_desc-total")))
    assert len(Page(write_page(out, "01")).all("img")) == 3


def test_missing_parts_are_said(add_scan):
    out = add_scan()
    for path in (out / "figures").iterdir():
        path.unlink()
    (out / "sub-01" / "anat" / "sub-01_seg-dgm16_qc.json").unlink()
    text = Page(write_page(out, "01")).text
    assert "no pictures of this scan" in text
    assert "left dentate nucleus" in text


def test_failed_scans_stand_on_top(tmp_path):
    text = Page(write_page(tmp_path, "07", problems=["sub-07_run-2: is 4D"])).text
    assert "1 scan failed sub-07_run-2: is 4D" in text
    assert "There are no results for sub-07" in text


def test_the_page_is_replaced_whole_and_alike(add_scan):
    out = add_scan()
    first = write_page(out, "01").read_bytes()
    assert write_page(out, "01").read_bytes() == first
    assert not list(out.glob(".*"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "sub-01/anat/sub-01_seg-dgm16_qc.json",
            "{",
            r"sub-01_seg-dgm16_qc.json: not valid JSON \(.*; delete",
        ),
        (
            "sub-01/anat/sub-01_seg-dgm16_stats.tsv",
            "a\tb\n",
            r"sub-01_seg-dgm16_stats.tsv: has no column abbreviation; ",
        ),
        (
            "figures/sub-01_seg-dgm16_desc-axial_dseg.png",
            "",
            r"sub-01_seg-dgm16_desc-axial_dseg.png: not a PNG picture; ",
        ),
    ],
)
def test_a_damaged_file_is_named(add_scan, name, content, message):
    out = add_scan()
    (out / name).write_text(content)
    with pytest.raises(InputError, match=message):
        write_page(out, "01")


def test_ratings_are_words_with_their_reasons(add_scan):
    rows = [
        {**ROW, "rating": "amber", "reasons": "its volume is unusual (5 SD, beyond ±4)"},
        {**ROW, "abbreviation": "DN_R", "name": "right dentate nucleus", "rating": "green", "reasons": ""},
        {**ROW, "abbreviation": "RN_L", "name": "left red nucleus", "rating": "red", "reasons": "not found <0>"},
    ]
    out = add_scan(rows=rows, rating="amber", reasons=["noisy map (0.04 ppm, above 0.03)"])
    page = Page(write_page(out, "01"))
    assert "Scan ! amber noisy map (0.04 ppm, above 0.03); nuclei: 1 red, 1 amber" in page.text
    assert "left dentate nucleus DN_L ! amber 80" in page.text  # the word stands in the cell, not only the colour
    assert "right dentate nucleus DN_R ✓ green 80" in page.text
    why = page.text.partition("Why ratings are not green")[2]
    assert why.startswith(" ✕ red left red nucleus: not found <0> ! amber left dentate nucleus: its volume is unusual")
    assert {"rating amber", "rating green", "rating red"} <= {tag.get("class") for tag in page.all("span")}


def test_what_ratings_are_given_by_is_a_table_of_its_own(add_scan):
    page = Page(write_page(add_scan(rows=[{**ROW, "mean_entropy_bits": "0.2514", "edge_distance_mm": "n/a"}]), "01"))
    assert "entropy (bit) to the edge (mm) left dentate nucleus DN_L 0.25 n/a" in page.text
    assert len(page.all("caption")) == len(page.all("table")) == 3


def test_reference_and_quality_of_the_map_are_told(add_scan):
    reference = {"region": "csf", "source": "mask x", "mean_ppm": 0.0123, "std_ppm": 0.02, "n_voxels": 812}
    text = Page(write_page(add_scan(reference=reference, noise_sd_ppm=0.0051, streaking_index="n/a"), "01")).text
    for fact in ("Regioncsf", "Frommask x", "Mean0.0123 ppm", "Voxels812", "Noise SD0.0051 ppm", "Streaking indexn/a"):
        assert fact in text
