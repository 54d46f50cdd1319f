"""The page of a participant, read as text and in a real browser."""

import json
import re
from pathlib import Path
from urllib.parse import unquote

import pytest
from PIL import Image

from bids_dgmseg.errors import InputError
from bids_dgmseg.report.scan_page import write_participant_page
from tests.report.conftest import LOST, ROW, Page


def write(out, participant="01", **options):
    return Page(write_participant_page(Path(out), participant, **options))


def test_links_and_figures_resolve(add_scan):
    add_scan("sub-01_ses-1_run-1")
    out = add_scan("sub-01_ses-2_run-1")
    page = write(out)
    links = [*(tag["href"] for tag in page.all("a")), *(tag["src"] for tag in page.all("img"))]
    identifiers = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(page.all("img")) == 6
    assert len(identifiers) == len(set(identifiers))
    for target in links:
        if target.startswith("#"):
            assert target[1:] in identifiers
        elif not target.startswith("https://"):  # a reference
            assert (out / unquote(target)).is_file()


def test_page_is_accessible_without_network_or_script(add_scan):
    page = write(add_scan())
    assert "<script" not in page.source
    assert not re.search(r"(src=|url\(|@import|<link)[\"' ]*(https?:)?//", page.source)
    assert page.all("html")[0]["lang"] == "en"
    assert all(tag["alt"] for tag in page.all("img"))
    assert len(page.all("caption")) == len(page.all("table")) == 2
    assert all(tag["scope"] in ("col", "row", "colgroup") for tag in page.all("th"))
    assert page.all("a")[0]["href"] == "#content"


def test_names_and_warnings_are_escaped(add_scan):
    rows = [{**ROW, "name": "<b>bold</b> & co"}]
    out = add_scan(rows=rows, warnings=["<script>alert('x')</script>"], settings={"<i>": "\"'><img src=x>"})
    page = write(out, failures=["sub-01_run-2: <u>broken</u>"])
    assert not {"script", "b", "i", "u"} & {tag for tag, _ in page.tags}
    assert len(page.all("img")) == 3
    assert "<script>alert('x')</script>" in page.text
    assert "<b>bold</b> & co" in page.text


def test_numbers_are_rounded_with_full_tooltip(add_scan):
    page = write(add_scan())
    cells = {tag["title"] for tag in page.all("td") if "title" in tag}
    assert {"0.110499", "651.26", "n/a"} <= cells
    assert "80 640.0 651.3 110.5 −0.4 0.96" in page.text  # ppb


def test_proof_is_a_bar_per_nucleus(add_scan):
    proof = {"recovered_ppb": "9.31", "recovered_percent": "-2.04", "recovered_small_percent": "4.58"}
    proof |= {"repeat_volume_percent": "0.62", "repeat_ppb": "0.17", "repeat_dice": "0.934"}
    page = write(add_scan(rows=[ROW | proof, LOST | dict.fromkeys(proof, "n/a")]))
    assert "9.3 of 10 ppb, −2.0 of 10 %, 4.6 of 5 % loss" in page.text
    assert "n/a of 10 ppb, n/a of 10 %" in page.text
    bars = [tag for tag in page.all("rect") if tag.get("class") in ("ppb", "percent")]
    assert [(bar["class"], round(float(bar["width"]), 1)) for bar in bars] == [
        ("ppb", 93.1),
        ("percent", 0),
    ]  # of 100 planted
    assert "Proof" not in write(add_scan("sub-02"), "02").text


def test_missing_nucleus_is_named(add_scan):
    edge = "lies outside the field of view; its values are n/a"
    rows = [{**row, "rating": "red", "reasons": "not found"} for row in (ROW, LOST)]
    page = write(add_scan(rows=rows, warnings=[f"sub-01: DN_R {edge}", f"sub-01: DN_L {edge}", "noisy"]))
    assert "1 of 2 nuclei found" in page.text
    assert page.items.count(f"DN_R, DN_L: {edge}") == 1
    assert "right dentate nucleus DN_R ✕ red 0 n/a n/a n/a n/a n/a" in page.text
    assert "DN_R: not found" in write(add_scan()).items
    assert [item for item in page.items if "right dentate" in item] == []
    folded = page.source.partition("<details>")[2]
    assert all(text in folded for text in ("Units from", "torch"))


def test_nucleus_smaller_than_voxel_counts_as_found(add_scan):
    page = write(add_scan(rows=[ROW, {**LOST, "volume_mm3": "0", "volume_pv_mm3": "12.5"}]))
    assert "2 of 2 nuclei found" in page.text
    assert "right dentate nucleus DN_R smaller than a voxel 0 0.0 12.5" in page.text
    assert "Found, but smaller than a voxel: DN_R" in page.text
    assert "not found" not in page.text.partition("How to read this page")[2].partition("How to read")[0]
    assert "with the outlines of 1 of 2 nuclei" in page.all("img")[0]["alt"]


def test_results_of_earlier_run_are_marked(add_scan):
    for session in ("1", "2"):
        out = add_scan(f"sub-01_ses-{session}")
    add_scan("sub-01_ses-2", model="other")
    page = write(out, failures=["sub-01_ses-2: is 4D"], outdated=[("sub-01_ses-2", "dgm16")])
    assert page.text.count("Results of an earlier run. The last run of this scan failed (why)") == 1
    section = page.source.partition('<section id="sub-01_ses-2_dgm16"')[2].partition("</section>")[0]
    assert "Results of an earlier run." in section
    assert "ses-2 from an earlier run dgm16" in page.text  # in the summary
    assert page.text.count("from an earlier run") == 1


