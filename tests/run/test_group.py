"""The group level from the command line, on results without images."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bids_dgmseg.cli.bids_app import main

NUCLEI = ("DN_L", "DN_R", "GP_L", "GP_R")
HEADER = "index\tname\tabbreviation\themisphere\tn_voxels\tvolume_mm3\tmean_ppm"


def add_scan(tree: Path, stem: str, values: dict[str, tuple[float, float]], scanner: dict[str, object] | None = None):
    """Write the tables of a scan as the participant level does: volumes and means by nucleus."""
    parts = stem.split("_")
    folder = tree.joinpath(*[part for part in parts if part.startswith(("sub-", "ses-"))], "anat")
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        f"{place}\tsome nucleus\t{name}\t{name[-1]}\t700\t{volume!r}\t{mean!r}"
        for place, (name, (volume, mean)) in enumerate(values.items(), 1)
    ]
    (folder / f"{stem}_seg-dgm16_stats.tsv").write_text("\n".join([HEADER, *rows]) + "\n")
    record = {"input": {"reference": "whole-brain"}, "warnings": [], **({"scanner": scanner} if scanner else {})}
    (folder / f"{stem}_seg-dgm16_qc.json").write_text(json.dumps(record))


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def sidecar(path: Path) -> Any:
    return json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def plain_scans(out: Path) -> Callable[..., None]:
    """Add scans that differ a little, one per participant."""

    def add(*labels: str, tree: Path = out, **options) -> None:
        for place, label in enumerate(labels):
            add_scan(
                tree,
                f"sub-{label}",
                {name: (700.0 + place, 0.1 + 0.01 * place + 0.001 * place**2) for name in NUCLEI},
                **options,
            )

    return add


@pytest.fixture
def run(dataset: Path, out: Path) -> Callable[..., int]:
    return lambda *options: main([str(dataset), str(out), "group", *map(str, options)])


def test_participants_are_joined_with_warnings(participants, plain_scans, run, out, capsys):
    plain_scans("01", "02", "03")
    participants("participant_id Age Sex Group", "sub-01 30.5 f HC", "02 89+ M PD")
    assert run() == 0
    assert capsys.readouterr().err.splitlines() == [
        "participants.tsv: no row for sub-03; their columns are n/a",
        "participants.tsv: no Age of sub-03; left out of analyses with age",
    ]
    rows = rows_of(out / "group" / "group_volumes.tsv")
    assert [(row["age_years"], row["Age"], row["Sex"]) for row in rows] == [
        ("30.5", "30.5", "F"),
        ("89", "89+", "M"),
        ("n/a", "n/a", "n/a"),
    ]
    participants("participant_id Age", "sub-01 30,5", "sub-02 89+")
    assert run() == 2
    assert "participants.tsv: Age is not from 0 to 130 years" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("groups", "options", "reference", "why"),
    [
        ("0 1 1 1", (), "0", "of 0 and 1, 0 is taken as the controls"),
        ("0 1 1 1", ("--control-filter", "group == 1"), "1", "the group of --control-filter"),
        ("PD HC PD PD", (), "HC", "the name of controls"),
        ("PD MSA PD MSA PD", (), "PD", "the largest group, as none has a name of controls"),
    ],
)
def test_reference_group_is_explained(participants, plain_scans, run, out, capsys, groups, options, reference, why):
    plain_scans(*(f"{place:02}" for place, _ in enumerate(groups.split())))
    participants("participant_id group", *(f"sub-{place:02} {group}" for place, group in enumerate(groups.split())))
    assert run(*options) == 0
    said = capsys.readouterr()
    assert f"reference group: {reference} ({why})" in said.out
    line = f"participants.tsv: group: reference group is {reference}: {why}; select the controls with --control-filter"
    is_guess = why.startswith(("of ", "the largest"))
    assert (line in said.err, line in (out / "group.html").read_text("utf-8")) == (is_guess, is_guess)
    settings = sidecar(out / "group" / "group_differences.tsv")["Settings"]
    assert (settings["ReferenceGroup"], settings["ReferenceGroupFrom"]) == (reference, why)
    assert {row["reference"] for row in rows_of(out / "group" / "group_differences.tsv")} == {reference}


def test_maps_without_results_are_listed(dataset, plain_scans, run, out, capsys):
    plain_scans("01", "02")
    (dataset / "dataset_description.json").write_text('{"Name": "x", "BIDSVersion": "1.10.0"}')
    for scan in ("sub-01", "sub-02", "sub-02_acq-x", "sub-03"):
        folder = dataset / scan.partition("_")[0] / "anat"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{scan}_Chimap.nii.gz").touch()
    assert run("--participant-label", "01") == 0
    assert "no results" not in capsys.readouterr().err
    assert run() == 0
    warning = (
        f"{dataset.name}: of 4 scans 2 have no results: sub-02_acq-x, sub-03; run the participant level to include them"
    )
    assert warning in capsys.readouterr().err
    assert warning in (out / "group.html").read_text()
    chosen = dataset / "filter.json"
    chosen.write_text('{"chimap": {"acquisition": null}}')
    assert run("--bids-filter-file", str(chosen)) == 0
    assert f"{dataset.name}: of 3 scans 1 has no results: sub-03;" in capsys.readouterr().err


def test_too_few_controls_adjust_nothing(participants, plain_scans, run, out, capsys):
    plain_scans("01", "02")
    participants("participant_id group", "sub-01 HC", "sub-02 PD")
    assert run("--control-filter", 'group == "HC"') == 0
    why = "--control-filter matches 1 participant, at least 5 are needed for a slope"
    assert f"group_adjusted.tsv: not computed: {why}" in capsys.readouterr().err
    assert not (out / "group" / "group_adjusted.tsv").exists()


def test_merged_datasets_are_sites(tmp_path, plain_scans, run, out, capsys):
    for name in ("bern", "graz"):
        plain_scans("01", "02", "03", "04", tree=tmp_path / name / "derivatives" / "bids_dgmseg")
    trees = [tmp_path / name / "derivatives" / "bids_dgmseg" for name in ("bern", "graz")]
    assert run("--merge", *trees) == 0
    said = capsys.readouterr().err
    assert "sub-01, sub-02, sub-03, sub-04: in several datasets; treated as different participants" in said
    rows = rows_of(out / "group" / "group_volumes.tsv")
    assert [(row["participant_id"], row["dataset"], row["site"]) for row in rows[3:5]] == [
        ("sub-04", "bern", "bern"),
        ("sub-01", "graz", "graz"),
    ]
    assert sidecar(out / "group" / "group_volumes.tsv")["Settings"]["Datasets"] == {"bern": 4, "graz": 4}
    assert "8 scans of 8 participants at 2 sites" in (out / "group.html").read_text(encoding="utf-8")
    assert {path.name for path in out.iterdir()} == {
        ".bidsignore",
        "README",
        "dataset_description.json",
        "group.html",
        "group",
    }


def test_dataset_has_its_own_participants(tmp_path, participants, plain_scans, run, out):
    participants("participant_id age", "sub-01 30")
    plain_scans("01")
    tree = tmp_path / "graz" / "derivatives" / "bids_dgmseg"
    plain_scans("01", tree=tree)
    participants("participant_id age site", "sub-01 70 UKG", to=tmp_path / "graz")
    assert run("--merge", tree) == 0
    rows = rows_of(out / "group" / "group_volumes.tsv")
    assert [(row["age"], row["site"]) for row in rows] == [("30", "out"), ("70", "UKG")]


def test_named_group_column_keeps_its_name(tmp_path, participants, plain_scans, run, out):
    for name, column in (("bern", "group"), ("graz", "diagnosis")):
        plain_scans("01", "02", "03", tree=tmp_path / name)
        participants(f"participant_id {column}", "sub-01 HC", "sub-02 PD", to=tmp_path / name)
    assert run("--merge", tmp_path / "bern", tmp_path / "graz", "--group-column", "diagnosis") == 0
    assert [row["diagnosis"] for row in rows_of(out / "group" / "group_volumes.tsv")] == ["n/a"] * 3 + [
        "HC",
        "PD",
        "n/a",
    ]


def test_folder_without_results_is_not_merged(tmp_path, plain_scans, run, capsys):
    plain_scans("01")
    (tmp_path / "empty").mkdir()
    assert run("--merge", tmp_path / "empty") == 2
    assert "empty: no *_stats.tsv found; pass output folders of the participant level" in capsys.readouterr().err
    assert run("--merge", tmp_path / "none") == 2
    assert "none: no such folder" in capsys.readouterr().err


def test_scanner_is_the_default_site(plain_scans, run, out):
    plain_scans("01", scanner={"Manufacturer": "Siemens", "MagneticFieldStrength": 2.89})
    plain_scans("02", scanner={"Manufacturer": "Siemens", "MagneticFieldStrength": 7})
    assert run() == 0
    assert [row["site"] for row in rows_of(out / "group" / "group_volumes.tsv")] == ["Siemens 3T", "Siemens 7T"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--site-column", "centre"), "--site-column centre: no such column in participants.tsv (columns: age, group)"),
        (("--group-column", "dx"), "--group-column dx: no such column"),
        (("--age-column", "years"), "--age-column years: no such column"),
        (("--covariates", "bmi"), "--covariates bmi: no such column"),
        (("--measures", "mean_ppb"), "--measures mean_ppb: no such column in _stats.tsv"),
        (("--evaluation", "nowhere"), "--evaluation nowhere: overlap.tsv not found"),
        (("--control-filter", '__import__("os").system("true") == 0'), "is not allowed"),
        (("--control-filter", 'group == "hc"'), "matches no participant with results (group is HC, PD)"),
    ],
)
def test_option_that_does_not_fit_is_an_error(participants, plain_scans, run, out, capsys, options, message):
    plain_scans("01", "02")
    participants("participant_id age group", "sub-01 30 HC", "sub-02 40 PD")
    assert run(*options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("bids_dgmseg: error: --")
    assert message in line
    assert not list(out.glob("group*"))


def test_small_site_is_not_harmonized(participants, out, run, capsys):
    rng = np.random.default_rng(3)
    lines = ["participant_id site"]
    for place, site in enumerate("AAAAABBBBBCC"):
        means = rng.normal(0.1, 0.01, 4) + 0.02 * (site == "B")
        add_scan(out, f"sub-{place:02d}", {name: (700.0, float(m)) for name, m in zip(NUCLEI, means, strict=True)})
        lines.append(f"sub-{place:02d} {site}")
    participants(*lines)
    assert run("--measures", "mean_ppm") == 0
    line = (
        "group_harmonized.tsv: site C has usable scans of 2 participants, harmonization needs 3; its "
        "values are not harmonized"
    )
    assert capsys.readouterr().err.splitlines().count(line) == 1
    harmonized = {row["site"]: row["harmonized"] for row in rows_of(out / "group" / "group_harmonized.tsv")}
    assert harmonized["C"] == "n/a" != harmonized["A"]
    assert line in sidecar(out / "group" / "group_harmonized.tsv")["Notes"]


def test_damaged_table_gives_exit_code_1(plain_scans, run, out, capsys):
    plain_scans("01", "02", "03")
    table = out / "sub-02" / "anat" / "sub-02_seg-dgm16_stats.tsv"
    table.write_text(table.read_text().replace("0.111", "abc"))
    assert run() == 1
    said = [line for line in capsys.readouterr().err.splitlines() if "sub-02" in line]
    assert said == [
        "sub-02_seg-dgm16_stats.tsv: left out: damaged (mean_ppm of DN_L is 'abc'); run the participant level again "
        "with --force"
    ]
    assert [row["participant_id"] for row in rows_of(out / "group" / "group_volumes.tsv")] == ["sub-01", "sub-03"]
    assert said[0].replace("'", "&#39;") in (out / "group.html").read_text(encoding="utf-8")
    assert run("--participant-label", "01") == 0  # sub-02 is not wanted


def test_both_sides_together_are_a_family_of_their_own(participants, run, out, capsys):
    """They change nothing of the sides, whose tests they repeat."""
    rng = np.random.default_rng(4)
    people, scans = [], {}
    for place in range(24):
        people.append(f"sub-{place:02} {'HC PD'.split()[place % 2]} {'AB'[place // 2 % 2]}")
        scans[place] = {name: (float(rng.normal(700, 30)), float(rng.normal(0.1, 0.01))) for name in NUCLEI}
    participants("participant_id group site", *people)
    tables = []
    for with_both in (False, True):
        for place, values in scans.items():
            both = {}
            for name in ("DN", "GP"):
                (left, left_ppm), (right, right_ppm) = values[f"{name}_L"], values[f"{name}_R"]
                both[name] = left + right, (left * left_ppm + right * right_ppm) / (left + right)
            add_scan(out, f"sub-{place:02}", values | (both if with_both else {}))
        assert run("--control-filter", "group == 'HC'") == 0
        tables.append({path.stem: rows_of(path) for path in sorted((out / "group").glob("group_*.tsv"))})
    assert "damaged" not in capsys.readouterr().err
    sides, joined = tables
    wide = ("group_volumes", "group_susceptibility")
    for name, rows in joined.items():
        single = [row for row in rows if row.get("abbreviation", row.get("Nucleus")) not in ("DN", "GP")]
        if name in wide:
            single = [
                {key: row[key] for key in row if not key.startswith(("DN_v", "DN_m", "GP_v", "GP_m"))} for row in rows
            ]
        assert single == sides[name], name
    assert {row["nucleus"] for row in joined["group_asymmetry"]} == {"DN", "GP"}
    tests = [row for row in joined["group_differences"] if row["abbreviation"] in ("DN", "GP")]
    found = [row for row in tests if row["p_t"] != "n/a"]  # harmonized values have adjusted tests only
    assert found
    for first, second in zip(found[::2], found[1::2], strict=True):  # Benjamini and Hochberg's q of two tests
        low, high = sorted((first, second), key=lambda row: float(row["p_t"]))
        assert float(high["q_t"]) == pytest.approx(float(high["p_t"]), rel=1e-6)
        expected = min(2 * float(low["p_t"]), float(high["p_t"]))
        assert float(low["q_t"]) == pytest.approx(expected, rel=1e-5)
    assert {row["abbreviation"] for row in joined["group_harmonized"]} == {*NUCLEI, "DN", "GP"}
    text = (out / "group.html").read_text()
    assert '<th scope="row">DN</th>' in text  # in the table of the nuclei
    about = sidecar(out / "group" / "group_volumes.tsv")["DN_volume_mm3"]["Description"]
    assert about.startswith("dentate nucleus, bilateral: ")


def test_participants_of_a_study_are_in_its_raw_data(dataset, plain_scans, run, out):
    plain_scans("01", "02")
    (dataset / "dataset_description.json").write_text('{"Name": "x", "DatasetType": "study"}')
    raw = dataset / "sourcedata" / "raw"
    (raw / "sub-01").mkdir(parents=True)
    (raw / "dataset_description.json").write_text('{"Name": "x"}')
    (raw / "participants.tsv").write_text("participant_id\tage\nsub-01\t30\nsub-02\t40\n")
    assert run() == 0
    assert [row["age_years"] for row in rows_of(out / "group" / "group_volumes.tsv")] == ["30", "40"]
