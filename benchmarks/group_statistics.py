"""Validity of the group statistics on simulated cohorts with known truth, and their run time.

    python benchmarks/group_statistics.py [--cohorts N] [--scans N] [--seed S]

Prints bias and coverage of the age curves, the variance due to site and the age slope after ComBat, false positives of
group tests, bias and coverage of the slope of the volume adjustment, detection of outliers, coverage of Hedges' g, and
time and memory of each statistic for many scans of 16 nuclei.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from reporting import markdown
from scipy.stats import ttest_ind

from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.stats.age_curves import BETA_BOUNDS, EXPONENTIAL, LINEAR, Fit, fit_age_curves, fit_curve
from bids_dgmseg.stats.combat import fit_combat
from bids_dgmseg.stats.group_tests import (
    ComparisonOptions,
    ancova,
    change_per_year,
    check_sites,
    compare_groups,
    hedges_g,
)
from bids_dgmseg.stats.outliers import robust_z
from bids_dgmseg.stats.regression import adjust_for_volume

CURVES_TRUE = {"GP": (0.10, 0.09, 0.02), "PUT": (0.09, 0.04, -0.01), "CN": (0.04, 0.05, 0.01)}
"""α and γ in ppm, β per year as in the iron of Hallgren and Sourander (1958)."""
NOISE_PPM = 0.01
N_SITE_SCANS = 40


def main(argv: Sequence[str] | None = None) -> int:
    """Simulate cohorts and print all tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cohorts", type=int, default=200, help="simulated cohorts per row (default: 200)")
    parser.add_argument("--scans", type=int, default=10_000, help="scans of the timing (default: 10000)")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    rng = np.random.default_rng(args.seed)
    for title, rows in (
        (
            f"Age curves, {args.cohorts} cohorts per row, noise {NOISE_PPM} ppm, 95 % confidence intervals",
            ageing(args.cohorts, rng),
        ),
        (f"ComBat, three sites of {N_SITE_SCANS}, 16 nuclei", sites(max(args.cohorts // 10, 5), rng)),
        (
            f"Volume adjustment, {args.cohorts} cohorts of 120 controls at four sites, true slope 5e-5 ppm/mm³",
            sizes(args.cohorts, rng),
        ),
        ("Outliers, 120 scans at three sites, one young with an error of five SD", outliers(args.cohorts, rng)),
        (
            f"Hedges' g, {5 * args.cohorts} pairs of groups per row, 95 % confidence intervals",
            effects(5 * args.cohorts, rng),
        ),
        (
            f"Groups without a true difference at three sites, {args.cohorts} cohorts per row: p < 0.05 in % of tests",
            false_positives(args.cohorts, rng),
        ),
        (f"{args.scans} scans of 16 nuclei", speed(args.scans, rng)),
    ):
        print(f"\n{title}\n\n{markdown(pd.DataFrame(rows).map(_three_digits))}", flush=True)
    return 0


def ageing(n_cohorts: int, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Compute median bias and coverage of the confidence intervals."""
    for nucleus, truth in CURVES_TRUE.items():
        for ages in ((5, 85), (20, 80)):
            for n in (30, 100, 300):
                drawn = [draw_curve(truth, ages, n, rng) for _ in range(n_cohorts)]
                fits = [fit_curve(age, chi, curve=EXPONENTIAL) for age, chi in drawn]
                estimates = [list(fit.estimates().values())[:3] for fit in fits]
                values, half = np.moveaxis(np.array(estimates), 2, 0)
                bias = np.median(values, axis=0) - truth
                held = 100 * np.mean(np.abs(values - truth) <= half, axis=0)
                yield {
                    "nucleus": nucleus,
                    "ages": f"{ages[0]}–{ages[1]}",
                    "n": n,
                    "bias α (%)": 100 * bias[0] / truth[0],
                    "bias β (%)": 100 * bias[1] / truth[1],
                    "bias γ (ppm)": bias[2],
                    "coverage α, β, γ (%)": ", ".join(f"{share:.0f}" for share in held),
                    "β at a bound (%)": 100 * np.mean(np.isclose(values[:, [1]], BETA_BOUNDS).any(axis=1)),
                    "AICc correct (%)": 100
                    * np.mean([selects_exponential(fit, *data) for fit, data in zip(fits, drawn, strict=True)]),
                }


def draw_curve(
    truth: tuple[float, ...], ages: tuple[int, int], n: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw age and susceptibility of one cohort."""
    alpha, beta, gamma = truth
    age = rng.uniform(*ages, n)
    return age, alpha * (1 - np.exp(-beta * age)) + gamma + rng.normal(0, NOISE_PPM, n)


def selects_exponential(fit: Fit, age: np.ndarray, chi: np.ndarray) -> bool:
    """Test whether the exponential curve has the lowest AICc."""
    return fit.aicc < fit_curve(age, chi, curve=LINEAR).aicc


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
            found = pd.concat(
                adjust_for_volume(table, controls=np.full(len(table), True), covariates=names)[1] for table in cohorts
            )
            held = (found["slope_low"] <= truth) & (truth <= found["slope_high"])
            yield {
                "scans each": scans,
                "covariates": ", ".join(names) or "none",
                "bias (%)": 100 * (found["slope"].mean() / truth - 1),
                "SD (%)": 100 * found["slope"].std() / truth,
                "coverage (%)": 100 * held.mean(),
            }


def outliers(n_cohorts: int, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Compute how often an error of five standard deviations is found in a scan below 30 years, and false alarms."""
    for nucleus, (alpha, beta, gamma) in CURVES_TRUE.items():
        tables = []
        for _ in range(n_cohorts):
            code, age = np.repeat(np.arange(3), N_SITE_SCANS), rng.uniform(20, 85, 3 * N_SITE_SCANS)
            age[0] = rng.uniform(20, 30)
            chi = alpha * (1 - np.exp(-beta * age)) + gamma + rng.normal(0, 0.01, 3)[code]
            chi += rng.normal(0, NOISE_PPM, age.size) + 5 * NOISE_PPM * (np.arange(age.size) == 0)
            tables.append(pd.DataFrame({"abbreviation": nucleus, "site": code, "age": age, "mean_ppm": chi}))
        for age_column in (None, "age"):
            found = np.array([robust_z(table, age=age_column)["outlier"] for table in tables])
            yield {
                "nucleus": nucleus,
                "adjusted for age": "yes" if age_column else "no",
                "found (%)": 100 * found[:, 0].mean(),
                "false alarms (% of scans)": 100 * found[:, 1:].mean(),
            }


def effects(n_pairs: int, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Compute the mean of g and the coverage of its confidence interval."""
    for truth in (0.0, 0.8, 2.0):
        for n in (5, 20, 60):
            found = np.array([hedges_g(rng.normal(0, 1, n), rng.normal(truth, 1, n)) for _ in range(n_pairs)])
            held = (found[:, 1] <= truth) & (truth <= found[:, 2])
            yield {"true": truth, "n per group": n, "mean g": found[:, 0].mean(), "coverage (%)": 100 * held.mean()}


def false_positives(n_cohorts: int, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Compute the rate of false positives of the group tests for groups that are unbalanced over sites."""
    with_site = ComparisonOptions(reference="HC", covariates=("age", "sex", "site"), site="site")
    without = ComparisonOptions(reference="HC", covariates=("age", "sex"))
    for counts in (
        ((10, 10), (10, 10), (10, 10)),
        ((12, 8), (10, 10), (8, 12)),
        ((14, 6), (10, 10), (6, 14)),
        ((18, 2), (10, 10), (2, 18)),
        ((19, 1), (18, 2), (1, 19)),
    ):
        code = np.repeat(np.arange(3), [sum(pair) for pair in counts])
        group = np.concatenate([np.repeat(["HC", "PD"], pair) for pair in counts])
        rates = []
        for _ in range(n_cohorts):
            people = pd.DataFrame({"age": rng.uniform(40, 80, code.size), "sex": rng.choice(["F", "M"], code.size)})
            people = people.assign(site=np.array(list("ABC"))[code], group=group)
            noise = rng.normal(0, 0.008, (code.size, 16)) * rng.uniform(0.7, 1.5, (3, 16))[code]
            raw = pd.DataFrame(0.05 + 0.0005 * people[["age"]].to_numpy() + rng.normal(0, 0.012, (3, 16))[code] + noise)
            covariates = people[["age", "sex", "group"]]
            harmonized = harmonize(raw, site=people["site"], covariates=covariates)
            tables = [
                people.join(values).melt([*people], var_name="abbreviation", value_name="mean_ppm", ignore_index=False)
                for values in (raw, harmonized)
            ]
            first, second = (table.rename_axis("participant_id").reset_index() for table in tables)
            welch = ttest_ind(raw[group == "HC"], raw[group == "PD"], equal_var=False).pvalue
            adjusted = [
                ancova(table, options=options)["p"] for options in (without, with_site) for table in (first, second)
            ]
            rates.append([(p < 0.05).mean() for p in (welch, *adjusted)])
        names = ("Welch", "ANCOVA", "ANCOVA, harmonized", "ANCOVA with site", "ANCOVA with site, harmonized")
        yield {
            "HC:PD": ", ".join(f"{controls}:{patients}" for controls, patients in counts),
            **dict(zip(names, 100 * np.mean(rates, axis=0), strict=True)),
            "noted": "unbalanced" in check_sites(people, "PD", with_site)[0],
        }


def speed(n_scans: int, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Time each statistic on one table with two sessions per participant; peak memory is cumulative."""
    table = draw_table(n_scans, rng)
    wide = table.pivot(index=["participant_id", "session_id"], columns="abbreviation", values="mean_ppm")
    people = table.drop_duplicates(["participant_id", "session_id"]).set_index(["participant_id", "session_id"])
    people = people.loc[wide.index]
    options = ComparisonOptions(reference="HC")
    statistics: dict[str, Callable[[], object]] = {
        "fit_age_curves": lambda: fit_age_curves(table),
        "adjust_for_volume": lambda: adjust_for_volume(table, controls=(table["group"] == "HC").to_numpy()),
        "harmonize": lambda: harmonize(wide, site=people["site"], covariates=people[["age", "sex", "group"]]),
        "compare_groups": lambda: compare_groups(table, options=options),
        "ancova": lambda: ancova(table, options=options),
        "change_per_year": lambda: change_per_year(table),
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
