"""Montages of the review page."""

import json
import re

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from bids_dgmseg.errors import InputError
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.report.review_page import (
    COLUMNS,
    OUTLINE,
    PALETTE,
    TILE,
    draw_tile,
    find_review_scans,
    write_review_page,
)
from tests.report.conftest import DENTATES

AFFINE = np.diag([2.0, 2, 2, 1])


def write_scan(out, name, *, model="dgm16", mapped=True, complete=True):
    """Write a map of 0.05 ppm with a bright block (0.2) in DN_L, at the patient's left."""
    folder = out / name.partition("_")[0] / "anat"
    folder.mkdir(parents=True, exist_ok=True)
    labels, chi = np.zeros((40, 40, 30), np.uint8), np.full((40, 40, 30), 0.05, np.float32)
    labels[8:13, 15:22, 10:14] = DENTATES[0].index if complete else 0
    labels[27:32, 15:22, 10:14] = DENTATES[1].index
    chi[8:13, 15:22, 10:14] = 0.2
    nib.Nifti1Image(labels, AFFINE).to_filename(folder / f"{name}_seg-{model}_dseg.nii.gz")
    nib.Nifti1Image(chi, AFFINE).to_filename(folder / f"{name}_Chimap.nii.gz")
    uri = f"bids::{folder.relative_to(out).as_posix()}/{name}_Chimap.nii.gz"
    (folder / f"{name}_seg-{model}_dseg.json").write_text(json.dumps({"SpatialReference": uri} if mapped else {}))
    (folder / f"{name}_seg-{model}_qc.json").write_text('{"rating": "amber"}')
    rows = [f"{structure.abbreviation}\tgreen" for structure in DENTATES]
    (folder / f"{name}_seg-{model}_stats.tsv").write_text("\n".join(["abbreviation\trating", *rows]))
    return folder


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def content(page):
    """Return the data of the page."""
    complete = re.search(r'id="review-data">(.*?)</script>', page.read_text(encoding="utf-8"))
    assert complete
    return json.loads(complete[1])


def test_tile_shows_the_nucleus_with_its_outline(out):
    folder = write_scan(out, "sub-1")
    chi = Volume.read(folder / "sub-1_Chimap.nii.gz")
    dseg = Volume.read(folder / "sub-1_seg-dgm16_dseg.nii.gz", dtype=np.uint8)
    tile = PALETTE[draw_tile(chi.array, dseg, DENTATES[0])]
    assert tile.shape == (TILE, 2 * TILE, 3)
    middle = tile[TILE // 2, TILE // 2]
    assert middle.tolist() == [255] * 3  # 0.2 ppm is white
    assert int(tile[TILE // 2, TILE - 6][0]) == pytest.approx(127, abs=3)  # half way, of 64 shades
    # 10 mm of 44 mm wide in x: edges at the middle -+ 5 mm
    row = tile[TILE // 2, :TILE]
    outline = np.flatnonzero((row == OUTLINE).all(axis=1))
    assert (outline.max() - outline.min() + 1) * 44 / TILE == pytest.approx(10, abs=0.8)
    assert draw_tile(chi.array, dseg.with_array(dseg.array * 0), DENTATES[0]) is None


def test_montage_has_one_tile_per_scan(out):
    for number in range(COLUMNS + 1):
        write_scan(out, f"sub-{number}", complete=number != 1)
    page, warnings = write_review_page(out, find_review_scans(out))
    assert warnings == []
    data = content(page)
    assert data["nuclei"] == ["DN_L", "DN_R"]
    assert [scan["shown"]["DN_L"] for scan in data["scans"]] == [True, False, True, True, True, True]
    assert data["scans"][0]["ratings"] == {"DN_L": "green", "DN_R": "green", "all": "amber"}
    with Image.open(out / "figures" / "review_DN_L.png") as image:
        assert image.size == (COLUMNS * 2 * TILE, 2 * TILE)
        pixels = np.asarray(image.convert("L"))
    assert pixels[TILE // 2, TILE // 2] > 240
    assert pixels[:TILE, 2 * TILE : 4 * TILE].max() < 10  # not found
    assert pixels[TILE + TILE // 2, TILE // 2] > 240  # the last, in the second row


def test_names_are_data_not_markup(out):
    write_scan(out, "sub-1_acq-x")
    (scan,) = find_review_scans(out)
    assert scan.name == "sub-1_acq-x"
    page, _ = write_review_page(out, [type(scan)("</script><b>", *list(vars(scan).values())[1:])])
    assert "</script><b>" not in page.read_text(encoding="utf-8")
    assert content(page)["scans"][0]["name"] == "</script><b>"


def test_one_model_is_reviewed(out):
    with pytest.raises(InputError, match=r"out: no \*_dseg.nii.gz with its .json found; run the participant level"):
        find_review_scans(out)
    write_scan(out, "sub-1")
    write_scan(out, "sub-1", model="dcnnet")
    with pytest.raises(InputError, match=r"several models \(dcnnet, dgm16\); choose one with `model`"):
        find_review_scans(out)
    assert [scan.model for scan in find_review_scans(out, model="dcnnet")] == ["dcnnet"]
    with pytest.raises(InputError, match=r"no results of x \(found dcnnet, dgm16\)"):
        find_review_scans(out, model="x")
