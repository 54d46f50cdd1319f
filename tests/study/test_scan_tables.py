import csv
import json
from pathlib import Path

import pytest

from bids_dgmseg.errors import InputError
from bids_dgmseg.study.columns import describe
from bids_dgmseg.study.group_tables import GroupFiles, write_group_tables
from bids_dgmseg.study.load import Tree, load_cohort
from bids_dgmseg.study.study import StudyOptions, begin_study


def write_tables(output: Path, participants: Path | None = None) -> GroupFiles:
    cohort = load_cohort([Tree(output, output.name, participants.parent if participants else None)])
    return write_group_tables(output, begin_study(cohort, StudyOptions()))


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def test_the_long_table_has_a_row_a_nucleus_with_its_scan_in_front(output, add_scan):
    add_scan("sub-01_ses-1_acq-fast_run-2_seg-dgm16")
    write_tables(output)
    first, second = rows_of(output / "group_stats.tsv")
    assert list(first)[:5] == ["participant_id", "session_id", "acquisition", "run", "model"]
    assert list(first.values())[:5] == ["sub-01", "ses-1", "fast", "2", "dgm16"]
    assert (first["abbreviation"], first["volume_mm3"], second["mean_ppm"]) == ("DN_L", "700.5", "0.12")


def test_entities_that_a_name_lacks_are_missing(output, add_scan):
    add_scan("sub-01_seg-dgm16")
    write_tables(output)
    assert list(rows_of(output / "group_stats.tsv")[0].values())[:5] == ["sub-01", "n/a", "n/a", "n/a", "dgm16"]


def test_other_entities_follow_the_model(output, add_scan):
    add_scan("sub-01_rec-tv_seg-dgm16_desc-total")
    add_scan("sub-02_seg-dgm16")
    write_tables(output)
    table = rows_of(output / "group_volumes.tsv")
    assert list(table[0])[4:7] == ["model", "reconstruction", "description"]
    assert [row["reconstruction"] for row in table] == ["tv", "n/a"]
    assert [row["description"] for row in table] == ["total", "n/a"]


def test_the_wide_tables_have_a_row_a_scan(output, add_scan):
    add_scan("sub-01_ses-1_seg-dgm16", volumes=("1", "2"), means=("0.1", "0.2"))
    add_scan("sub-01_ses-2_seg-dgm16", volumes=("3", "n/a"), means=("n/a", "0.4"))
    write_tables(output)
    volumes, susceptibilities = (rows_of(output / f"group_{name}.tsv") for name in ("volumes", "susceptibility"))
    assert [(row["session_id"], row["DN_L_volume_mm3"], row["DN_R_volume_mm3"]) for row in volumes] == [
        ("ses-1", "1", "2"),
        ("ses-2", "3", "n/a"),
    ]
    assert [(row["session_id"], row["DN_L_mean_ppm"], row["DN_R_mean_ppm"]) for row in susceptibilities] == [
        ("ses-1", "0.1", "0.2"),
        ("ses-2", "n/a", "0.4"),
    ]


def test_a_nucleus_that_a_model_does_not_know_is_missing(output, add_scan):
    add_scan("sub-01_seg-dgm16")
    header = "index\tname\tabbreviation\themisphere\tn_voxels\tvolume_mm3\tmean_ppm\n"
    add_scan("sub-01_seg-attunet25d", text=header + "5\tleft red nucleus\tRN_L\tL\t200\t210.0\t0.09\n")
    write_tables(output)
    table = {row["model"]: row for row in rows_of(output / "group_volumes.tsv")}
    assert table["attunet25d"]["DN_L_volume_mm3"] == "n/a"
    assert table["dgm16"]["RN_L_volume_mm3"] == "n/a"
    assert list(table["dgm16"])[-3:] == ["DN_L_volume_mm3", "DN_R_volume_mm3", "RN_L_volume_mm3"]


def test_participants_columns_stand_behind(output, add_scan, tmp_path):
    add_scan("sub-01_seg-dgm16")
    participants = tmp_path / "participants.tsv"
    participants.write_text("participant_id\tage\tsex\n1\t30\tF\n")
    result = write_tables(output, participants)
    for name in ("stats", "volumes", "susceptibility"):
        row = rows_of(output / f"group_{name}.tsv")[0]
        assert list(row)[-2:] == ["age", "sex"]
        assert (row["participant_id"], row["age"], row["sex"]) == ("sub-01", "30", "F")
    assert result.warnings == ()


