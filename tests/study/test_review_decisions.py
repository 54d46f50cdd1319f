"""Raters' decisions: reading, exclusion from the statistics, agreement."""

import shutil

import pandas as pd
import pytest
from sklearn.metrics import cohen_kappa_score

from bids_dgmseg.config import GroupOptions
from bids_dgmseg.errors import InputError
from bids_dgmseg.study.cohort import load_cohort
from bids_dgmseg.study.results import ResultsFolder
from bids_dgmseg.study.review_decisions import compare_raters, explain_decisions, match_decisions, read_decisions

HEADER = "scan\tmodel\tnucleus\tdecision\tnote\trater\tdate\tlabels\n"


@pytest.fixture
def write(tmp_path):
    """Write a file of decisions; lines are separated by spaces."""

    def call(*lines, name="qc_decisions.tsv"):
        path = tmp_path / name
        path.write_text(HEADER + "".join("\t".join(line.split()) + "\n" for line in lines))
        return path

    return call


@pytest.fixture
def load(output, add_scan):
    """Load four scans: sub-1 to sub-4, sub-4 rated red."""

    def call(*paths):
        for number in range(1, 5):
            path = add_scan(f"sub-{number}_seg-dgm16")
            rating = "red" if number == 4 else "green"
            path.with_name(f"sub-{number}_seg-dgm16_qc.json").write_text(f'{{"rating": "{rating}", "reasons": ["x"]}}')
        return load_cohort([ResultsFolder(output, "out", None)], GroupOptions(qc=paths))

    return call


def compare(*paths):
    """Compare the raters of files about ten scans."""
    scans = pd.DataFrame({"name": [f"sub-{number}" for number in range(10)], "model": "dgm16"})
    return compare_raters(match_decisions(read_decisions(paths), scans)[0])


def excluded(cohort):
    """Return the reasons by scan and nucleus."""
    rows = cohort.stats.dropna(subset=["excluded"])
    names = cohort.keys["participant_id"].to_numpy()[rows["scan"]]
    return dict(zip(zip(names, rows["abbreviation"], strict=True), rows["excluded"], strict=True))


def test_failed_nuclei_and_scans_are_left_out(write, load):
    path = write("sub-1 dgm16 DN_L fail leaks AB 2026-11-25T10:00:00", "sub-2 dgm16 all fail motion AB 2026-11-25")
    cohort = load(path)
    assert excluded(cohort) == {
        ("sub-1", "DN_L"): "failed by AB on 2026-11-25: leaks",
        **{("sub-2", f"DN_{side}"): "failed by AB on 2026-11-25: motion" for side in "LR"},
        **{("sub-4", f"DN_{side}"): "scan rated red: x" for side in "LR"},
    }
    assert [line for line in cohort.warnings if "failed" in line] == [
        "group_qc.tsv: 1 of 4 scans failed: sub-2; left out of all statistics (column excluded)",
        "group_stats.tsv: 1 of 4 nuclei of the other scans failed; left out of all statistics (column excluded)",
    ]
    assert cohort.settings["QualityControl"] == ["qc_decisions.tsv"]
    assert len(cohort.analysed().keys) == 2


def test_passed_scan_overrules_red_rating(write, load):
    cohort = load(write("sub-4 dgm16 all pass n/a AB n/a"))
    assert excluded(cohort) == {}


SCANS = pd.DataFrame({"name": ["sub-1", "sub-2"], "model": "dgm24"})


@pytest.mark.parametrize(
    ("nucleus", "decision", "nuclei"),
    [
        ("DN", "pass", {"DN_L", "DN_R"}),
        ("GPe_L", "fail", {"GPe_L", "GP_L"}),
        ("GP", "fail", {f"{name}_{side}" for name in ("GP", "GPe", "GPi") for side in "LR"}),
        ("all", "fail", {"all"}),
    ],
)
def test_failing_a_nucleus_fails_its_sides_and_parts(write, nucleus, decision, nuclei):
    matched, _ = match_decisions(read_decisions([write(f"sub-2 n/a {nucleus} {decision} n/a AB n/a")]), SCANS)
    verdicts = explain_decisions(matched)
    assert {name for _, name in verdicts} == nuclei
    assert {row for row, _ in verdicts} == {1}
    assert set(verdicts.values()) == {"" if decision == "pass" else "failed by AB"}