def test_input_settings_and_versions_are_shown(add_scan):
    reference = {"region": "csf", "source": "mask x", "mean_ppm": 0.0123, "std_ppm": 0.02, "n_voxels": 812}
    record = {"EchoTime": [0.004, 0.0125], "MagneticFieldStrength": 3.0, "PhaseSign": -1, "PhaseSignFrom": "the map"}
    record |= {"HeadFieldCorrelation": 0.31, "ExtremesRatio": 1.62}
    quality = {"noise_sd_ppm": 0.0051, "streaking_index": "n/a"}
    text = write(add_scan(reference=reference, reconstruction=record, **quality)).text
    for fact in (
        *("Unitsppb", "Units frommagnitude of the values", "whole-brain", "1 × 1 × 3 mm", "LPS"),
        *("N replaced12", "torch2.6.0"),
        *("weightsshipped with the program", "Regioncsf", "Sourcemask x", "Mean ppm0.0123", "N voxels812"),
        *("Noise SD0.0051 ppm", "Streaking indexn/a", "Echo time0.004, 0.0125 s", "Magnetic field strength3 T"),
        *("Phase sign-1", "Phase sign fromthe map"),
        *("Head field correlation0.31", "Extremes ratio1.62"),
    ):
        assert fact in text


RECORD = {
    "EchoTime": [0.005, 0.01],
    "B0Direction": [0.0, 0.5, 0.8660],
    "BrainVolume": 1412.4,
    "FieldNoise": 0.00112,
    "RegularizationWeight": 0.000405,
    "LocalFieldFraction": 0.0296,
    "FieldMisfit": 0.00148,
}


def test_refused_map_is_shown_with_its_reasons(add_scan):
    out = add_scan("sub-01_ses-1")
    stem = out / "figures" / "sub-01_ses-2_seg-dgm16_desc-refused_dseg"
    Image.new("RGB", (60, 40), "navy").save(stem.with_suffix(".png"))
    problem = "its brain mask has 3,189 ml <neck>"
    about = {"scan": "sub-01_ses-2", "model": "dgm16", **RECORD, "Problems": [problem], "Warnings": ["only one echo"]}
    stem.with_suffix(".json").write_text(json.dumps(about))
    page = write(out)
    assert (
        "ses-2 not segmented The reconstructed map is not usable: its brain mask has 3,189 ml <neck> only" in page.text
    )
    assert page.all("img")[0]["src"] == "figures/sub-01_ses-2_seg-dgm16_desc-refused_dseg.png"
    assert "#sub-01_ses-2_dgm16-refused" in page.links
    assert "Brain volume1412 ml" in page.text
    stem.with_suffix(".png").unlink()
    assert "No figure of this reconstruction" in write(out).text


def test_sessions_and_models_come_in_order(add_scan):
    for session in (10, 2, 1):
        out = add_scan(f"sub-01_ses-{session}")
    add_scan("sub-01_ses-2", model="other")
    page = write(out)
    links = [tag["href"] for tag in page.all("a")][2:6]
    assert links == [f"#sub-01_ses-{scan}" for scan in ("1_dgm16", "2_dgm16", "2_other", "10_dgm16")]
    assert "3 scan(s) in 3 session(s), segmented by dgm16, other" in page.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("sub-01/anat/sub-01_seg-dgm16_stats.tsv", "a\tb\n", r"_stats.tsv: column abbreviation not found; delete"),
        ("figures/sub-01_seg-dgm16_desc-axial_dseg.png", "", r"sub-01_seg-dgm16_desc-axial_dseg.png: not a PNG file"),
    ],
)
def test_damaged_file_is_named(add_scan, name, content, message):
    out = add_scan()
    (out / name).write_text(content)
    with pytest.raises(InputError, match=message):
        write_participant_page(out, "01")


def test_ratings_are_words_with_reasons(add_scan):
    rows = [
        {**ROW, "rating": "amber", "reasons": "unusual volume (5 SD, beyond ±4)"},
        {**ROW, "abbreviation": "DN_R", "name": "right dentate nucleus", "rating": "green", "reasons": ""},
        {**ROW, "abbreviation": "RN_L", "name": "left red nucleus", "rating": "red", "reasons": "not found <0>"},
    ]
    page = write(add_scan(rows=rows, rating="amber", reasons=["noisy map (0.04 ppm, above 0.03)"]))
    assert "Scan ! amber noisy map (0.04 ppm, above 0.03); nuclei: 1 red, 1 amber" in page.text
    assert "left dentate nucleus DN_L ! amber 80" in page.text  # the word stands in the cell, not only the colour
    assert "right dentate nucleus DN_R ✓ green 80" in page.text
    reasons = page.text.partition("Reasons for amber and red ratings")[2]
    assert reasons.startswith(" ✕ red left red nucleus: not found <0> ! amber left dentate nucleus: unusual volume")
    assert {"rating amber", "rating green", "rating red"} <= {tag.get("class") for tag in page.all("span")}