def test_a_participants_column_that_would_hide_ours_is_renamed(output, add_scan, tmp_path):
    add_scan("sub-01_seg-dgm16")
    participants = tmp_path / "participants.tsv"
    participants.write_text("participant_id\tname\nsub-01\tJo\n")
    write_tables(output, participants)
    row = rows_of(output / "group_stats.tsv")[0]
    assert (row["name"], row["participants_name"]) == ("left dentate nucleus", "Jo")
    assert rows_of(output / "group_volumes.tsv")[0]["name"] == "Jo"


def test_who_is_in_one_place_only_is_said_in_one_line_a_kind(output, add_scan, tmp_path):
    for label in ("01", "02", "03"):
        add_scan(f"sub-{label}_seg-dgm16")
    participants = tmp_path / "participants.tsv"
    participants.write_text("participant_id\tage\nsub-01\t30\n" + "".join(f"sub-{n}\t40\n" for n in range(10, 17)))
    result = write_tables(output, participants)
    assert result.warnings == (
        "participants.tsv: no row for sub-02, sub-03; their columns are n/a",
        "participants.tsv: no measures of sub-10, sub-11, sub-12, sub-13, sub-14 and 2 more; "
        "they are not in the tables",
        "participants.tsv: no age of sub-02, sub-03; 2 of 3 are left out where age matters",
    )
    assert [row["age"] for row in rows_of(output / "group_volumes.tsv")] == ["30", "n/a", "n/a"]


def test_the_reference_is_told_and_mixing_is_warned_of(output, add_scan):
    add_scan("sub-01_seg-dgm16", reference="CSF")
    add_scan("sub-02_seg-dgm16", reference="whole brain")
    add_scan("sub-03_seg-dgm16", reference="whole brain")
    add_scan("sub-04_seg-dgm16", reference=None)
    (warning,) = write_tables(output).warnings
    assert "reference regions differ: whole brain (2), CSF (1); refer the maps to one before comparing" in warning
    assert [row["reference"] for row in rows_of(output / "group_susceptibility.tsv")] == [
        "CSF",
        "whole brain",
        "whole brain",
        "n/a",
    ]


def test_how_maps_were_made_stands_in_columns_where_some_were(output, add_scan):
    made = add_scan("sub-01_seg-dgm16").with_name("sub-01_seg-dgm16_qc.json")
    made.write_text(
        json.dumps(
            {
                "reconstruction": {
                    "EchoTime": [0.004, 0.008],
                    "MagneticFieldStrength": 3,
                    "BrainMask": "by magnitude",
                    "PhaseSign": -1,
                    "PhaseSignFrom": "the map's extreme values",
                    "Unwrapping": "in many words",
                }
            }
        )
    )
    add_scan("sub-02_seg-dgm16")
    write_tables(output)
    name = "reconstruction_"
    rows = [
        {column.removeprefix(name): value for column, value in row.items() if column.startswith(name)}
        for row in rows_of(output / "group_qc.tsv")
    ]
    first = {
        "n_echoes": "2",
        "PhaseSign": "-1",
        "PhaseSignFrom": "the map's extreme values",
        "BrainMask": "by magnitude",
        "MagneticFieldStrength": "3",
    }
    assert rows == [first, dict.fromkeys(first, "n/a")]
    dictionary = json.loads((output / "group_qc.json").read_text(encoding="utf-8"))
    assert all("the scan's files" not in dictionary[name + column]["Description"] for column in first)
    made.write_text("{}")
    write_tables(output)
    assert "reconstruction" not in (output / "group_qc.tsv").read_text()


@pytest.mark.parametrize("column", ["reference_mean_ppm", "mean_ppm", "my_volume_mm3"])
def test_a_column_that_only_ends_like_a_nucleus_measure_is_described_too(column):
    assert describe(column)["Description"]


def test_every_column_has_an_entry_in_its_dictionary(output, add_scan, tmp_path):
    add_scan("sub-01_rec-tv_seg-dgm16")
    participants = tmp_path / "participants.tsv"
    participants.write_text("participant_id\tage\tsite\nsub-01\t30\tA\n")
    (tmp_path / "participants.json").write_text('{"age": {"Description": "Age at scan", "Units": "year"}}')
    result = write_tables(output, participants)
    for tsv, sidecar in zip(result.paths[::2], result.paths[1::2], strict=True):
        dictionary = json.loads(sidecar.read_text(encoding="utf-8"))
        columns = tsv.read_text(encoding="utf-8").partition("\n")[0].split("\t")
        assert list(dictionary)[: len(columns)] == columns
        assert all(dictionary[column]["Description"] for column in columns)
        if tsv.stem != "group_qc":  # whose columns are those of qc.json
            assert [column for column in columns if "the scan's files" in dictionary[column]["Description"]] == []
    assert json.loads((output / "group_stats.json").read_text())["age"] == {
        "Description": "Age at scan",
        "Units": "year",
    }
    susceptibility = json.loads((output / "group_susceptibility.json").read_text(encoding="utf-8"))
    assert susceptibility["DN_L_mean_ppm"]["Units"] == "ppm"
    assert susceptibility["DN_L_mean_ppm"]["Description"].startswith("left dentate nucleus: Mean susceptibility")


