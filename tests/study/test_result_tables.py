"""Group tables of results without images: every scan, damaged files, missing information."""

import csv
import json
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest

from bids_dgmseg.config import GroupOptions
from bids_dgmseg.study.analyses import run_analyses
from bids_dgmseg.study.results import ResultsFolder
from bids_dgmseg.study.study import list_empty_tables, load_study, scan_tables, with_keys, write_tables


@dataclass(frozen=True)
class Written:
    paths: list[Path]
    notes: list[str]
    warnings: list[str]


def write(output: Path, dataset: Path | None = None) -> Written:
    """Write all group tables of a folder."""
    cohort, study = load_study([ResultsFolder(output, output.name, dataset)], GroupOptions())
    tables, warnings = run_analyses(study)
    keyed = [with_keys(table, cohort.keys) for table in (*scan_tables(cohort), *tables)]
    paths = write_tables(output / "group", keyed, settings=study.settings)
    lines = [line for line in (*cohort.warnings, *warnings) if "not checked for changes" not in line]
    return Written(paths, list_empty_tables(tables, warnings), lines)


def add_participants(folder: Path, *lines: str) -> Path:
    (folder / "participants.tsv").write_text("\n".join(lines) + "\n")
    return folder


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def test_stats_have_one_row_per_nucleus(output, add_scan):
    add_scan("sub-01_ses-1_acq-fast_run-2_seg-dgm16")
    add_scan("sub-02_rec-tv_seg-dgm16_desc-total")
    write(output)
    first, second, third, _ = rows_of(output / "group" / "group_stats.tsv")
    entities = ["participant_id", "session_id", "acquisition", "run", "model", "reconstruction", "description"]
    assert list(first)[:7] == entities
    assert [first[name] for name in entities] == ["sub-01", "ses-1", "fast", "2", "dgm16", "n/a", "n/a"]
    assert [third[name] for name in entities] == ["sub-02", "n/a", "n/a", "n/a", "dgm16", "tv", "total"]
    assert (first["abbreviation"], first["volume_mm3"], second["mean_ppm"]) == ("DN_L", "700.5", "0.12")


def test_wide_tables_have_one_row_per_scan(output, add_scan):
    add_scan("sub-01_ses-1_seg-dgm16", volumes=("1", "2"), means=("0.1", "0.2"))
    add_scan("sub-01_ses-2_seg-dgm16", volumes=("3", "n/a"), means=("n/a", "0.4"))
    write(output)
    for name, measure, first, second in (
        ("volumes", "volume_mm3", ["1", "2"], ["3", "n/a"]),
        ("susceptibility", "mean_ppm", ["0.1", "0.2"], ["n/a", "0.4"]),
    ):
        rows = rows_of(output / "group" / f"group_{name}.tsv")
        assert [row["session_id"] for row in rows] == ["ses-1", "ses-2"]
        assert [[row[f"DN_{side}_{measure}"] for side in "LR"] for row in rows] == [first, second]


def test_further_maps_have_a_wide_table(output, add_scan):
    header = "index\tabbreviation\tn_voxels\tvolume_mm3\tmean_ppm\tR2starmap_n_valid\tR2starmap_mean_per_s\n"
    add_scan("sub-01_seg-dgm16", text=f"{header}1\tDN_L\t700\t700\t0.1\t690\t28.5\n2\tDN_R\t700\t710\t0.1\t700\t31\n")
    add_scan("sub-02_seg-dgm16")
    write(output)
    first, second = rows_of(output / "group" / "group_maps.tsv")
    names = ["DN_L_R2starmap_mean_per_s", "DN_R_R2starmap_mean_per_s"]
    assert [[row[name] for name in names] for row in (first, second)] == [["28.5", "31"], ["n/a", "n/a"]]
    about = json.loads((output / "group" / "group_maps.json").read_text(encoding="utf-8"))[names[0]]
    assert about["Units"] == "1/s"
    assert about["Description"].startswith("left dentate nucleus: Mean of R2starmap")
    long = rows_of(output / "group" / "group_stats.tsv")
    assert [row["R2starmap_n_valid"] for row in long] == ["690", "700", "n/a", "n/a"]
    add_scan("sub-01_seg-dgm16")  # processed again without the map
    write(output)
    assert not list((output / "group").glob("group_maps.*"))


