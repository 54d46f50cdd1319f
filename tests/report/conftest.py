"""Small maps with two nuclei, and an output tree to write a page from."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from bids_dgmseg.image.volume import Volume
from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.report.mosaic import PLANES

DENTATES = STRUCTURES.both_sides(["DN"])
GRIDS = {
    "LPS": np.diag([-2.0, -2, 2, 1]),
    "oblique": np.array([[1.93, 0.52, 0, 0], [-0.52, 1.93, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1]]),  # 15 degrees about z
}


def pytest_itemcollected(item: pytest.Item) -> None:
    """Draw figures in all tests of this folder."""
    item.add_marker("figures")


def centred(affine: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Centre an image at 0 mm."""
    moved = affine.copy()
    moved[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return moved


@pytest.fixture(scope="module", params=GRIDS)
def two_sides(request, tmp_path_factory) -> tuple[Volume, Volume]:
    """A head with five slices: DN_L 20 mm to the patient's left, DN_R 20 mm to the right."""
    shape = (48, 48, 5)
    affine = centred(GRIDS[request.param], shape)
    points_mm = nib.affines.apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1))
    dseg = np.zeros(shape, np.uint8)
    for structure, x_mm in zip(DENTATES, (-20, 20), strict=True):
        dseg[(np.abs(points_mm - (x_mm, 0, 0)) < (6, 6, 1)).all(axis=-1)] = structure.index
    folder = tmp_path_factory.mktemp("two_sides")
    for name, array in (("chi", 0.1 * (dseg > 0) + 0.01), ("dseg", dseg)):
        nib.Nifti1Image(array.astype(np.float32), affine).to_filename(folder / f"{name}.nii.gz")
    return Volume.read(folder / "chi.nii.gz"), Volume.read(folder / "dseg.nii.gz", dtype=np.uint8)


ROW = {
    "index": "1",
    "name": "left dentate nucleus",
    "abbreviation": "DN_L",
    "hemisphere": "L",
    "n_voxels": "80",
    "volume_mm3": "640.04",
    "volume_pv_mm3": "651.26",
    "mean_ppm": "0.110499",
    "mean_pv_ppm": "-0.0004",
    "mean_probability": "0.957",
}
LOST = {
    **dict.fromkeys(ROW, "n/a"),
    "index": "2",
    "name": "right dentate nucleus",
    "abbreviation": "DN_R",
    "hemisphere": "R",
    "n_voxels": "0",
}
QC = {
    "input": {
        "file": "bids::sub-01/anat/sub-01_Chimap.nii.gz",
        "units": "ppb",
        "units_from": "magnitude of the values",
        "reference": "whole-brain",
        "n_replaced": 12,
        "n_empty": 0,
        "shape": [48, 48, 5],
        "voxel_size_mm": [1.0, 1.0, 3.0],
        "orientation": "LPS",
    },
    "box_mm": {"low": [-50, -80, -60], "high": [50, 40, 50]},
    "warnings": [],
    "settings": {"device": "cpu", "weights": "shipped with the program"},
    "versions": {"bids_dgmseg": "0.1.0", "python": "3.11.9", "torch": "2.6.0"},
}


def write_scan(
    out: Path,
    name: str = "sub-01",
    *,
    model: str = "dgm16",
    rows: Sequence[Mapping[str, str]] = (ROW, LOST),
    others: Sequence[str] = (),
    figures: Sequence[str] = (),
    **qc: Any,
) -> Path:
    """Write the files of one scan and list them in its dseg.json; returns the output folder."""
    folder = out.joinpath(*[part for part in name.split("_") if part[:4] in ("sub-", "ses-")], "anat")
    folder.mkdir(parents=True, exist_ok=True)
    (out / "figures").mkdir(exist_ok=True)
    bare, _, label = name.partition("_desc-")
    stem = f"{bare}_seg-{model}"
    desc = f"_desc-{label}" if label else ""
    pd.DataFrame(rows).to_csv(folder / f"{stem}{desc}_stats.tsv", sep="\t", index=False)
    names = [f"{label}{name.capitalize()}" if label else name for name in (*PLANES, *figures)]
    images = [out / "figures" / f"{stem}_desc-{name}_dseg.png" for name in names]
    for figure in images:
        Image.new("RGB", (60, 40), "navy").save(figure)
    for other in others:
        (folder / other).touch()
    files = [folder / f"{stem}{desc}_stats.tsv", folder / f"{stem}{desc}_qc.json", *images]
    listed = [path.relative_to(out).as_posix() for path in (*files, *(folder / other for other in others))]
    record = {"scan": name, "model": model, **QC, **qc, "outputs": dict.fromkeys(listed, "")}
    (folder / f"{stem}{desc}_qc.json").write_text(json.dumps(record))
    (folder / f"{stem}{desc}_dseg.json").write_text("{}")
    return out


@pytest.fixture
def add_scan(tmp_path) -> Callable[..., Path]:
    """Function that writes the files of one scan below ``out``."""
    return partial(write_scan, tmp_path / "out")


class Page(HTMLParser):
    """Tags of a page with their attributes, its text, list items, and rows of its tables by their identifiers."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.items: list[str] = []
        self._table, self._cell, self._hidden, self.text = "", "", False, ""
        self.alts: dict[str, str] = {}
        self._plot = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.text = " ".join(self.text.split())
        self.links = [tag["href"] for tag in self.all("a") if tag.get("href")]
        self.alts |= {image["src"]: image["alt"] for image in self.all("img")}

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self._table = dict(attrs).get("id", "")
            self.tables[self._table] = []
        elif tag == "tr":
            self.tables[self._table].append([])
        elif tag in ("td", "th", "li"):
            self._cell = ""
        elif tag == "div" and dict(attrs).get("class") == "scroll plot":
            self._plot = dict(attrs)["aria-label"]
        elif tag == "a" and self._plot and "figures/" in str(dict(attrs).get("href")):
            self.alts[dict(attrs)["href"]], self._plot = self._plot, ""  # image file of an interactive plot
        self._hidden = self._hidden or dict(attrs).get("aria-hidden") == "true"

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.tables[self._table][-1].append(self._cell.strip())
        elif tag == "li":
            self.items.append(self._cell.strip())
        elif tag == "span":
            self._hidden = False

    def handle_data(self, data):
        self.text += data
        self._cell += "" if self._hidden else data

    def all(self, name: str) -> list[dict[str, Any]]:
        """Attributes of all tags of a name."""
        return [attributes for tag, attributes in self.tags if tag == name]
