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


def test_participants_are_joined_with_warnings(dataset, plain_scans, run, out, capsys):
    plain_scans("01", "02", "03", "04", "05", "06")
    text = "Participant_ID;Age;Sex;Group\r\n1;30,5;f;HC\r\n2; 89+ ;M;HC\r\n3;n/a;m;PD\r\n4;034Y;F;PD\r\n5;old;F;PD\r\n"
    (dataset / "participants.tsv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert run() == 0
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "participants.tsv: no row for sub-06; their columns are n/a",
        "participants.tsv: Age of sub-02 is '89+', taken as 89",
        "participants.tsv: Age of sub-04 is '034Y', taken as 34",
        "participants.tsv: Age of sub-05 is 'old', not a number; it counts as missing",
        "participants.tsv: no age of sub-03, sub-05, sub-06; 3 of 6 participants are left out of analyses with age",
    ]
    rows = rows_of(out / "group_volumes.tsv")
    assert [(row["age_years"], row["Age"]) for row in rows] == [
        ("30.5", "30.5"),
        ("89", "89+"),
        ("n/a", "n/a"),
        ("34", "034Y"),
        ("n/a", "old"),
        ("n/a", "n/a"),
    ]


def test_participants_without_any_match_are_an_error(participants, plain_scans, run, out, capsys):
    plain_scans("01", "02")
    participants("participant_id age", "sub-S1 30", "sub-S2 40")
    assert run() == 2
    line = "participants.tsv: none of its ids (sub-S1, sub-S2) has results (found sub-01, sub-02); correct the ids"
    assert line in capsys.readouterr().err
    assert not (out / "group.html").exists()
    participants("participant_id age", "SUB_01 30", "sub-S2 40")
    assert run() == 0
    said = capsys.readouterr().err.splitlines()
    assert said[:3] == [
        "participants.tsv: SUB_01 is sub-01; spell ids like the folders",
        "participants.tsv: no row for sub-02; their columns are n/a",
        "participants.tsv: no results of sub-S2; they are not in the tables",
    ]


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
    settings = sidecar(out / "group_differences.tsv")["Settings"]
    assert (settings["ReferenceGroup"], settings["ReferenceGroupFrom"]) == (reference, why)
    assert {row["reference"] for row in rows_of(out / "group_differences.tsv")} == {reference}


def test_age_column_is_named_or_missed(participants, plain_scans, run, out, capsys):
    plain_scans("01", "02")
    participants("participant_id age_at_scan years_old", "sub-01 30 31", "sub-02 40 41")
    for options, ages, line in (
        ((), ["30", "40"], "participants.tsv: ages are from column age_at_scan; --age-column selects another"),
        (("--age-column", "years_old"), ["31", "41"], None),
    ):
        assert run(*options) == 0
        said = capsys.readouterr().err.splitlines()
        assert [text for text in said if "ages are" in text] == ([line] if line else [])
        assert [row["age_years"] for row in rows_of(out / "group_volumes.tsv")] == ages
    assert sidecar(out / "group_volumes.tsv")["Settings"]["AgeColumn"] == "years_old"
    participants("participant_id years_old", "sub-01 31", "sub-02 41")
    assert run() == 0
    assert (
        "participants.tsv: no column of ages (columns: years_old); age curves and the adjustment for age are omitted; "
        "name it with --age-column"
    ) in capsys.readouterr().err


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


def test_spellings_of_a_group_are_one_group(dataset, plain_scans, run, out, capsys):
    groups = ["HC", "HC", " HC ", "hc", "hc", "PD", "PD", "pd"]
    plain_scans(*(f"{place:02}" for place in range(8)))
    rows = [f"sub-{place:02}\t{group}" for place, group in enumerate(groups)]
    (dataset / "participants.tsv").write_text("\n".join(["participant_id\tgroup", *rows]))
    assert run("--control-filter", "group == 'HC'") == 0
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if "taken as" in line] == [
        "participants.tsv: group 'hc' is taken as 'HC'",
        "participants.tsv: group 'pd' is taken as 'PD'",
    ]
    table = out / "group_differences.tsv"
    compared = {(row["reference"], row["group"], row["n_reference"], row["n_group"]) for row in rows_of(table)}
    assert compared == {("HC", "PD", "5", "3")}  # spaces are stripped


@pytest.mark.parametrize(
    ("column", "where"), [("site_id", "participants.tsv: site_id"), ("place", "scanner in the maps' sidecars: site")]
)
def test_spellings_of_a_site_are_different_sites(participants, plain_scans, run, out, capsys, column, where):
    rows = []
    for site, labels in {"Bern-1": ("01", "02", "03", "04"), "bern1": ("05", "06", "07", "08")}.items():
        plain_scans(*labels, scanner={"Manufacturer": site})
        rows += [f"sub-{label} {site}" for label in labels]
    participants(f"participant_id {column}", *rows)
    assert run() == 0
    line = f"{where} is spelled 'Bern-1' and 'bern1', which count as different; use one spelling"
    assert capsys.readouterr().err.splitlines().count(line) == 1
    assert sidecar(out / "group_harmonized.tsv")["Notes"][0] == line
    assert sidecar(out / "group_differences.tsv")["Notes"] == []