def test_participants_columns_come_last(output, add_scan, tmp_path):
    add_scan("sub-01_seg-dgm16")
    result = write(output, add_participants(tmp_path, "participant_id\tage\tname", "01\t30\tJo"))
    for table, name in (("stats", "participants_name"), ("volumes", "name"), ("susceptibility", "name")):
        row = rows_of(output / "group" / f"group_{table}.tsv")[0]
        assert list(row)[-2:] == ["age", name]  # group_stats has its own column name
        assert (row["participant_id"], row["age"], row[name]) == ("sub-01", "30", "Jo")
    assert result.warnings == []


def test_different_reference_regions_are_a_warning(output, add_scan):
    regions = ["CSF", "whole brain", "whole brain", None]
    for number, region in enumerate(regions, start=1):
        add_scan(f"sub-0{number}_seg-dgm16", reference=region)
    (warning,) = write(output).warnings
    assert "reference regions differ: whole brain (2), CSF (1); use one reference region before comparing" in warning
    rows = rows_of(output / "group" / "group_susceptibility.tsv")
    assert [row["reference"] for row in rows] == [region or "n/a" for region in regions]


def test_every_column_has_a_dictionary_entry(output, add_scan, tmp_path):
    add_scan("sub-01_rec-tv_seg-dgm16")
    (tmp_path / "participants.json").write_text('{"age": {"Description": "Age at scan", "Units": "year"}}')
    result = write(output, add_participants(tmp_path, "participant_id\tage\tsite", "sub-01\t30\tA"))
    for tsv in result.paths:
        dictionary = json.loads(tsv.with_suffix(".json").read_text(encoding="utf-8"))
        columns = tsv.read_text(encoding="utf-8").partition("\n")[0].split("\t")
        assert list(dictionary)[: len(columns)] == columns
        assert all(dictionary[column]["Description"] for column in columns)
        if tsv.stem != "group_qc":  # whose columns are those of qc.json
            assert [column for column in columns if "the scan's files" in dictionary[column]["Description"]] == []
    assert json.loads((output / "group" / "group_stats.json").read_text())["age"]["Units"] == "year"
    susceptibility = json.loads((output / "group" / "group_susceptibility.json").read_text(encoding="utf-8"))
    assert susceptibility["DN_L_mean_ppm"]["Units"] == "ppm"
    assert susceptibility["DN_L_mean_ppm"]["Description"].startswith("left dentate nucleus: Mean susceptibility")


def test_table_without_rows_is_not_written_and_says_why(output, add_scan):
    add_scan("sub-01_seg-dgm16")
    (output / "group").mkdir()
    (output / "group" / "group_changes.tsv").touch()  # of an earlier run
    result = write(output)
    names = {path.name for path in (output / "group").iterdir()}
    assert names == {f"{path.stem}{ending}" for path in result.paths for ending in (".tsv", ".json")}
    assert all(path.read_text().count("\n") > 1 for path in result.paths)
    no_time = "no participant was scanned at two known times (no participant has two sessions)"
    assert f"group_change.tsv: not written, {no_time}" in result.notes
    assert "group_decisions.tsv, group_raters.tsv: not written, no decisions of raters were given: `qc`" in result.notes


def test_scans_without_a_site_are_counted(output, add_scan, tmp_path):
    for label, model in product(("01", "02"), ("dgm16", "dgm24")):  # a scan counts once for all models
        add_scan(f"sub-{label}_seg-{model}")
    notes = write(output, add_participants(tmp_path, "participant_id\tsite", "sub-01\tA", "sub-02\tn/a")).notes
    assert [line for line in notes if line.startswith("group_harmonized.tsv") and line.endswith(", only one site (A)")]
    about = json.loads((output / "group" / "group_stats.json").read_text())
    assert about["Settings"]["Datasets"] == {"out": 2}


def test_no_file_of_an_earlier_run_is_beside_new_ones(output, add_scan, monkeypatch):
    """A run that ends at its first new table leaves none of the earlier tables, figures or tables for a paper."""
    add_scan("sub-01_seg-dgm16")
    write(output)
    for name in ("group_table1.html", "figures/group_x.png"):
        (output / "group" / name).parent.mkdir(exist_ok=True)
        (output / "group" / name).touch()
    replace = Path.replace

    def stop(self: Path, target: Path) -> Path:
        if target.parent == output / "group":
            raise OSError(28, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", stop)
    with pytest.raises(OSError, match="No space left on device"):
        write(output)
    assert not [path for path in (output / "group").rglob("*") if path.is_file()]
