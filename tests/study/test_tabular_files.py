"""Group tables of results without images: every scan, damaged files, missing information."""

import csv
import json
import os
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest

from bids_dgmseg.config import GroupOptions
from bids_dgmseg.errors import InputError
from bids_dgmseg.study.analyses import run_analyses
from bids_dgmseg.study.cohort import load_cohort
from bids_dgmseg.study.results_folders import ResultsFolder
from bids_dgmseg.study.study import build_study
from bids_dgmseg.study.tabular_files import list_empty_tables, scan_tables, write_tables


@dataclass(frozen=True)
class Written:
    paths: list[Path]
    notes: list[str]
    warnings: list[str]


def write(output: Path, dataset: Path | None = None) -> Written:
    """Write all group tables of a folder."""
    cohort = load_cohort([ResultsFolder(output, output.name, dataset)])
    study = build_study(cohort, GroupOptions())
    tables, warnings = run_analyses(study)
    paths = write_tables(output, [*scan_tables(cohort), *tables], keys=cohort.keys, settings=study.settings)
    return Written(paths, list_empty_tables(tables, warnings), [*cohort.warnings, *warnings])


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
    first, second, third, _ = rows_of(output / "group_stats.tsv")
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
        rows = rows_of(output / f"group_{name}.tsv")
        assert [row["session_id"] for row in rows] == ["ses-1", "ses-2"]
        assert [[row[f"DN_{side}_{measure}"] for side in "LR"] for row in rows] == [first, second]


def test_further_maps_have_a_wide_table(output, add_scan):
    header = "index\tabbreviation\tn_voxels\tvolume_mm3\tmean_ppm\tR2starmap_n_valid\tR2starmap_mean_per_s\n"
    add_scan("sub-01_seg-dgm16", text=f"{header}1\tDN_L\t700\t700\t0.1\t690\t28.5\n2\tDN_R\t700\t710\t0.1\t700\t31\n")
    add_scan("sub-02_seg-dgm16")
    write(output)
    first, second = rows_of(output / "group_maps.tsv")
    names = ["DN_L_R2starmap_mean_per_s", "DN_R_R2starmap_mean_per_s"]
    assert [[row[name] for name in names] for row in (first, second)] == [["28.5", "31"], ["n/a", "n/a"]]
    about = json.loads((output / "group_maps.json").read_text(encoding="utf-8"))[names[0]]
    assert about["Units"] == "1/s"
    assert about["Description"].startswith("left dentate nucleus: Mean of R2starmap")
    long = rows_of(output / "group_stats.tsv")
    assert [row["R2starmap_n_valid"] for row in long] == ["690", "700", "n/a", "n/a"]
    add_scan("sub-01_seg-dgm16")  # processed again without the map
    write(output)
    assert not list(output.glob("group_maps.*"))


def test_nucleus_unknown_to_a_model_is_missing(output, add_scan):
    add_scan("sub-01_seg-dgm16")
    add_scan("sub-01_seg-attunet25d", text="abbreviation\tvolume_mm3\tmean_ppm\nRN_L\t210.0\t0.09\n")
    write(output)
    table = {row["model"]: row for row in rows_of(output / "group_volumes.tsv")}
    assert table["attunet25d"]["DN_L_volume_mm3"] == "n/a"
    assert table["dgm16"]["RN_L_volume_mm3"] == "n/a"
    assert list(table["dgm16"])[-3:] == ["DN_L_volume_mm3", "DN_R_volume_mm3", "RN_L_volume_mm3"]


def test_participants_columns_come_last(output, add_scan, tmp_path):
    add_scan("sub-01_seg-dgm16")
    result = write(output, add_participants(tmp_path, "participant_id\tage\tname", "1\t30\tJo"))
    for table, name in (("stats", "participants_name"), ("volumes", "name"), ("susceptibility", "name")):
        row = rows_of(output / f"group_{table}.tsv")[0]
        assert list(row)[-2:] == ["age", name]  # group_stats has its own column name
        assert (row["participant_id"], row["age"], row[name]) == ("sub-01", "30", "Jo")
    assert result.warnings == []