@pytest.mark.parametrize(("right", "is_left_out"), [("green", False), ("red", True)])
def test_bilateral_row_is_left_out_with_either_side(write, output, add_scan, right, is_left_out):
    rows = ["DN_L\t7\t0.1\tred", f"DN_R\t7\t0.1\t{right}", "DN\t7\t0.1\tred"]
    add_scan("sub-1_seg-dgm16", text="\n".join(["abbreviation\tvolume_mm3\tmean_ppm\trating", *rows, ""]))
    cohort = load_cohort(
        [ResultsFolder(output, "out", None)], GroupOptions(qc=(write("sub-1 n/a DN_L pass n/a AB n/a"),))
    )
    assert cohort.stats["excluded"].notna().tolist() == [False, is_left_out, is_left_out]


def test_any_rater_can_fail_and_the_last_decision_counts(write, load):
    first = write(
        "sub-1 n/a DN_L fail n/a AB 2026-01-02",
        "sub-1 n/a DN_L pass n/a AB 2026-01-03",
        "sub-2 n/a DN_R pass n/a AB n/a",
    )
    second = write("sub-2_seg-dgm16 n/a DN fail n/a CD n/a", name="second.tsv")
    assert excluded(load(first, second)).keys() - {("sub-4", "DN_L"), ("sub-4", "DN_R")} == {
        ("sub-2", "DN_L"),  # DN is both sides
        ("sub-2", "DN_R"),
    }


@pytest.mark.parametrize(
    ("first", "second", "verdict", "is_said"),
    [
        ("pass 2026-01-02", "fail 2026-01-03", "fail", False),
        ("fail 2026-01-02", "pass 2026-01-03", "pass", False),
        ("fail n/a", "pass 2026-01-03", "fail", True),
        ("fail 2026-01-03T10:00:00", "pass 2026-01-03T11:00:00", "pass", False),
        ("fail 2026-01-03T10:00:00", "pass 2026-01-03", "fail", True),
        ("pass n/a", "pass n/a", "pass", False),
    ],
)
def test_failure_counts_without_an_order_in_time(write, first, second, verdict, is_said):
    lines = (f"sub-1 n/a CN_L {decision} n/a AB {date}" for decision, date in map(str.split, (first, second)))
    matched, warnings = match_decisions(read_decisions([write(*lines)]), SCANS)
    assert matched["decision"].tolist() == [verdict]
    line = "conflict with another of the same rater and cannot be ordered by date; counted as fail: sub-1 CN_L by AB"
    assert warnings == ([f"`qc`: 1 decision(s) {line}"] if is_said else [])


def test_decision_on_other_labels_is_listed_and_not_applied(write):
    lines = [f"sub-{number} n/a CN_L fail n/a AB n/a {labels}" for number, labels in ((1, "old"), (2, "now"))]
    matched, warnings = match_decisions(read_decisions([write(*lines)]), SCANS.assign(labels="now"))
    assert matched["scan"].tolist() == ["sub-2"]
    line = "refer to other labels; ignored, review again: sub-1 CN_L by AB"
    assert warnings == [f"`qc`: 1 decision(s) {line}"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("sub-1 n/a DN_L maybe n/a A n/a", r" qc_decisions.tsv: line 2 \(sub-1, DN_L, maybe, nan\) has .*; correct it"),
        ("sub-1 n/a XX fail n/a A n/a", r" qc_decisions.tsv: line 2 \(sub-1, XX, fail, nan\) has .*an unknown nucleus"),
        ("n/a n/a DN_L fail n/a A n/a", r" qc_decisions.tsv: line 2 \(nan, DN_L, fail, nan\) has no scan"),
        ("sub-1 n/a DN_L fail n/a A 11/30/2026", r" .*\(sub-1, DN_L, fail, 11/30/2026\) has .* not ISO 8601"),
        ("sub-9 n/a all fail n/a A n/a", r": no results of sub-9 \(available: e.g. sub-1\); correct or remove"),
    ],
)
def test_invalid_decisions_are_one_line(write, load, line, message):
    with pytest.raises(InputError, match=f"^`qc`{message}"):
        load(write(line))


