"""Groups that are unbalanced over sites, change their group, or change their scanner."""

import numpy as np
import pytest

from bids_dgmseg.config import GroupOptions
from bids_dgmseg.errors import InputError
from bids_dgmseg.study.analyses import run_analyses
from bids_dgmseg.study.cohort import load_cohort
from bids_dgmseg.study.group_comparisons import compare_with_reference_group, estimate_changes
from bids_dgmseg.study.reliability import estimate_reliability, plan_study
from bids_dgmseg.study.results import ResultsFolder
from bids_dgmseg.study.study import build_study
from tests.study.conftest import HEADER

SITE_PPM = {"A": 0.0, "B": 0.03, "C": 0.0}


@pytest.fixture
def study(output, add_scan, tmp_path):
    """Write two sessions, two years apart, of participants (group, site, group and site of the second session).

    DN_L rises by 0.001 ppm per year in HC and 0.004 in PD, with an error of 0.0002; DN_R has no change.
    """

    def build(people, **options):
        rows = []
        rng = np.random.default_rng(5)
        for number, (group, site, *later) in enumerate(people):
            start, sex = 0.1 + rng.normal(0, 0.01), "FM"[number % 2]
            rate = (0.004 if group == "PD" else 0.001) + rng.normal(0, 0.0002)
            for session, (its_group, its_site) in enumerate([(group, site), later or (group, site)]):
                means = [start + 2 * rate * session + SITE_PPM[its_site], 0.1 + rng.normal(0, 0.001)]
                add_scan(f"sub-{number:02d}_ses-{session}_seg-dgm16", means=tuple(map(repr, means)))
                folder = tmp_path / f"sub-{number:02d}"
                folder.mkdir(exist_ok=True)
                table = folder / f"sub-{number:02d}_sessions.tsv"
                text = table.read_text() if session else "session_id\tage\tgroup\tsite\n"
                table.write_text(f"{text}ses-{session}\t{50 + number % 7 + 2 * session}\t{its_group}\t{its_site}\n")
            rows.append(f"sub-{number:02d}\t{sex}\n")
        (tmp_path / "participants.tsv").write_text("participant_id\tsex\n" + "".join(rows))
        cohort = load_cohort([ResultsFolder(output, "out", tmp_path)])
        return build_study(cohort, GroupOptions(measures=("mean_ppm",), **options))

    return build


BALANCED = [(group, site) for group in ("HC", "PD") for site in "AB" for _ in range(4)]


def test_site_is_a_covariate_unless_others_are_named(study):
    default, explicit = study(BALANCED), study(BALANCED, covariates=("age", "Site"))
    assert default.covariates == ("age", "sex", "site")
    assert explicit.covariates == ("age", "site")
    assert study(BALANCED, covariates=("age",)).covariates == ("age",)
    assert study([(group, "A") for group, _ in BALANCED]).covariates == ("age", "sex")
    table = compare_with_reference_group(default).tables[0]
    assert table.facts["Covariates"] == ["age", "sex", "site"]
    assert table.facts["ParticipantsBySite"] == {site: {"HC": 4, "PD": 4} for site in "AB"}
    assert table.rows["df"].between(5, 11).all()  # 16 participants, 5 terms


def test_studies_are_planned_with_the_spread_of_the_comparison(study):
    built = study([*BALANCED, ("HC", "A", "HC", "B"), ("PD", "B", "HC", "B")])  # a change of site, and of group
    planned = plan_study(built, estimate_reliability(built).tables[0]).tables[0].rows
    tested = compare_with_reference_group(built).tables[0].rows
    assert planned["between_sd"].unique() == pytest.approx(tested["std"].to_numpy())


def test_group_at_one_site_is_one_warning(study):
    analysis = compare_with_reference_group(study([("HC", "A")] * 6 + [("PD", "B")] * 6))
    (line,) = analysis.warnings
    assert line.startswith(
        "group_differences.tsv: group and site are confounded (all PD have site B): add participants"
    )
    assert analysis.tables[0].rows.empty
    assert line.endswith(analysis.tables[0].not_computed)