def test_unmatched_participants_are_one_warning_per_kind(output, add_scan, tmp_path):
    for label in ("01", "02", "03"):
        add_scan(f"sub-{label}_seg-dgm16")
    others = (f"sub-{n}\t40" for n in range(10, 17))
    result = write(output, add_participants(tmp_path, "participant_id\tage", "sub-01\t30", *others))
    assert result.warnings == [
        "participants.tsv: no row for sub-02, sub-03; their columns are n/a",
        "participants.tsv: no results of sub-10, sub-11, sub-12, sub-13, sub-14, … (7 in all); "
        "they are not in the tables",
        "participants.tsv: no age of sub-02, sub-03; 2 of 3 participants are left out of analyses with age",
    ]
    assert [row["age"] for row in rows_of(output / "group_volumes.tsv")] == ["30", "n/a", "n/a"]


def test_different_reference_regions_are_a_warning(output, add_scan):
    regions = ["CSF", "whole brain", "whole brain", None]
    for number, region in enumerate(regions, start=1):
        add_scan(f"sub-0{number}_seg-dgm16", reference=region)
    (warning,) = write(output).warnings
    assert "reference regions differ: whole brain (2), CSF (1); use one reference region before comparing" in warning
    rows = rows_of(output / "group_susceptibility.tsv")
    assert [row["reference"] for row in rows] == [region or "n/a" for region in regions]


def test_reconstruction_of_maps_is_in_qc_table(output, add_scan):
    facts = {
        "PhaseSign": "-1",
        "PhaseSignFrom": "extreme values",
        "BrainMask": "network brain-mask",
        "BrainVolume": "1412.4",
        "MagneticFieldStrength": "3",
        "FieldNoise": "0.001",
        "LocalFieldFraction": "0.03",
        "FieldMisfit": "0.0015",
    }
    record = add_scan("sub-01_seg-dgm16").with_name("sub-01_seg-dgm16_qc.json")
    record.write_text(json.dumps({"reconstruction": {"EchoTime": [0.004, 0.008], "Unwrapping": "in words", **facts}}))
    add_scan("sub-02_seg-dgm16")
    write(output)
    expected = {f"reconstruction_{name}": value for name, value in {"n_echoes": "2", **facts}.items()}
    rows = [
        {column: value for column, value in row.items() if column.startswith("reconstruction_")}
        for row in rows_of(output / "group_qc.tsv")
    ]
    assert rows == [expected, dict.fromkeys(expected, "n/a")]
    dictionary = json.loads((output / "group_qc.json").read_text(encoding="utf-8"))
    assert all("the scan's files" not in dictionary[column]["Description"] for column in expected)
    record.write_text("{}")
    write(output)
    assert "reconstruction" not in (output / "group_qc.tsv").read_text()


def test_every_column_has_a_dictionary_entry(output, add_scan, tmp_path):
    add_scan("sub-01_rec-tv_seg-dgm16")
    (tmp_path / "participants.json").write_text('{"age": {"Description": "Age at scan", "Units": "year"}}')
    result = write(output, add_participants(tmp_path, "participant_id\tage\tsite", "sub-01\t30\tA"))
    for tsv, sidecar in zip(result.paths[::2], result.paths[1::2], strict=True):
        dictionary = json.loads(sidecar.read_text(encoding="utf-8"))
        columns = tsv.read_text(encoding="utf-8").partition("\n")[0].split("\t")
        assert list(dictionary)[: len(columns)] == columns
        assert all(dictionary[column]["Description"] for column in columns)
        if tsv.stem != "group_qc":  # whose columns are those of qc.json
            assert [column for column in columns if "the scan's files" in dictionary[column]["Description"]] == []
    assert json.loads((output / "group_stats.json").read_text())["age"]["Units"] == "year"
    susceptibility = json.loads((output / "group_susceptibility.json").read_text(encoding="utf-8"))
    assert susceptibility["DN_L_mean_ppm"]["Units"] == "ppm"
    assert susceptibility["DN_L_mean_ppm"]["Description"].startswith("left dentate nucleus: Mean susceptibility")