def test_other_tables_are_rejected(tmp_path):
    (tmp_path / "x.tsv").write_text("a\tb\n1\t2\n")
    with pytest.raises(InputError, match=r"x.tsv: no column scan, nucleus, decision; pass a qc_decisions.tsv"):
        read_decisions([tmp_path / "x.tsv"])
    with pytest.raises(InputError, match=r"`qc` y.tsv: no such file"):
        read_decisions([tmp_path / "y.tsv"])


def test_agreement_of_raters(write):
    """AB and CD agree on 7 of 10: p_e = .6 * .5 + .4 * .5 = .5, kappa = (.7 - .5) / .5 = .4."""
    first, second = "ppppppffff", "ppppffffpf"
    words = {"p": "pass", "f": "fail"}
    lines = [
        f"sub-{place} n/a {'CN_L' if place < 5 else 'DN_R'} {words[decision]} n/a {rater} n/a"
        for rater, decisions in (("AB", first), ("CD", second))
        for place, decision in enumerate(decisions)
    ]
    table = compare(write(*lines)).set_index("nucleus")
    row = table.loc["all nuclei"]
    assert (row["rater_1"], row["rater_2"], row["n"], row["n_agree"]) == ("AB", "CD", 10, 7)
    assert row["kappa"] == pytest.approx(0.4)
    assert row["kappa"] == pytest.approx(cohen_kappa_score(list(first), list(second)))
    assert [*table.loc["CN_L", ["n", "n_agree"]]] == [5, 4]


def test_kappa_of_constant_decisions_is_not_defined(write):
    lines = [f"sub-{n} n/a CN_L pass n/a {rater} n/a" for rater in "AB" for n in range(3)]
    row = compare(write(*lines)).iloc[0]
    assert (row["agreement"], row["note"]) == (1.0, "no kappa: a rater gave one decision only")
    assert pd.isna(row["kappa"])


def test_decisions_are_on_the_dataset_of_their_file(write, add_scan, output, tmp_path):
    add_scan("sub-1_seg-dgm16")
    shutil.copytree(output, tmp_path / "graz")
    folders = [ResultsFolder(output, "bern", None), ResultsFolder(tmp_path / "graz", "graz", None)]
    bern = write("sub-1 n/a all fail n/a AB 2026-01-02", name="out/qc_decisions.tsv")
    graz = write("sub-1 n/a all pass n/a AB 2026-01-03", name="graz/qc_decisions.tsv")
    cohort = load_cohort(folders, GroupOptions(qc=(bern, graz)))
    assert cohort.qc["excluded"].isna().tolist() == [False, True]  # of bern and graz
    assert "group_qc.tsv: 1 of 2 scans failed: sub-1 (bern); left out" in "\n".join(cohort.warnings)
    elsewhere = write("sub-1 n/a all fail n/a AB 2026-01-02")
    with pytest.raises(InputError, match=r"^`qc`: sub-1: in several datasets; move the file"):
        load_cohort(folders, GroupOptions(qc=(elsewhere,)))
    add_scan("sub-2_seg-dgm16")
    cohort = load_cohort(folders, GroupOptions(qc=(write("sub-2 n/a all fail n/a AB n/a"),)))  # only bern has sub-2
    assert cohort.qc["excluded"].isna().tolist() == [True, False, True]
