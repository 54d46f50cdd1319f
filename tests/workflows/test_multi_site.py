"""Several sites: each is processed on its own, and a broken one does not stop the others."""

import shutil

import pandas as pd
import pytest

from bids_dgmseg.phantom.demo import DEMO_SCANS, write_demo


@pytest.mark.slow
def test_two_sites_and_a_broken_one(script, tmp_path):
    demo = tmp_path / "demo"
    list(write_demo(demo, [scan for scan in DEMO_SCANS if scan.participant in ("02", "04") and scan.session != "2"]))
    for site, labels in {"north": ("02",), "south": ("04",)}.items():
        folder = tmp_path / site
        folder.mkdir()
        for label in labels:
            shutil.copytree(demo / f"sub-{label}", folder / f"sub-{label}")
        for name in ("dataset_description.json", "participants.tsv"):
            shutil.copy(demo / name, folder)
    (tmp_path / "broken").mkdir()
    sites = tmp_path / "sites.tsv"
    sites.write_text(
        "site\tbids_dir\toptions\nnorth\tnorth\t--no-viewer\nbroken\tbroken\tn/a\nsouth\tsouth\t--no-viewer\n"
    )
    out = tmp_path / "out"
    assert script.main([str(sites), str(out), "--group=--controls HC"]) == 1
    stats = pd.read_csv(out / "group/group_stats.tsv", sep="\t")
    assert {*(stats["participant_id"] + stats["dataset"])} == {"sub-02north", "sub-04south"}