def test_empty_tables_say_why(output, add_scan):
    add_scan("sub-01_seg-dgm16")
    result = write(output)
    assert {path.name for path in output.iterdir() if path.is_file()} == {path.name for path in result.paths}
    empty = {
        path.stem: json.loads(path.with_suffix(".json").read_text()).get("NotComputed")
        for path in result.paths[::2]
        if path.read_text().count("\n") == 1
    }
    no_site, no_age = "no site is known; name its column: --site-column", "no ages; add a column age to"
    no_time = "no participant was scanned at two known times (no participant has two sessions)"
    reasons = {
        "group_adjusted": "no --control-filter was given",
        **dict.fromkeys(("group_harmonized", "group_site_variance", "group_site_effects"), no_site),
        **dict.fromkeys(("group_ageing", "group_ageing_curves"), f"{no_age} participants.tsv or sessions.tsv"),
        "group_differences": "participants.tsv has no column group or diagnosis; name one with --group-column",
        **dict.fromkeys(("group_longitudinal", "group_changes"), no_time),
        "group_mixed": "no participant was scanned at two known times",
        **dict.fromkeys(
            ("group_correlations", "group_correlation_values"),
            "no clinical variable that varies was named: --correlate",
        ),
        **dict.fromkeys(("group_norms", "group_zscores"), "no --control-filter was given"),
        **dict.fromkeys(("group_decisions", "group_raters"), "no decisions of raters were given: --qc"),
    }
    assert empty == reasons
    without_controls = "group_adjusted.tsv, group_norms.tsv, group_zscores.tsv"
    assert result.notes[0] == f"{without_controls}: empty, no `control_filter` was given"
    assert f"group_longitudinal.tsv, group_changes.tsv: empty, {no_time}" in result.notes


@pytest.mark.parametrize(
    ("site", "why", "n_without"),
    [("A", "only one site (A)", 0), ("n/a", "only one site (A); 1 scan without a site", 1)],
)
def test_scans_without_a_site_are_counted(output, add_scan, tmp_path, site, why, n_without):
    for label, model in product(("01", "02"), ("dgm16", "dgm24")):  # a scan counts once for all models
        add_scan(f"sub-{label}_seg-{model}")
    write(output, add_participants(tmp_path, "participant_id\tsite", "sub-01\tA", f"sub-02\t{site}"))
    about = json.loads((output / "group_harmonized.json").read_text())
    assert (about["NotComputed"], about["ScansWithoutSite"], about["Sites"]) == (why, n_without, {"A": 2 - n_without})
    assert about["Settings"]["Datasets"] == {"out": 2}


def left_out(output: Path) -> list[str]:
    """Return the warnings, having checked that only sub-01 is in the tables."""
    warnings = write(output).warnings
    assert [row["participant_id"] for row in rows_of(output / "group_volumes.tsv")] == ["sub-01"]
    return warnings


RERUN = "run the participant level again with `force` for them"


HEADER = "index\tabbreviation\tvolume_mm3\tmean_ppm\n"


@pytest.mark.parametrize("text", ["", "index\tname\n", f"{HEADER}1\tDN_L\t7", f"{HEADER}1\tDN_L\t7\t0.1"])
def test_incomplete_table_is_left_out(output, add_scan, text):
    add_scan("sub-01_seg-dgm16")
    add_scan("sub-02_seg-dgm16", text=text)
    assert left_out(output) == [f"sub-02_seg-dgm16_stats.tsv: cut short and left out; {RERUN}"]


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        ("1\tDN_L\t7\t0.1\n", "cut short"),
        ("1\tDN_L\t7\t0.1\n2\tDN_R\t7\t0.1\n1\tDN_L\t7\t0.1\n", "damaged ('DN_L' appears twice)"),
        ("1\tDN_L\t7\t0.1\n2\tRN_R\t7\t0.1\n", "damaged ('RN_R' is not one of its nuclei)"),
        ("1\tXX_L\t7\t0.1\n", "damaged ('XX_L' is not one of its nuclei)"),
    ],
)
def test_table_has_each_nucleus_once(output, add_scan, rows, what):
    for label in ("01", "02"):
        path = add_scan(f"sub-{label}_seg-dgm16")
        if "XX_L" not in rows:  # without a label table, all known nuclei are valid
            path.with_name(f"sub-{label}_seg-dgm16_dseg.tsv").write_text("index\tabbreviation\n1\tDN_L\n2\tDN_R\n")
    path.write_text(HEADER + rows)
    assert left_out(output) == [f"sub-02_seg-dgm16_stats.tsv: {what} and left out; {RERUN}"]


