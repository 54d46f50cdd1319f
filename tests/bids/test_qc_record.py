from __future__ import annotations

from bids_dgmseg.bids.entities import ScanName
from bids_dgmseg.bids.qc_record import build_qc_record
from tests.oracle import oracle_model


def test_record_combines_reports_in_the_order_of_the_steps():
    record = build_qc_record(
        ScanName("01", None, {}),
        oracle_model(),
        given_map={"units": "ppm"},
        box_mm={"low": [-50, -80, -60], "high": [50, 40, 50]},
        measures={"rating": "green"},
        warnings=["a", "b", "c", "sub-01_Chimap.nii.gz: d"],
        reconstruction={"EchoTime": [0.005, 0.01]},
        scanner={"Manufacturer": "Siemens"},
        settings={"masks": True},
    )
    assert record["warnings"] == ["sub-01: a", "sub-01: b", "sub-01: c", "sub-01_Chimap.nii.gz: d"]
    assert record["input"] == {"units": "ppm", "reconstructed_from": "2 echoes"}
    assert (record["scan"], record["model"], record["rating"]) == ("sub-01", "oracle", "green")
    assert (record["scanner"], record["settings"]) == ({"Manufacturer": "Siemens"}, {"masks": True})
