"""ROI tables of other programs: columns, units, ids, errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from bids_dgmseg.errors import InputError
from bids_dgmseg.study.roi_tables import TableOptions, import_table, interpret


@pytest.mark.parametrize(
    ("name", "abbreviation", "measure", "factor"),
    [
        ("Left-Pallidum", "GP_L", "", None),
        ("lh_Putamen", "PUT_L", "", None),
        ("SN_R_core_mean_ppm", "SN_R", "core_mean_ppm", 1.0),
        ("QSM of the right red nucleus [ppb]", "RN_R", "mean_ppm", 1e-3),
        ("Right red nucleus, volume (ml)", "RN_R", "volume_mm3", 1e3),
        ("Left Putamen mean volume", "", "", None),
    ],
)
def test_names_of_columns(name: str, abbreviation: str, measure: str, factor: float | None) -> None:
    meaning = interpret(name)
    assert (meaning.abbreviation, meaning.measure) == (abbreviation, measure)
    assert factor is None or meaning.factor == factor


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def read_stats(folder: Path) -> pd.DataFrame:
    return (
        pd.concat({path.name: pd.read_csv(path, sep="\t") for path in folder.rglob("*_stats.tsv")})
        .reset_index(0, names="file")
        .set_index(["file", "abbreviation"])
    )


def test_long_table_of_qsmxt(tmp_path: Path) -> None:
    table = write(
        tmp_path / "qsm.csv",
        "subject,session,roi,num_voxels,mean,age\nsub-01,1,Left-Caudate,10,40,60\nsub-01,2,Left-Caudate,10,44,62\n"
        "sub-02,1,Left-Caudate,9,30,70\nsub-02,1,Left-Hippocampus,9,30,70\n",
    )
    measures, lines = import_table(table, tmp_path / "out", TableOptions(units="ppb"))
    assert measures == ("mean_ppm",)
    assert "not used: Left-Hippocampus" in lines[1]
    means = read_stats(tmp_path / "out")["mean_ppm"]
    assert means.to_dict() == {
        ("sub-01_ses-1_seg-table_stats.tsv", "CN_L"): 0.04,
        ("sub-01_ses-2_seg-table_stats.tsv", "CN_L"): 0.044,
        ("sub-02_ses-1_seg-table_stats.tsv", "CN_L"): 0.03,
    }
    assert (tmp_path / "out/sub-01/sub-01_sessions.tsv").read_text() == "session_id\tage\nses-1\t60\nses-2\t62\n"


def test_wide_table_replaces_an_earlier_one_and_keeps_other_regions(tmp_path: Path) -> None:
    options = TableOptions(keep_others=True)
    for name, volume in (("P-1", 3500), ("P-2", 3600)):
        text = f"Measure:volume\tLeft-Caudate\tLeft-Hippocampus\tgroup\n{name}\t{volume}\t4000\tHC\n"
        import_table(write(tmp_path / "aseg.tsv", text), tmp_path / "out", options)
    volumes = read_stats(tmp_path / "out")["volume_mm3"]
    file = "sub-P2_seg-table_stats.tsv"
    assert volumes.to_dict() == {(file, "CN_L"): 3600, (file, "Hippocampus_L"): 4000}
    assert (tmp_path / "out/participants.tsv").read_text() == "participant_id\tgroup\nsub-P2\tHC\n"


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("id\tDN_L_mean_ppm\n1\t.1\n1\t.1\n", {}, "mean_ppm of DN_L occurs twice for sub-1"),
        ("id\tDN_L_mean_ppm\n1\tbright\n", {}, "'bright' is not a number"),
        ("id\tDN_L\n1\t.1\n", {"measure": "mean_ppm"}, "unit not stated"),
        ("id\tDN_L\n1\t90\n", {"measure": "mean_ppm", "units": "ppm"}, "median of the nuclei is 90"),
        ("id\tDN_L_mean_ppm\tmystery\n1\t.1\t2\n", {}, "not recognized: mystery"),
        ("id\tDN_L_mean_ppm\tDN_L_mean_ppm\n1\t.1\t2\n", {}, "occurs twice"),
        ("name\tDN_L_mean_ppm\n1\t.1\n", {}, "no column participant_id"),
        ("id\tDN_L_mean_ppm\na-1\t.1\na1\t.1\n", {}, "must differ in letters or digits"),
    ],
)
def test_bad_tables_get_one_line(tmp_path: Path, text: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        import_table(write(tmp_path / "table.tsv", text), tmp_path / "out", TableOptions(**options))
    assert not (tmp_path / "out").exists()


def test_described_columns(tmp_path: Path) -> None:
    columns = write(tmp_path / "columns.tsv", "column\tstructure\themisphere\tmeasure\nx1\tputamen\tleft\tmean_ppb\n")
    table = write(tmp_path / "table.tsv", "id\tx1\n1\t50\n")
    import_table(table, tmp_path / "out", TableOptions(columns=columns))
    assert read_stats(tmp_path / "out")["mean_ppm"].to_dict() == {("sub-1_seg-table_stats.tsv", "PUT_L"): 0.05}
