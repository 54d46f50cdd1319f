"""The group level from the command line, on results without images."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
        "not checked for changes: 3 scan(s) whose inputs were not found",
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
    line = f"participants.tsv: group: reference group is {reference}: {why}; name the controls with --controls"
    is_guess = why.startswith(("of ", "the largest"))
    assert (line in said.err, line in (out / "group.html").read_text("utf-8")) == (is_guess, is_guess)
    settings = sidecar(out / "group" / "group_stats.tsv")["Settings"]
    assert (settings["ReferenceGroup"], settings["ReferenceGroupFrom"]) == (reference, why)
    assert not (out / "group" / "group_differences.tsv").exists()  # groups of two are not tested


def test_group_level_needs_no_raw_data(plain_scans, run, capsys):
    plain_scans("01", "02")
    assert run() == 0
    assert "ds: no participants.tsv; demographics will be missing from the tables" in capsys.readouterr().err


def test_maps_without_results_are_listed(dataset, plain_scans, run, out, capsys):
    plain_scans("01", "02")
    (dataset / "dataset_description.json").write_text('{"Name": "x", "BIDSVersion": "1.10.0"}')
    for scan in ("sub-01", "sub-02", "sub-02_acq-x", "sub-03"):
        folder = dataset / scan.partition("_")[0] / "anat"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{scan}_Chimap.nii.gz").touch()
    assert run("--participant-label", "01") == 0
    assert "without results" not in capsys.readouterr().err
    assert run() == 0
    warning = (
        f"{dataset.name}: 2 of 4 scan(s) without results: sub-02_acq-x, sub-03; run the participant level to include "
        "them"
    )
    assert warning in capsys.readouterr().err
    assert warning in (out / "group.html").read_text()


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
    assert "8 scan(s) of 8 participant(s) at 2 site(s)" in (out / "group.html").read_text(encoding="utf-8")
    assert {path.name for path in out.iterdir()} == {
        ".bidsignore",
        "logs",
        "README",
        "dataset_description.json",
        "group.html",
        "group",
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--site-column", "centre"), "--site-column centre: no such column in participants.tsv (columns: age, group)"),
        (("--measures", "mean_ppb"), "--measures mean_ppb: no such column in _stats.tsv"),
        (("--norms-save", "."), ": is a folder; pass the name of a file"),
        (("--controls", "MSA"), "no included scan belongs to this group (groups: HC, PD)"),
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