def test_each_dataset_has_its_unit_of_age(tmp_path, participants, plain_scans, run, out, capsys):
    for name, labels, units, age in (
        ("bern", "12", "months", "366"),
        ("graz", "34", "years", "40"),
        ("linz", "5", "Jahre", "50"),
    ):
        plain_scans(*labels, tree=tmp_path / name)
        participants("participant_id age", *(f"sub-{label} {age}" for label in labels), to=tmp_path / name)
        (tmp_path / name / "participants.json").write_text(json.dumps({"age": {"Units": units}}))
    assert run("--merge", *(tmp_path / name for name in ("bern", "graz", "linz"))) == 0
    rows = rows_of(out / "group_volumes.tsv")
    assert [(row["age_years"], row["age"]) for row in rows] == [
        ("30.5", "366"),
        ("30.5", "366"),
        ("40", "40"),
        ("40", "40"),
        ("50", "50"),
    ]
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if "participants.json" in line] == [
        "bern: participants.json: age is in months; age_years has it in years",
        "linz: participants.json: unknown Units 'Jahre' of age, assuming years; use one of years, months, weeks, days",
    ]


def test_too_few_controls_adjust_nothing(participants, plain_scans, run, out, capsys):
    plain_scans("01", "02")
    participants("participant_id group", "sub-01 HC", "sub-02 PD")
    assert run("--control-filter", 'group == "HC"') == 0
    why = "--control-filter matches 1 participant, at least 5 are needed for a slope"
    assert f"group_adjusted.tsv: not computed: {why}" in capsys.readouterr().err
    assert sidecar(out / "group_adjusted.tsv")["NotComputed"] == why
    assert rows_of(out / "group_adjusted.tsv") == []


def test_merged_datasets_are_sites(tmp_path, plain_scans, run, out, capsys):
    for name in ("bern", "graz"):
        plain_scans("01", "02", "03", "04", tree=tmp_path / name / "derivatives" / "bids_dgmseg")
    trees = [tmp_path / name / "derivatives" / "bids_dgmseg" for name in ("bern", "graz")]
    assert run("--merge", *trees) == 0
    said = capsys.readouterr().err
    assert (
        "sub-01, sub-02, sub-03, sub-04: in several datasets; treated as different participants, see column dataset"
    ) in said
    rows = rows_of(out / "group_volumes.tsv")
    assert [(row["participant_id"], row["dataset"], row["site"]) for row in rows[3:5]] == [
        ("sub-04", "bern", "bern"),
        ("sub-01", "graz", "graz"),
    ]
    assert sidecar(out / "group_volumes.tsv")["Settings"]["Datasets"] == {"bern": 4, "graz": 4}
    assert "8 scans of 8 participants at 2 sites" in (out / "group.html").read_text(encoding="utf-8")
    assert {path.name for path in out.iterdir() if not path.name.startswith("group_")} == {
        ".bidsignore",
        "README",
        "dataset_description.json",
        "group.html",
        "figures",
    }


def test_dataset_has_its_own_participants(tmp_path, participants, plain_scans, run, out):
    participants("participant_id age", "sub-01 30")
    plain_scans("01")
    tree = tmp_path / "graz" / "derivatives" / "bids_dgmseg"
    plain_scans("01", tree=tree)
    participants("participant_id age site", "sub-01 70 UKG", to=tmp_path / "graz")
    assert run("--merge", tree) == 0
    rows = rows_of(out / "group_volumes.tsv")
    assert [(row["age"], row["site"]) for row in rows] == [("30", "out"), ("70", "UKG")]


def test_columns_of_merged_datasets_are_aligned(tmp_path, participants, plain_scans, run, out, capsys):
    plain_scans("01", "02", tree=tmp_path / "bern")
    plain_scans("03", "04", tree=tmp_path / "graz")
    participants("participant_id age sex group", "sub-01 30 F HC", "sub-02 40 M PD", to=tmp_path / "bern")
    participants("participant_id Age gender diagnosis", "sub-03 50 f HC", "sub-04 60 m PD", to=tmp_path / "graz")
    assert run("--merge", tmp_path / "bern", tmp_path / "graz") == 0
    said = capsys.readouterr().err.splitlines()
    assert said[:3] == [
        f"graz: participants.tsv: using its column {own} as {name}"
        for own, name in (("Age", "age"), ("gender", "sex"), ("diagnosis", "group"))
    ]
    rows = rows_of(out / "group_volumes.tsv")
    assert [(row["age"], row["sex"], row["group"]) for row in rows] == [
        ("30", "F", "HC"),
        ("40", "M", "PD"),
        ("50", "f", "HC"),
        ("60", "m", "PD"),
    ]
    assert not {"Age", "gender", "diagnosis"} & set(rows[0])