def test_groups_that_cannot_be_tested_have_no_table(study):
    """One group only, everybody at another site, and a site with one participant."""
    for people, why in (
        ([("HC", "A")] * 6, "group is HC for all"),
        ([("HC", "A")] * 5 + [("PD", "A")] * 2, "5 and 2 participants with all covariates, a group needs 3"),
    ):
        table = compare_with_reference_group(study(people)).tables[0]
        assert table.rows.empty
        assert why in table.not_computed
    analysis = compare_with_reference_group(study([*BALANCED, ("PD", "C")]))
    line = "group_differences.tsv: site C has one participant, who is left out of comparisons"
    assert analysis.warnings == (line,)
    assert set(analysis.tables[0].rows["n_group"]) == {8}


def test_converter_alone_is_left_out(study):
    built = study([*BALANCED, ("HC", "A", "PD", "A")])
    analysis = compare_with_reference_group(built)
    assert analysis.warnings == (
        "group_differences.tsv: group of sub-16 differs between sessions; 1 of 17 participant(s) left out of "
        "comparisons of groups",
    )
    rows = analysis.tables[0].rows
    assert rows[["n_reference", "n_group"]].to_numpy().tolist() == [[8, 8]] * 2
    (changes,) = estimate_changes(built).tables
    assert changes.rows.query("abbreviation == 'DN_L'")["n"].tolist() == [17, 8, 8]  # all, HC, PD


def test_changes_are_compared_between_groups(study):
    (table,) = estimate_changes(study(BALANCED)).tables
    rows = table.rows.query("abbreviation == 'DN_L'").set_index("group")
    assert list(rows.index) == ["all", "HC", "PD"]
    assert rows["change_per_year"].to_dict() == pytest.approx({"all": 0.0025, "HC": 0.001, "PD": 0.004}, abs=3e-4)
    assert rows["difference_low"]["PD"] < 0.003 < rows["difference_high"]["PD"]
    assert rows["p_difference"]["PD"] < 1e-6
    assert rows["q_difference"]["PD"] == pytest.approx(2 * rows["p_difference"]["PD"])  # the smaller of two nuclei
    assert rows[["reference", "difference", "p_difference"]].iloc[:2].isna().all(axis=None)


def test_change_of_scanner_is_left_out(study):
    built = study([*BALANCED, ("HC", "A", "HC", "B"), ("PD", "A", "PD", "B")])
    analysis = estimate_changes(built)
    assert analysis.warnings == (
        "group_change.tsv: the site (column site) of sub-16, sub-17 changes between sessions; 2 participant(s) left "
        "out, as a change contains the difference between the sites",
    )
    rows = analysis.tables[0].rows.query("abbreviation == 'DN_L'")
    assert rows["n"].tolist() == [16, 8, 8]
    assert rows["change_per_year"].iloc[0] < 0.003
    (line,) = compare_with_reference_group(built).warnings
    assert line == (
        "group_differences.tsv: scanned at several sites: sub-16, sub-17; only the scans at the first site are used"
    )


def test_changes_within_participants_have_slopes_only(output, add_scan, tmp_path):
    rng = np.random.default_rng(2)
    for number in range(5):
        folder = tmp_path / f"sub-{number}"
        folder.mkdir()
        (folder / f"sub-{number}_sessions.tsv").write_text("session_id\tage\nses-0\t60\nses-1\t62\n")
        for session in (0, 1):
            change = (1 + 0.1 * number) * (1 - 2 * session)  # of the volume from the mean of both sessions, %
            row = f"1\tleft dentate nucleus\tDN_L\tL\t700\t700\t{0.1 + rng.normal(0, 0.01)!r}\t{change!r}\n"
            add_scan(f"sub-{number}_ses-{session}_seg-dgm16", text=f"{HEADER.strip()}\tvolume_change_percent\n{row}")
    (tmp_path / "participants.tsv").write_text("participant_id\n" + "".join(f"sub-{n}\n" for n in range(5)))
    cohort = load_cohort([ResultsFolder(output, "out", tmp_path)])
    measures = ("mean_ppm", "volume_change_percent")
    tables, _ = run_analyses(build_study(cohort, GroupOptions(measures=measures)))
    rows = {
        table.name: table.rows[table.rows["measure"] == "volume_change_percent"]
        for table in tables
        if "measure" in table.rows and (table.rows["measure"] == "volume_change_percent").any()
    }
    assert set(rows) == {"group_change"}  # DN_R is missing, so that there are no means of both sides
    assert rows["group_change"]["change_per_year"].tolist() == pytest.approx([-1.2])
    with pytest.raises(InputError, match="add another measure, such as volume_longitudinal_mm3"):
        build_study(cohort, GroupOptions(measures=measures[1:]))
