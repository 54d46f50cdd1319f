"""Validity of the group statistics on simulated cohorts with known truth, and their run time.

    python benchmarks/group_statistics.py [--studies N] [--cohorts N] [--scans N] [--seed S]

Prints false positives of changes over time, of differences between groups, of correlations, of norms and of the check
of residuals in studies without an effect, coverage of the age curves, the variance due to site and the age slope after
ComBat, bias and coverage of the slope of the volume adjustment, detection of outliers, and time and memory of each
statistic for many scans of 16 nuclei.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from reporting import markdown
from scipy.stats import t as student

from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.stats.age_curves import fit_age_curves, fit_norms, score_scans
from bids_dgmseg.stats.combat import fit_combat
from bids_dgmseg.stats.group_tests import compare_changes, compare_groups
from bids_dgmseg.stats.outliers import robust_z
from bids_dgmseg.stats.regression import adjust_for_volume, correlate, covariate_matrix
from bids_dgmseg.study.analyses import notice_spread
from bids_dgmseg.study.group_comparisons import check_residuals

CURVES_TRUE = {"GP": (0.10, 0.09, 0.02), "PUT": (0.09, 0.04, -0.01), "CN": (0.04, 0.05, 0.01)}
"""α and γ in ppm, β per year as in the iron of Hallgren and Sourander (1958)."""
NOISE_PPM = 0.01
N_SITE_SCANS = 40


def main(argv: Sequence[str] | None = None) -> int:
    """Simulate cohorts and print all tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=2000, help="studies without an effect per row (default: 2000)")
    parser.add_argument("--cohorts", type=int, default=200, help="simulated cohorts per row (default: 200)")
    parser.add_argument("--scans", type=int, default=10_000, help="scans of the timing (default: 10000)")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    rng = np.random.default_rng(args.seed)
    null = f"{args.studies} studies without an effect per row: p < 0.05 in %"
    for title, rows in (
        (f"Change over time, {null}", changes(args.studies, rng)),
        (f"Differences between groups, {null}", differences(args.studies, rng)),
        (f"Relation to a score that differs between groups, {null}", correlations(args.studies, rng)),
        (f"Age curves, {args.cohorts} cohorts per row, 95 % limits", ageing(args.cohorts, rng)),
        (f"Norms, {args.cohorts} nuclei per row", norms(args.cohorts, rng)),
        (f"Spread of residuals, {args.cohorts} studies per row", residuals(args.cohorts, rng)),
        (f"ComBat, three sites of {N_SITE_SCANS}, 16 nuclei", sites(max(args.cohorts // 10, 5), rng)),
        (
            f"Volume adjustment, {args.cohorts} cohorts of 120 controls at four sites, true slope 5e-5 ppm/mm³",
            sizes(args.cohorts, rng),
        ),
        ("Outliers, three sites, one young scan with an error of five SD", outliers(args.cohorts, rng)),
        (f"{args.scans} scans of 16 nuclei", speed(args.scans, rng)),
    ):
        print(f"\n{title}\n\n{markdown(pd.DataFrame(rows).map(_three_digits))}", flush=True)
    return 0


VISITS: dict[str, Callable[[int], Sequence[float]]] = {
    "0, 1": lambda _: (0, 1),
    "0, 1, 2": lambda _: (0, 1, 2),
    "0 and 0.25, 1 or 3": lambda number: (0, (0.25, 1, 3)[number % 3]),
    "0, 0.25, 1, 3, the first two to four": lambda number: (0, 0.25, 1, 3)[: 2 + number % 3],
    "0, 1, 2; half of the people only 0": lambda number: (0, 1, 2)[: 1 + 2 * (number % 2)],
    "0, 6 of two people; 0, 0.5 of the others": lambda number: (0, 6 if number < 2 else 0.5),
}
"""Years of the visits of a person."""


def changes(n_studies: int, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Compute false positives of the mean change and of its difference between two groups.

    The noise is 1, SD of the true slopes in its unit. The other tests are a t test of the slopes with equal weights,
    and errors clustered by participant (CR3) of one slope with a t distribution of n - 1 degrees of freedom.
    """
    designs = [(n, VISITS[name], name, sd) for n in (8, 20, 60) for name in VISITS for sd in (0, 0.5, 1)]
    for n, visits, name, sd in designs:
        years = [np.array(visits(number), float) for number in range(n)]
        group = np.where(np.arange(n) < n // 2, "HC", "PD")
        who = np.repeat(np.arange(n), [len(times) for times in years])
        shape = (n_studies, len(who))
        y = rng.normal(0, 1, shape) + rng.normal(0, sd, (n_studies, n))[:, who] * np.concatenate(years)
        scans = {"participant_id": who.astype(str), "age": np.concatenate(years), "group": group[who]}
        rows = compare_changes(as_table(scans, y), reference="HC").set_index("group")
        centred = [times - times.mean() for times in years]
        several = [number for number, times in enumerate(years) if len(times) > 1]
        precision = np.array([centred[number] @ centred[number] for number in several])
        slopes = np.stack([y[:, who == number] @ centred[number] for number in several], axis=1) / precision
        plain, clustered = (
            weighted_mean(slopes, weights) for weights in (np.ones(len(several)), precision / precision.sum())
        )
        plain_error = slopes.std(axis=1, ddof=1) / np.sqrt(len(several))
        yield {
            "people": n,
            "visits (years)": name,
            "SD of slopes": sd,
            "change": percent(rows.loc["all", "p"]),
            "difference": percent(rows.loc["PD", "p_difference"]),
            "equal weights": percent(p_value(plain[0], plain_error, len(several) - 1)),
            "CR3": percent(p_value(*clustered, len(several) - 1)),
            "SD of the estimate": rows["change_per_year"][rows.index == "all"].std(),
            "SD, equal weights": plain[0].std(),
        }


def weighted_mean(values: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute the weighted mean of each row, and its HC3 error."""
    shares = weights / weights.sum()
    mean = values @ shares
    return mean, np.sqrt((((values - mean[:, None]) * shares / (1 - shares)) ** 2).sum(axis=1))


def p_value(estimate: np.ndarray, error: np.ndarray, df: int) -> np.ndarray:
    """Compute two-sided p values."""
    return 2 * student.sf(np.abs(estimate) / error, df)


def percent(p: Any) -> float:
    """Compute the percentage of tests with p < 0.05."""
    return float(100 * np.mean(np.asarray(p, float) < 0.05))


def as_table(scans: dict[str, Any], values: np.ndarray) -> pd.DataFrame:
    """Repeat the scans for all studies (rows of `values`), which take the place of nuclei."""
    n_studies, n_scans = values.shape
    table = pd.DataFrame({name: np.tile(column, n_studies) for name, column in scans.items()})
    return table.assign(abbreviation=np.repeat(np.arange(n_studies), n_scans), mean_ppm=values.ravel())


GROUPS: dict[str, tuple[list[tuple[int, int]], tuple[float, float]]] = {
    "10, 10": ([(10, 10)], (1, 1)),
    "30, 30 at three sites": ([(10, 10)] * 3, (1, 1)),
    "30, 30 at three sites (14:6, 10:10, 6:14)": ([(14, 6), (10, 10), (6, 14)], (1, 1)),
    "30, 30 at three sites (18:2, 10:10, 2:18)": ([(18, 2), (10, 10), (2, 18)], (1, 1)),
    "45, 15": ([(15, 5)] * 3, (1, 1)),
    "45, 15 of twice the SD": ([(15, 5)] * 3, (1, 2)),
    "15, 45 of twice the SD": ([(5, 15)] * 3, (1, 2)),
    "56, 4": ([(56, 4)], (1, 1)),
    "30, 30 at twelve sites": ([(3, 2), (2, 3)] * 6, (1, 1)),
    "30, 30; one of four sites has 40": ([(20, 20), (4, 3), (3, 4), (3, 3)], (1, 1)),
}
"""Controls and patients of each site, SD of both."""


def differences(n_studies: int, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Compute false positives of the difference at equal age, sex and site; sites differ by 1.5 SD."""
    for name, (counts, spread) in GROUPS.items():
        site = np.repeat(np.arange(len(counts)), [sum(pair) for pair in counts])
        is_patient = np.concatenate([np.repeat([False, True], pair) for pair in counts])
        n = len(site)
        people = {"participant_id": np.arange(n).astype(str), "group": np.where(is_patient, "PD", "HC")}
        people |= {"age": rng.uniform(40, 80, n), "sex": rng.choice(["F", "M"], n), "site": site.astype(str)}
        noise = rng.normal(0, 1, (n_studies, n)) * np.where(is_patient, spread[1], spread[0])
        y = noise + 1.5 * rng.normal(0, 1, (n_studies, len(counts)))[:, site] + 0.03 * people["age"]
        covariates = [column for column in ("age", "sex", "site") if len(np.unique(people[column])) > 1]
        rows = compare_groups(as_table(people, y), reference="HC", covariates=covariates)[0]
        others = covariate_matrix(pd.DataFrame(people)[covariates])
        design = np.column_stack([is_patient, np.ones(n), others]).astype(float)
        inverse = np.linalg.pinv(design)
        residual = ((y - y @ inverse.T @ design.T) ** 2).sum(axis=1) / (n - design.shape[1])
        errors = np.sqrt(residual * (inverse[0] @ inverse[0]))
        yield {
            "HC, PD": name,
            "HC3": percent(rows["p"]),
            "equal variances": percent(p_value(y @ inverse[0], errors, n - design.shape[1])),
            "coverage of g (%)": 100 * float(((rows["hedges_g_low"] <= 0) & (rows["hedges_g_high"] >= 0)).mean()),
        }


def correlations(n_studies: int, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Compute false positives of the relation to a score that is unrelated within the groups.

    Scores vary seven times as much in patients; their values vary as much as those of controls, or twice.
    """
    for n_patients, sd in product((15, 30), (1, 2)):
        is_patient = np.arange(60) >= 60 - n_patients
        people = {"participant_id": np.arange(60).astype(str), "group": np.where(is_patient, "PD", "HC")}
        table = as_table(people, rng.normal(0, np.where(is_patient, sd, 1), (n_studies, 60)) + is_patient)
        score = rng.normal(0, np.where(is_patient, 7, 1), (n_studies, 60)) + 3 * is_patient
        relations = correlate(table.assign(score=score.ravel()), variable="score", covariates=["group"])[0]
        held = (relations["r_low"] <= 0) & (relations["r_high"] >= 0)
        row = {"HC, PD": f"{60 - n_patients}, {n_patients}", "SD of PD": sd, "p < 0.05 (%)": percent(relations["p"])}
        yield row | {"coverage of r (%)": 100 * float(held.mean())}


def exponential(parameters: tuple[float, ...]) -> Callable[[np.ndarray], np.ndarray]:
    """Return the curve with these α, β and γ."""
    alpha, beta, gamma = parameters
    return lambda age: gamma - alpha * np.expm1(-beta * age)


SHAPES: dict[str, tuple[float, Callable[[np.ndarray], np.ndarray]]] = {
    "line": (0.0006, lambda age: 0.05 + 0.0006 * age),
    "no effect": (0, lambda age: 0.08 + 0 * age),
    **{f"exponential, {name}": (truth[0], exponential(truth)) for name, truth in CURVES_TRUE.items()},
}
"""True curves with their α."""

DESIGNS: dict[str, tuple[list[int], int]] = {
    "60 at one site": ([60], 0),
    "60 at three sites, 10 years apart": ([20] * 3, 10),
    "60 at twelve sites": ([5] * 12, 0),
    "20 at one site": ([20], 0),
    "150 at three sites": ([90, 45, 15], 0),
}
"""Sizes of the sites, years between their mean ages."""

AGES = np.array([30, 45, 60, 75])


def ageing(n_cohorts: int, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Compute the coverage of the limits of the best curve at four ages, and of the parameters that have limits."""
    for (shape, (alpha, truth)), (name, (sizes, years_apart)) in product(SHAPES.items(), DESIGNS.items()):
        site = np.repeat(np.arange(len(sizes)), sizes)
        age = np.clip(rng.uniform(20, 80, (n_cohorts, len(site))) + years_apart * (site - site.mean()), 18, 90)
        shift = rng.normal(0, 0.015, (n_cohorts, len(sizes)))[:, site]
        y = truth(age) + shift + rng.normal(0, NOISE_PPM, age.shape)
        people = {"participant_id": np.arange(len(site)).astype(str), "site": site.astype(str)}
        table = as_table(people, y).assign(age=age.ravel())
        fits, curves, _ = fit_age_curves(table, site="site" if len(sizes) > 1 else None)
        best = curves.merge(fits.loc[fits["best"], ["abbreviation", "curve"]])
        held = np.zeros((n_cohorts, len(AGES)), bool)
        for cohort, band in best.groupby("abbreviation"):
            at = truth(AGES) + shift[int(str(cohort))].mean()
            low, high = (np.interp(AGES, band["age"], band[end]) for end in ("low", "high"))
            held[int(str(cohort))] = (low <= at) & (at <= high)
        line = fits[fits["curve"] == "linear"]
        yield {
            "truth": shape,
            "participants": name,
            "lower AICc: line (%)": 100 * line["best"].mean(),
            "coverage at 30, 45, 60, 75 years (%)": ", ".join(f"{100 * share:.0f}" for share in held.mean(axis=0)),
            "α has limits, they hold (%)": _hold(fits, alpha, "exponential" if "exp" in shape else "linear"),
        }


def _hold(fits: pd.DataFrame, alpha: float, curve: str) -> str:
    """Return how often α of a curve has limits, and how often these contain the true one."""
    rows = fits[fits["curve"] == curve]
    limited = rows.dropna(subset=["alpha_low"])
    held = limited["alpha_low"].le(alpha) & limited["alpha_high"].ge(alpha)
    return f"{100 * len(limited) / len(rows):.0f}, {100 * held.mean():.0f}"


NORMS = tuple(product((12, 40, 100), (1, 3)))
"""Controls, SD at 80 over that at 20 years."""


def norms(n_studies: int, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Compute how often healthy people are beyond ±1.96, and how often a spread that grows with age is noticed."""
    for n, growth in NORMS:
        age, sex = rng.uniform(20, 80, 2 * n), rng.choice(["F", "M"], 2 * n)
        y = rng.normal(0, 0.01, (n_studies, 2 * n)) * (1 + (growth - 1) * (age - 20) / 60) + 0.001 * age
        table = as_table({"participant_id": np.arange(2 * n).astype(str), "age": age, "sex": sex}, y)
        is_control = np.tile(np.arange(2 * n) < n, n_studies)
        scores = score_scans(table, fit_norms(table, controls=is_control))
        is_beyond = scores["z"].abs() > 1.96
        known = scores["z"].notna()
        about = table[["abbreviation"]].assign(age_years=table["age"], control=is_control)
        named = notice_spread(table["participant_id"], pd.concat([about, scores], axis=1))
        yield {
            "controls": n,
            "SD at 80 over SD at 20 years": growth,
            "controls beyond ±1.96 (%)": 100 * is_beyond[known & is_control].mean(),
            "new people (%)": 100 * is_beyond[known & ~is_control].mean(),
            "new people above 65 (%)": 100 * is_beyond[known & ~is_control & (table["age"] > 65)].mean(),
            "growth noticed, per nucleus (%)": 100 * np.mean([*named.values()]),
        }


def residuals(n_studies: int, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Compute how often the spread of residuals is said to differ between groups or sites, with eight nuclei."""
    for name, ratio_of_groups, ratio_of_sites in (("alike", 1, 1), ("group of twice the SD", 2, 1), ("site", 1, 2)):
        for sizes in ((30, 30), (45, 15)):
            is_patient, site = np.arange(60) >= sizes[0], np.arange(60) % 3
            people = {"participant_id": np.arange(60).astype(str), "group": np.where(is_patient, "PD", "HC")}
            people |= {"age": rng.uniform(40, 80, 60), "site": site.astype(str)}
            spread = np.where(is_patient, ratio_of_groups, 1) * np.where(site == 2, ratio_of_sites, 1)
            table = as_table(people, rng.normal(0, 1, (8 * n_studies, 60)) * spread)
            values = compare_groups(table, reference="HC", covariates=["age", "site"])[1]
            values["site"] = values["participant_id"].astype(int) % 3
            warned = [
                any(check_residuals(part.assign(measure="mean_ppm")).values())
                for _, part in values.groupby(values["abbreviation"].astype(int) // 8)
            ]
            yield {"spread": name, "HC, PD": f"{sizes[0]}, {sizes[1]}", "warned (%)": 100 * np.mean(warned)}


def harmonize(values: pd.DataFrame, *, site: pd.Series, covariates: pd.DataFrame) -> pd.DataFrame:
    """Remove the site effects that are fitted to the values."""
    named = values.set_axis([str(name) for name in values], axis=1)
    model = fit_combat(named, site=site, covariates=covariates)
    return model.apply(named, site=site, covariates=covariates).set_axis(values.columns, axis=1)


def sites(n_cohorts: int, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Compute removed site variance and error of the age slope, for increasing age differences between sites."""
    for years_apart in (0, 5, 10):
        rows = []
        for _ in range(n_cohorts):
            code = np.repeat(np.arange(3), N_SITE_SCANS)
            age = rng.uniform(20, 70, code.size) + years_apart * code
            slope = rng.uniform(0.0003, 0.001, 16)
            spread = rng.uniform(0.7, 1.5, (3, 16))
            values = 0.05 + slope * age[:, None] + rng.normal(0, 0.012, (3, 16))[code]
            values += rng.normal(0, 0.008, values.shape) * spread[code]
            harmonized = harmonize(pd.DataFrame(values), site=pd.Series(code), covariates=pd.DataFrame({"age": age}))
            before, after = (np.polyfit(age, y, 1)[0].mean() / slope.mean() for y in (values, harmonized.to_numpy()))
            residuals = (pd.DataFrame(y - slope * age[:, None]) for y in (values, harmonized.to_numpy()))
            spread_before, spread_after = (rows.groupby(code).mean().var() for rows in residuals)
            reduction = 1 - spread_after / spread_before
            rows.append((reduction.mean(), reduction.min(), abs(before - 1), abs(after - 1)))
        mean, worst = np.mean(rows, axis=0), np.array(rows)
        yield {
            "years between sites": years_apart,
            "site variance removed (%)": 100 * mean[0],
            "worst nucleus (%)": 100 * worst[:, 1].min(),
            "slope error before (%)": 100 * mean[2],
            "slope error after (%)": 100 * mean[3],
            "worst cohort (%)": 100 * worst[:, 3].max(),
        }


def sizes(n_cohorts: int, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Compute the bias and coverage of the slope of volume; age, sex and site change volume and susceptibility."""
    truth = 5e-5
    for scans in (1, 2):
        cohorts = []
        for _ in range(n_cohorts):
            site, sex = rng.integers(0, 4, 120), rng.integers(0, 2, 120)
            age = rng.uniform(20, 60, 120) + 5 * site
            volume = 700 + rng.normal(0, 40, 4)[site] - 2 * (age - 50) + 30 * sex + rng.normal(0, 50, 120)
            chi = 0.1 + truth * volume + rng.normal(0, 0.015, 4)[site] + 0.0008 * age - 0.003 * sex
            chi += rng.normal(0, 0.01, 120)
            people = pd.DataFrame({"participant_id": np.arange(120), "age": age, "site": site, "sex": sex})
            people = people.astype({"site": str, "sex": str}).assign(volume_mm3=volume, mean_ppm=chi)
            table = pd.concat([people] * scans).assign(abbreviation="DN_L")
            table["mean_ppm"] += rng.normal(0, 0.003, len(table))
            cohorts.append(table)
        for names in ((), ("site", "age", "sex")):
            relations = pd.concat(
                adjust_for_volume(table, controls=np.full(len(table), True), covariates=names)[1] for table in cohorts
            )
            held = (relations["slope_low"] <= truth) & (truth <= relations["slope_high"])
            yield {
                "scans each": scans,
                "covariates": ", ".join(names) or "none",
                "bias (%)": 100 * (relations["slope"].mean() / truth - 1),
                "SD (%)": 100 * relations["slope"].std() / truth,
                "coverage (%)": 100 * held.mean(),
            }


def outliers(n_cohorts: int, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Compute how often an error of five standard deviations is found, and false alarms, by the scans of a site."""
    for n_site, age_column in product((15, 40), (None, "age")):
        alpha, beta, gamma = CURVES_TRUE["PUT"]
        tables = []
        for _ in range(n_cohorts):
            code, age = np.repeat(np.arange(3), n_site), rng.uniform(20, 85, 3 * n_site)
            age[0] = rng.uniform(20, 30)
            chi = alpha * (1 - np.exp(-beta * age)) + gamma + rng.normal(0, 0.01, 3)[code]
            chi += rng.normal(0, NOISE_PPM, age.size) + 5 * NOISE_PPM * (np.arange(age.size) == 0)
            tables.append(pd.DataFrame({"abbreviation": "PUT", "site": code, "age": age, "mean_ppm": chi}))
        is_outlier = np.array([robust_z(table, age=age_column)["outlier"] for table in tables])
        yield {
            "scans per site": n_site,
            "adjusted for age": "yes" if age_column else "no",
            "found (%)": 100 * is_outlier[:, 0].mean(),
            "false alarms (% of values)": 100 * is_outlier[:, 1:].mean(),
        }


def speed(n_scans: int, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Time each statistic on one table with two sessions per participant; peak memory is cumulative."""
    table = draw_table(n_scans, rng)
    wide = table.pivot(index=["participant_id", "session_id"], columns="abbreviation", values="mean_ppm")
    people = table.drop_duplicates(["participant_id", "session_id"]).set_index(["participant_id", "session_id"])
    people = people.loc[wide.index]
    statistics: dict[str, Callable[[], object]] = {
        "fit_age_curves": lambda: fit_age_curves(table),
        "adjust_for_volume": lambda: adjust_for_volume(table, controls=(table["group"] == "HC").to_numpy()),
        "harmonize": lambda: harmonize(wide, site=people["site"], covariates=people[["age", "sex", "group"]]),
        "compare_groups": lambda: compare_groups(table, reference="HC")[0],
        "compare_changes": lambda: compare_changes(table, reference="HC"),
        "robust_z": lambda: robust_z(table, age="age"),
    }
    for name, statistic in statistics.items():
        started, used = time.perf_counter(), time.process_time()
        statistic()
        peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        yield {
            "statistic": name,
            "seconds": time.perf_counter() - started,
            "CPU seconds": time.process_time() - used,
            "peak so far (GB)": peak_gb,
        }


def draw_table(n_scans: int, rng: np.random.Generator) -> pd.DataFrame:
    """Draw a table with one row per scan and nucleus."""
    n = n_scans // 2
    people = pd.DataFrame(
        {
            "participant_id": [f"sub-{number:05d}" for number in range(n)],
            "age": rng.uniform(20, 80, n),
            "sex": rng.choice(["F", "M"], n),
            "group": rng.choice(["HC", "PD", "MSA"], n),
            "site": rng.choice(list("ABCDEFGH"), n),
        }
    )
    scans = pd.concat([people.assign(session_id=f"ses-{number}", age=people["age"] + 2 * number) for number in (0, 1)])
    table = scans.merge(pd.DataFrame({"abbreviation": [row.abbreviation for row in STRUCTURES]}), how="cross")
    chi = 0.1 * (1 - np.exp(-0.05 * table["age"])) + rng.normal(0, 0.01, len(table))
    return table.assign(mean_ppm=chi, volume_mm3=rng.normal(700, 80, len(table)))


def _three_digits(value: Any) -> Any:
    return f"{value:.3g}" if isinstance(value, float) else value


if __name__ == "__main__":
    raise SystemExit(main())
