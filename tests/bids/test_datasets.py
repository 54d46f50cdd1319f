"""Which map a segmentation says it was made from."""

import json
from pathlib import Path
from typing import Any

import pytest

from bids_dgmseg.bids.sources import find_source

CHI = "sub-01/anat/sub-01_Chimap.nii.gz"


@pytest.fixture
def dseg(tmp_path) -> Path:
    """A dseg in ``out`` beside the dataset ``raw`` that holds the map."""
    for root, name in (("raw data", CHI), ("out", "sub-01/anat/sub-01_seg-x_dseg.nii.gz")):
        (tmp_path / root / name).parent.mkdir(parents=True)
        (tmp_path / root / name).touch()
    return Path(tmp_path / "out/sub-01/anat/sub-01_seg-x_dseg.nii.gz")


def say(dseg: Path, sources: Any, links: Any = None) -> None:
    """Write the sidecar and the dataset's description."""
    dseg.with_name("sub-01_seg-x_dseg.json").write_text(json.dumps({"Sources": sources}))
    described = {"DatasetLinks": links} if links is not None else {}
    (dseg.parents[2] / "dataset_description.json").write_text(json.dumps(described))


@pytest.mark.parametrize("link", ["../raw%20data", "file:../raw%20data", "../raw data/"])
def test_a_uri_leads_through_the_links_of_the_dataset(dseg, tmp_path, link):
    say(dseg, [f"bids:raw:{CHI}"], {"raw": link})
    assert find_source(dseg, "Chimap") == tmp_path / "raw data" / CHI


def test_an_absolute_link_is_followed(dseg, tmp_path):
    say(dseg, f"bids:raw:{CHI}", {"raw": (tmp_path / "raw data").as_uri()})
    assert find_source(dseg, "Chimap") == tmp_path / "raw data" / CHI


@pytest.mark.parametrize("source", ["bids::sub-01/anat/sub-01_Chimap.nii", "sub-01/anat/sub-01_Chimap.nii"])
def test_a_map_in_the_dataset_itself_needs_no_link(dseg, source):
    own = dseg.with_name("sub-01_Chimap.nii")
    own.touch()
    say(dseg, ["bids::sub-01/anat/sub-01_T1w.nii.gz", source])
    assert find_source(dseg, "Chimap") == own


@pytest.mark.parametrize(
    ("sources", "links"),
    [
        pytest.param([f"bids:raw:{CHI}"], None, id="no links"),
        pytest.param([f"bids:raw:{CHI}"], {"other": "../raw data"}, id="another name"),
        pytest.param([f"bids:raw:{CHI}"], {"raw": "https://example.org/raw"}, id="far away"),
        pytest.param([f"bids:raw:{CHI}"], {"raw": "../moved"}, id="no longer there"),
        pytest.param([f"bids:raw:{CHI}"], ["../raw data"], id="links that are no object"),
        pytest.param(["bids:raw:sub-01/anat/sub-01_T1w.nii.gz"], {"raw": "../raw data"}, id="no map among them"),
        pytest.param(7, {"raw": "../raw data"}, id="no list"),
    ],
)
def test_what_leads_nowhere_is_no_source(dseg, sources, links):
    say(dseg, sources, links)
    assert find_source(dseg, "Chimap") is None


def test_an_image_outside_of_any_dataset_has_no_source(dseg):
    assert find_source(dseg, "Chimap") is None
