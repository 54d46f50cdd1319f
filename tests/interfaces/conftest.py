"""A segmented phantom, on which each interface can run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bids_dgmseg.interfaces import LocalizeNuclei, SegmentNuclei
from tests.conftest import coarse_chi, write_map
from tests.run.test_group import NUCLEI, add_scan


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
    return {"in_chi": localized.out_chi, "in_dseg": segmented.out_dseg, "segmentation_report": segmented.out_report}


@pytest.fixture
def measurable(localized, segmented, labelled) -> dict[str, str]:
    """Inputs of MeasureNuclei."""
    files = {"in_location": localized.out_location, "in_probseg": segmented.out_probseg_box}
    return {**labelled, **files, "map_report": localized.out_report}


GROUPS = dict(zip(("01", "02", "03", "04", "05", "06"), "HC HC HC PD PD PD".split(), strict=True))


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Results of six participants in two groups, below ``derivatives/`` of their dataset."""
    out = tmp_path / "ds" / "derivatives" / "dgmseg"
    rows = ["participant_id\tage\tgroup"]
    for place, (label, group) in enumerate(GROUPS.items()):
        values = {name: (700.0 + place, 0.1 + 0.01 * place + 0.001 * place**2) for name in NUCLEI}
        add_scan(out, f"sub-{label}", values)
        rows.append(f"sub-{label}\t{30 + place}\t{group}")
    (tmp_path / "ds" / "participants.tsv").write_text("\n".join(rows) + "\n")
    return out