def test_named_group_column_keeps_its_name(tmp_path, participants, plain_scans, run, out):
    for name, column in (("bern", "group"), ("graz", "diagnosis")):
        plain_scans("01", "02", "03", tree=tmp_path / name)
        participants(f"participant_id {column}", "sub-01 HC", "sub-02 PD", to=tmp_path / name)
    assert run("--merge", tmp_path / "bern", tmp_path / "graz", "--group-column", "diagnosis") == 0
    assert [row["diagnosis"] for row in rows_of(out / "group_volumes.tsv")] == ["n/a"] * 3 + ["HC", "PD", "n/a"]


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
    assert [row["site"] for row in rows_of(out / "group_volumes.tsv")] == ["Siemens 3T", "Siemens 7T"]


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
    assert not list(out.glob("group_*"))


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
    harmonized = {row["site"]: row["harmonized"] for row in rows_of(out / "group_harmonized.tsv")}
    assert harmonized["C"] == "n/a" != harmonized["A"]
    assert line in sidecar(out / "group_harmonized.tsv")["Notes"]


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ([], "(linear); compare --combat-age spline, or harmonize only sites of similar ages"),
        (["--combat-age", "spline"], "(spline); harmonize only sites of similar ages"),
    ],
)
def test_sites_of_other_ages_are_reported(participants, out, run, capsys, options, advice):
    rng = np.random.default_rng(3)
    lines = ["participant_id site age"]
    for place in range(20):
        means = rng.normal(0.1, 0.01, 4)
        add_scan(out, f"sub-{place:02d}", {name: (700.0, float(m)) for name, m in zip(NUCLEI, means, strict=True)})
        lines.append(f"sub-{place:02d} {'AB'[place // 10]} {20 + 3 * place}")
    participants(*lines)
    assert run("--measures", "mean_ppm", *options) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "hardly overlap" in line]
    start = "so its site effect depends on the assumed effect of age"
    assert said == [
        f"group_harmonized.tsv: ages at site {site} hardly overlap those at other sites, {start} {advice}"
        for site in ("A (20 to 47)", "B (50 to 77)")
    ]
    about = sidecar(out / "group_harmonized.tsv")
    assert about["AgeEffect"] == about["Settings"]["CombatAge"] == (options or ["", "linear"])[1]


def test_harmonization_warnings_name_the_model(participants, out, run, capsys):
    lines = ["participant_id site"]
    for place, site in enumerate("AAAABBBB"):
        add_scan(out, f"sub-{place}", {name: (700.0, 0.1 + 0.01 * place) for name in NUCLEI})
        lines.append(f"sub-{place} {site}")
    table = out / "sub-0" / "anat" / "sub-0_seg-dgm16_stats.tsv"
    table.with_name("sub-0_seg-dcnnet_stats.tsv").write_bytes(table.read_bytes())
    participants(*lines)
    assert run("--measures", "mean_ppm") == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "group_harmonized" in line]
    assert said == [
        "group_harmonized.tsv: dcnnet: site A has usable scans of 1 participant, harmonization needs 3; its values are "
        "not harmonized",
        "group_harmonized.tsv: not computed for dcnnet: fewer than two sites have usable scans of 3 participants",
    ]
    assert {row["model"] for row in rows_of(out / "group_site_variance.tsv")} == {"dgm16"}


def test_damaged_table_gives_exit_code_1(plain_scans, run, out, capsys):
    plain_scans("01", "02", "03")
    table = out / "sub-02" / "anat" / "sub-02_seg-dgm16_stats.tsv"
    table.write_text(table.read_text().replace("0.111", "abc"))
    assert run() == 1
    said = [line for line in capsys.readouterr().err.splitlines() if "sub-02" in line]
    assert said == [
        "sub-02_seg-dgm16_stats.tsv: damaged (mean_ppm of DN_L is 'abc') and left out; run the participant "
        "level again with --force for them"
    ]
    assert [row["participant_id"] for row in rows_of(out / "group_volumes.tsv")] == ["sub-01", "sub-03"]
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
        tables.append({path.stem: rows_of(path) for path in sorted(out.glob("group_*.tsv"))})
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
    about = sidecar(out / "group_volumes.tsv")["DN_volume_mm3"]["Description"]
    assert about.startswith("dentate nucleus, bilateral: ")


def test_participants_of_a_study_are_in_its_raw_data(dataset, plain_scans, run, out):
    plain_scans("01", "02")
    (dataset / "dataset_description.json").write_text('{"Name": "x", "DatasetType": "study"}')
    raw = dataset / "sourcedata" / "raw"
    (raw / "sub-01").mkdir(parents=True)
    (raw / "dataset_description.json").write_text('{"Name": "x"}')
    (raw / "participants.tsv").write_text("participant_id\tage\nsub-01\t30\nsub-02\t40\n")
    assert run() == 0
    assert [row["age_years"] for row in rows_of(out / "group_volumes.tsv")] == ["30", "40"]
