from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from bids_dgmseg.bids.scans import Scan
from bids_dgmseg.config import RunConfig
from bids_dgmseg.image.grids import Box, OrientedBox
from bids_dgmseg.workflow.qc_record import StepReport, build_qc_record, describe_box
from tests.oracle import oracle_model

BOX = Box((-50.0, -80.0, -60.0), (50.0, 40.0, 50.0))


def build(**reports: Any) -> dict[str, Any]:
    """Record of a scan whose sidecar has more than the scanner."""
    sidecar = {"Manufacturer": "Siemens", "MagneticFieldStrength": 3, "PatientName": "Jo", "EchoTime": 0.02}
    scan = cast(Scan, SimpleNamespace(name="sub-01", sidecar=sidecar))
    config = RunConfig(bids_dir=Path("/ds"), output_dir=Path("/out"))
    given = {"prepared": StepReport({"units": "ppm"}), "measured": StepReport({"rating": "green"}), **reports}
    return build_qc_record(scan, oracle_model(), config, box=BOX, **given)


def test_record_keeps_only_the_scanner_of_the_sidecar():
    assert build()["scanner"] == {"Manufacturer": "Siemens", "MagneticFieldStrength": 3}


def test_warnings_are_in_the_order_of_the_steps():
    steps = {"prepared": ("b",), "measured": ("c", "sub-01_Chimap.nii.gz: d"), "reconstructed": ("a",)}
    values = {"EchoTime": [0.005, 0.01], "units": "ppm"}
    record = build(**{name: StepReport(values, warnings) for name, warnings in steps.items()})
    assert record["warnings"] == ["sub-01: a", "sub-01: b", "sub-01: c", "sub-01_Chimap.nii.gz: d"]
    assert record["input"]["reconstructed_from"] == "2 echoes"


@pytest.mark.parametrize(
    ("oriented", "rotation"),
    [
        (None, {}),
        (
            OrientedBox((-17.5, 2.0, 3.0), (95.0, 120.0, 105.0)),
            {"rotation_deg": [-17.5, 2, 3], "rotated_size": [95, 120, 105]},
        ),
    ],
)
def test_box_is_described_with_its_rotation(oriented, rotation):
    corners = {"low": [-50, -80, -60], "high": [50, 40, 50]}
    assert describe_box(Box(BOX.low_mm, BOX.high_mm, oriented)) == corners | rotation