def test_every_table_is_written_and_says_why_it_is_empty(output, add_scan):
    add_scan("sub-01_seg-dgm16")
    result = write_tables(output)
    assert {path.name for path in output.iterdir() if path.is_file()} == {path.name for path in result.paths}
    empty = {
        path.stem: json.loads(path.with_suffix(".json").read_text()).get("NotComputed")
        for path in result.paths[::2]
        if path.read_text().count("\n") == 1
    }
    assert empty == {
        "group_adjusted": "no --control-filter was given",
        **dict.fromkeys(
            ("group_harmonized", "group_site_variance", "group_site_effects"),
            "no site is known; name its column: --site-column",
        ),
        **dict.fromkeys(
            ("group_ageing", "group_ageing_curves"), "no ages; add a column age to participants.tsv or sessions.tsv"
        ),
        "group_differences": "participants.tsv has no column group or diagnosis; name one with --group-column",
        **dict.fromkeys(
            ("group_longitudinal", "group_changes"), "nobody was scanned at two known times (nobody has two sessions)"
        ),
    }
    assert result.notes[0] == "group_adjusted.tsv: empty, no --control-filter was given"
    assert result.notes[-1].startswith("group_longitudinal.tsv, group_changes.tsv: empty, nobody was scanned at two")


@pytest.mark.parametrize(
    ("site", "why", "n_without"), [("A", "one site only (A)", 0), ("n/a", "one site only (A); 1 scan without one", 1)]
)
def test_scans_without_a_site_are_counted(output, add_scan, tmp_path, site, why, n_without):
    for label in ("01", "02"):
        add_scan(f"sub-{label}_seg-dgm16")
    participants = tmp_path / "participants.tsv"
    participants.write_text(f"participant_id\tsite\nsub-01\tA\nsub-02\t{site}\n")
    write_tables(output, participants)
    told = json.loads((output / "group_harmonized.json").read_text())
    assert (told["NotComputed"], told["ScansWithoutSite"], told["Sites"]) == (why, n_without, {"A": 2 - n_without})


def test_a_second_run_takes_the_place_of_the_first(output, add_scan):
    add_scan("sub-01_seg-dgm16")
    write_tables(output)
    add_scan("sub-02_seg-dgm16")
    write_tables(output)
    assert [row["participant_id"] for row in rows_of(output / "group_volumes.tsv")] == ["sub-01", "sub-02"]


def left_out(output: Path) -> list[str]:
    """Say what is warned of where sub-01 is whole, once it is seen that only its row is written."""
    warnings = write_tables(output).warnings
    assert [row["participant_id"] for row in rows_of(output / "group_volumes.tsv")] == ["sub-01"]
    return list(warnings)


ANEW = "run the participant level again with --force for them"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "index\tname\n",
        "index\tabbreviation\tvolume_mm3\tmean_ppm\n1\tDN_L\t7",
        "index\tabbreviation\tvolume_mm3\tmean_ppm\n1\tDN_L\t7\t0.1",
    ],
)
def test_a_table_cut_short_is_left_out_and_said(output, add_scan, text):
    add_scan("sub-01_seg-dgm16")
    add_scan("sub-02_seg-dgm16", text=text)
    assert left_out(output) == [f"sub-02_seg-dgm16_stats.tsv: cut short and left out; {ANEW}"]


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        ("1\tDN_L\t7\t0.1\n", "cut short"),
        ("1\tDN_L\t7\t0.1\n2\tDN_R\t7\t0.1\n1\tDN_L\t7\t0.1\n", "damaged ('DN_L' is there twice)"),
        ("1\tDN_L\t7\t0.1\n2\tRN_R\t7\t0.1\n", "damaged ('RN_R' is none of its nuclei)"),
    ],
)
def test_a_table_has_each_nucleus_of_its_labels_once(output, add_scan, rows, what):
    for label in ("01", "02"):
        path = add_scan(f"sub-{label}_seg-dgm16")
        path.with_name(f"sub-{label}_seg-dgm16_dseg.tsv").write_text("index\tabbreviation\n1\tDN_L\n2\tDN_R\n")
    path.write_text("index\tabbreviation\tvolume_mm3\tmean_ppm\n" + rows)
    assert left_out(output) == [f"sub-02_seg-dgm16_stats.tsv: {what} and left out; {ANEW}"]