@pytest.mark.parametrize("value", ["abc", "0,12", "-inf", "NaN"])
def test_invalid_number_is_damage(output, add_scan, value):
    add_scan("sub-01_seg-dgm16")
    add_scan("sub-02_seg-dgm16", means=("0.1", value))
    what = f"damaged (mean_ppm of DN_R is {value!r}) and left out"
    assert left_out(output) == [f"sub-02_seg-dgm16_stats.tsv: {what}; {RERUN}"]


def test_unreadable_tables_are_left_out(output, add_scan):
    add_scan("sub-01_seg-dgm16")
    add_scan("sub-05")
    folder, link, pointer = (add_scan(f"sub-0{number}_seg-dgm16") for number in (2, 3, 4))
    folder.unlink()
    folder.mkdir()
    link.unlink()
    link.symlink_to("gone")
    pointer.write_text("version https://git-lfs.github.com/spec/v1\n")
    assert left_out(output) == [
        "sub-02_seg-dgm16_stats.tsv: unreadable (Is a directory) and left out; check the file",
        "sub-03_seg-dgm16_stats.tsv: not fetched (a broken link) and left out; fetch it (datalad get or git annex get)",
        "sub-04_seg-dgm16_stats.tsv: not fetched (only a pointer) and left out; fetch it (datalad get or git lfs pull)",
        "sub-05_stats.tsv: without a model (seg-) in the name and left out; rename the file",
    ]


def test_unrelated_files_and_line_ends_do_no_harm(output, add_scan):
    path = add_scan("sub-01_seg-dgm16")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    for name in (".sub-02_seg-dgm16_stats.tsv.tmp", "sub-02_seg-dgm16_dseg.tsv", "notes_stats.tsv"):
        (path.parent / name).write_text("not a table")
    (output / "figures").mkdir()
    assert write(output).warnings == []
    (row, _) = rows_of(output / "group_stats.tsv")
    assert (row["index"], row["mean_ppm"]) == ("1", "0.1")


@pytest.mark.parametrize(("make", "what"), [(Path.touch, "cut short"), (os.mkfifo, "damaged (not a regular file)")])
def test_folder_of_damaged_tables_does_not_stop_others(tmp_path, output, add_scan, make, what):
    add_scan("sub-01_seg-dgm16")
    other = tmp_path / "other" / "sub-02" / "anat"
    other.mkdir(parents=True)
    make(other / "sub-02_seg-dgm16_stats.tsv")
    cohort = load_cohort([ResultsFolder(output, "out", None), ResultsFolder(tmp_path / "other", "other", None)])
    assert cohort.keys["participant_id"].tolist() == ["sub-01"]
    assert cohort.warnings[0].startswith(f"other: sub-02_seg-dgm16_stats.tsv: {what} and left out; ")
    assert cohort.n_damaged == 1


def test_no_usable_results_is_an_error(output, add_scan):
    with pytest.raises(InputError, match=r"^out: no \*_stats.tsv found; run the participant level first"):
        write(output)
    add_scan("sub-01_seg-dgm16", text="")
    with pytest.raises(InputError, match=r"^out: all tables are cut short \(sub-01_seg-dgm16_stats.tsv\)"):
        write(output)


def test_failed_write_leaves_no_file(output, add_scan, monkeypatch):
    add_scan("sub-01_seg-dgm16")

    def refuse(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(InputError, match=r"group_stats.json: cannot be written \(No space left on device\)"):
        write(output)
    assert not [path for path in output.iterdir() if path.is_file()]
