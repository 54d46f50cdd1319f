"""Several sites: each is processed on its own, and a broken one does not stop the others."""

import pandas as pd
import pytest

from bids_dgmseg.phantom.demo import DEMO_SCANS, write_demo


@pytest.mark.slow
def test_two_sites_and_a_broken_one(script, tmp_path):
    for site, label in (("north", "02"), ("south", "04")):
        list(write_demo(tmp_path / site, [scan for scan in DEMO_SCANS if scan.participant == label]))
    (tmp_path / "broken").mkdir()
    rows = "".join(f"{site}\t{site}\t--no-viewer\n" for site in ("north", "broken", "south"))
    (tmp_path / "sites.tsv").write_text(f"site\tbids_dir\toptions\n{rows}")
    assert script.main([str(tmp_path / "sites.tsv"), str(tmp_path / "out"), "--group=--controls HC"]) == 1
    stats = pd.read_csv(tmp_path / "out/group/group_stats.tsv", sep="\t")
    assert {*(stats["participant_id"] + stats["dataset"])} == {"sub-02north", "sub-04south"}