def test_without_labels_beside_it_a_table_must_name_nuclei_that_there_are(output, add_scan):
    add_scan("sub-01_seg-dgm16")
    add_scan("sub-02_seg-dgm16", text="abbreviation\tvolume_mm3\tmean_ppm\nXX_L\t7\t0.1\n")
    (warning,) = left_out(output)
    assert warning.startswith("sub-02_seg-dgm16_stats.tsv: damaged ('XX_L' is none of its nuclei) and left out; ")


@pytest.mark.parametrize("value", ["abc", "0,12", "1e999", "-inf", "1_0", "NaN"])
def test_what_is_no_number_leaves_its_scan_out_alone(output, add_scan, value):
    add_scan("sub-01_seg-dgm16")
    add_scan("sub-02_seg-dgm16", means=("0.1", value))
    what = f"damaged (mean_ppm of DN_R is {value!r}) and left out"
    assert left_out(output) == [f"sub-02_seg-dgm16_stats.tsv: {what}; {ANEW}"]


def test_a_table_that_cannot_be_opened_is_left_out_with_what_to_do(output, add_scan):
    add_scan("sub-01_seg-dgm16")
    folder, link, pointer = (add_scan(f"sub-0{number}_seg-dgm16") for number in (2, 3, 4))
    folder.unlink()
    folder.mkdir()
    link.unlink()
    link.symlink_to("gone")
    pointer.write_text("version https://git-lfs.github.com/spec/v1\n")
    assert left_out(output) == [
        "sub-02_seg-dgm16_stats.tsv: unreadable (Is a directory) and left out; check the file",
        "sub-03_seg-dgm16_stats.tsv: not here (a link that leads nowhere) and left out; fetch it (datalad get or git "
        "annex get)",
        "sub-04_seg-dgm16_stats.tsv: not here (a pointer only) and left out; fetch it (datalad get or git lfs pull)",
    ]


def test_a_table_whose_name_tells_no_model_is_left_out(output, add_scan):
    add_scan("sub-01_seg-dgm16")
    add_scan("sub-02")
    assert left_out(output) == ["sub-02_stats.tsv: without a model (seg-) in the name and left out; rename the file"]


def test_line_ends_and_byte_order_marks_of_other_systems_are_no_damage(output, add_scan):
    path = add_scan("sub-01_seg-dgm16")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert write_tables(output).warnings == ()
    (row, _) = rows_of(output / "group_stats.tsv")
    assert (row["index"], row["mean_ppm"]) == ("1", "0.1")


def test_a_folder_without_a_whole_table_does_not_stop_those_that_are_merged_with_it(tmp_path, output, add_scan):
    add_scan("sub-01_seg-dgm16")
    other = tmp_path / "other" / "sub-02" / "anat"
    other.mkdir(parents=True)
    (other / "sub-02_seg-dgm16_stats.tsv").write_text("")
    cohort = load_cohort([Tree(output, "out", None), Tree(tmp_path / "other", "other", None)])
    assert cohort.keys["participant_id"].tolist() == ["sub-01"]
    assert cohort.warnings[0].startswith("other: sub-02_seg-dgm16_stats.tsv: cut short and left out; ")
    assert cohort.n_damaged == 1


def test_other_files_are_not_read(output, add_scan):
    path = add_scan("sub-01_seg-dgm16")
    for name in (".sub-02_seg-dgm16_stats.tsv.tmp", "sub-02_seg-dgm16_dseg.tsv", "notes_stats.tsv"):
        (path.parent / name).write_text("not a table")
    (output / "figures").mkdir()
    assert write_tables(output).warnings == ()


def test_nothing_measured_is_refused(output):
    with pytest.raises(InputError, match=r"^out: no \*_stats.tsv below; run the participant level first"):
        write_tables(output)


def test_nothing_whole_is_refused(output, add_scan):
    add_scan("sub-01_seg-dgm16", text="")
    with pytest.raises(InputError, match=r"^out: the tables are cut short \(sub-01_seg-dgm16_stats.tsv\)"):
        write_tables(output)


def test_a_table_that_cannot_be_written_is_named_and_leaves_nothing(output, add_scan, monkeypatch):
    add_scan("sub-01_seg-dgm16")

    def refuse(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(InputError, match=r"group_stats.json: cannot be written \(No space left on device\)"):
        write_tables(output)
    assert not [path for path in output.iterdir() if path.is_file()]
