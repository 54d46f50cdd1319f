"""A segmented phantom, on which each interface can run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bids_dgmseg.interfaces import LocalizeNuclei, SegmentNuclei
from tests.conftest import coarse_chi, write_map


@pytest.fixture
def work(tmp_path, monkeypatch, oracle):
    """Current folder, into which interfaces write, as those of Nipype do."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def chi(tmp_path) -> str:
    """Map of the phantom in ppm."""
    return str(write_map(tmp_path / "ds", "sub-01", coarse_chi()))


def run_in(folder: Path, interface: Any) -> Any:
    """Run an interface in a new folder and return its outputs."""
    folder.mkdir(parents=True)
    return interface.run(cwd=str(folder)).outputs


@pytest.fixture
def localized(chi, work) -> Any:
    """Outputs of LocalizeNuclei for the phantom."""
    return run_in(work / "localize", LocalizeNuclei(in_chi=chi, model="oracle"))


@pytest.fixture
def segmented(chi, localized, work) -> Any:
    """Outputs of SegmentNuclei for the phantom."""
    step = SegmentNuclei(in_chi=localized.out_chi, in_location=localized.out_location, in_source=chi, model="oracle")
    return run_in(work / "segment", step)


@pytest.fixture
def labelled(localized, segmented) -> dict[str, str]:
    """Inputs of the steps after the segmentation."""
    return {
        "in_chi": localized.out_chi,
        "in_dseg": segmented.out_dseg,
        "segmentation_report": segmented.out_report,
    }


@pytest.fixture
def measurable(localized, segmented, labelled) -> dict[str, str]:
    """Inputs of MeasureNuclei."""
    files = {"in_location": localized.out_location, "in_probseg": segmented.out_probseg_box}
    return {**labelled, **files, "map_report": localized.out_report}
