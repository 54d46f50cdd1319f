from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import f_oneway

from bids_dgmseg.errors import InputError
from bids_dgmseg.stats.combat import harmonize, sites_apart
from bids_dgmseg.stats.long_table import natural_spline

NUCLEI = ["DN_L", "GP_L", "PUT_L", "RN_L", "SN_L"]
RAW = [
    [0.133, 0.148, 0.064, 0.111, 0.136],
    [0.126, 0.139, 0.062, 0.101, 0.119],
    [0.135, 0.144, 0.057, 0.109, 0.131],
    [0.129, 0.150, 0.065, 0.107, 0.136],
    [0.132, 0.132, 0.057, 0.105, 0.118],
    [0.115, 0.157, 0.061, 0.141, 0.137],
    [0.111, 0.153, 0.056, 0.124, 0.136],
    [0.094, 0.146, 0.047, 0.108, 0.120],
    [0.095, 0.125, 0.034, 0.111, 0.128],
    [0.122, 0.120, 0.050, 0.116, 0.142],
    [0.109, 0.117, 0.052, 0.113, 0.124],
    [0.121, 0.137, 0.063, 0.141, 0.148],
    [0.128, 0.140, 0.061, 0.138, 0.141],
    [0.111, 0.102, 0.046, 0.093, 0.102],
    [0.118, 0.120, 0.059, 0.141, 0.127],
]
SITE = "AAAAABBBBCCCCCC"
AGE = [76.0, 57, 61, 73, 54, 66, 70, 33, 23, 38, 37, 72, 74, 20, 49]
SEX = "MFMFFMFFFMFMFFM"
NEUROCOMBAT = [
    [0.1235243014, 0.1466996429, 0.0622630284, 0.1259214610, 0.1418798395],
    [0.1167654712, 0.1383339651, 0.0611364924, 0.1174431188, 0.1245758298],
    [0.1263122872, 0.1436491629, 0.0550126718, 0.1249568853, 0.1372747008],
    [0.1195842704, 0.1496216378, 0.0636989501, 0.1229414739, 0.1437786743],
    [0.1236423237, 0.1303263845, 0.0555185432, 0.1223361572, 0.1236548021],
    [0.1265434157, 0.1441737740, 0.0635208892, 0.1324978431, 0.1344216238],
    [0.1228230845, 0.1418361830, 0.0601585945, 0.1175003758, 0.1325128679],
    [0.1071231505, 0.1302095332, 0.0499218188, 0.1004855369, 0.1163722506],
    [0.1074049152, 0.1138555324, 0.0395908432, 0.1018130446, 0.1217234344],
    [0.1208724737, 0.1290178697, 0.0487224228, 0.1089731616, 0.1377907582],
    [0.1088872947, 0.1260001736, 0.0507272046, 0.1051460082, 0.1213000178],
    [0.1210312333, 0.1459777307, 0.0617235716, 0.1332726369, 0.1451346813],
    [0.1269042453, 0.1490127633, 0.0597203634, 0.1296691870, 0.1382514979],
    [0.1101403502, 0.1109389637, 0.0447274162, 0.0864670198, 0.1013699712],
    [0.1176580643, 0.1289361086, 0.0577303310, 0.1315575768, 0.1256703603],
]
"""neuroCombat 0.2.12 (numpy 1.26) on RAW with SITE, AGE and SEX, convergence tolerance 1e-12 instead of 1e-4."""


@pytest.fixture
def raw() -> pd.DataFrame:
    return pd.DataFrame(RAW, columns=NUCLEI, index=[f"sub-{number:02d}" for number in range(15)])


@pytest.fixture
def site(raw: pd.DataFrame) -> Any:
    return pd.Series(list(SITE), index=raw.index)


@pytest.fixture
def covariates(raw: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame({"age": AGE, "sex": list(SEX)}, index=raw.index)


@pytest.fixture
def cohort() -> Any:
    """Three sites of 40 with different shifts, scales and ages; 16 nuclei that increase with age."""
    rng = np.random.default_rng(11)
    number = np.repeat([0, 1, 2], 40)
    age = rng.uniform(20, 75, 120) + 5 * number
    slope = rng.uniform(0.0004, 0.001, 16)
    shift, spread = rng.normal(0, 0.012, (3, 16)), rng.uniform(0.7, 1.5, (3, 16))
    noise = rng.normal(0, 0.008, (120, 16)) * spread[number]
    values = pd.DataFrame(0.05 + slope * age[:, None] + shift[number] + noise)
    return values, pd.Series(np.array(["A", "B", "C"])[number]), pd.DataFrame({"age": age}), slope


def test_combat_agrees_with_neurocombat(raw, site, covariates):
    before = raw.copy()
    harmonized = harmonize(raw, site=site, covariates=covariates)
    assert np.abs(harmonized.values.to_numpy() - NEUROCOMBAT).max() < 1e-9  # printed to 1e-10
    pd.testing.assert_frame_equal(raw, before)
    twice = harmonize(raw, site=site, covariates=covariates.assign(months=12 * covariates["age"]))  # duplicate
    assert np.abs(twice.values.to_numpy() - NEUROCOMBAT).max() < 1e-9


def test_combat_removes_sites_and_keeps_age(cohort):
    values, site, covariates, slope = cohort
    harmonized = harmonize(values, site=site, covariates=covariates)
    after = np.polyfit(covariates["age"], harmonized.values.to_numpy(), 1)[0]
    assert harmonized.variance["reduction"].min() > 0.9
    assert after.mean() == pytest.approx(slope.mean(), rel=0.1)
    assert harmonized.variance["p_site_before"].max() < 0.05
    assert harmonized.variance["p_site_after"].min() > 0.05


def test_omitted_covariates_lose_their_effect(cohort):
    """Older sites lose part of their iron."""
    values, site, covariates, slope = cohort
    harmonized = harmonize(values, site=site)
    assert np.polyfit(covariates["age"], harmonized.values.to_numpy(), 1)[0].mean() < 0.97 * slope.mean()


def test_repeated_scans_count_once(raw, site, covariates):
    """Two scans of five participants with the same means as one: estimates are unchanged."""
    changes = np.random.default_rng(2).normal(0, 0.002, (5, 5))
    again = pd.concat([raw, raw[:5] - changes]).set_axis(range(20))
    again.iloc[:5] += changes
    places = [*range(15), *range(5)]
    harmonized = harmonize(
        again,
        site=site.iloc[places].set_axis(range(20)),
        covariates=covariates.iloc[places].set_axis(range(20)),
        participant=pd.Series(raw.index[places]),
    )
    once = harmonize(raw, site=site, covariates=covariates)
    means = (harmonized.values[:5] + harmonized.values[15:].set_axis(range(5))) / 2
    assert means.to_numpy() == pytest.approx(once.values[:5].to_numpy())
    assert harmonized.values[5:15].to_numpy() == pytest.approx(once.values[5:].to_numpy())
    pd.testing.assert_frame_equal(harmonized.sites.drop(columns="n"), once.sites.drop(columns="n"))
    pd.testing.assert_frame_equal(harmonized.variance, once.variance)
    counts: Any = harmonized.sites.set_index(["site", "nucleus"]).loc[("A", "DN_L")]
    assert (counts["n"], counts["n_participants"]) == (10, 5)


def test_scans_of_few_participants_are_not_a_site(raw, site):
    people = pd.Series(raw.index, raw.index).where(site != "B", "sub-05")
    with pytest.raises(InputError, match="site B has 1 participants, harmonization needs 3"):
        harmonize(raw, site=site, participant=people)


@pytest.fixture
def separate_ages():
    """Two sites of different ages without a site effect; iron saturates with age."""
    rng = np.random.default_rng(4)
    site = pd.Series(["A"] * 90 + ["B"] * 30)
    age = np.where(site == "A", rng.uniform(18, 45, 120), rng.uniform(50, 85, 120))
    truth = 0.1 * (1 - np.exp(-rng.uniform(0.03, 0.06, 16) * age[:, None]))
    return pd.DataFrame(truth + rng.normal(0, 0.004, truth.shape)), site, pd.DataFrame({"age": age})


def test_spline_invents_no_site_difference(separate_ages):
    values, site, covariates = separate_ages
    gaps = []
    for smooth in ((), ("age",)):
        shift = harmonize(values, site=site, covariates=covariates, smooth=smooth).sites.pivot(
            index="nucleus", columns="site", values="shift_bayes"
        )
        gaps.append((shift["A"] - shift["B"]).mean())
    assert gaps[0] > 0.006
    assert abs(gaps[1]) < 0.002


def test_spline_spans_that_of_patsy(separate_ages):
    """Natural cubic splines with the same knots (mgcv's basis in patsy) fit the same values."""
    cr = pytest.importorskip("patsy").cr
    values, _, covariates = separate_ages
    age = covariates["age"].to_numpy()
    ours = np.column_stack([np.ones(120), natural_spline(age)])
    theirs = cr(age, knots=np.quantile(age, [1 / 3, 2 / 3]))
    fits = [basis @ np.linalg.lstsq(basis, values[0].to_numpy())[0] for basis in (ours, theirs)]
    assert fits[0] == pytest.approx(fits[1])


@pytest.mark.parametrize(
    ("ages", "apart"),
    [
        pytest.param({"A": (18, 45), "B": (50, 85)}, ["A", "B"], id="apart"),
        pytest.param({"A": (18, 45), "B": (50, 85), "C": (20, 80)}, [], id="bridged"),
        pytest.param({"A": (18, 30), "B": (70, 85), "C": (40, 55)}, ["A", "B", "C"], id="between"),
    ],
)
def test_sites_of_other_ages_are_found(ages, apart):
    age = np.concatenate([np.linspace(low, high, 20) for low, high in ages.values()])
    assert sites_apart(pd.Series(age), pd.Series(np.repeat(list(ages), 20))) == apart


def test_site_variance_by_hand(raw, site):
    """Without covariates it is the variance of the site means, weighted by scans, and p that of an anova."""
    row = harmonize(raw, site=site).variance.set_index("nucleus").loc["DN_L"]
    means, share = np.array([0.131, 0.10375, 709 / 6000]), np.array([5, 4, 6]) / 15
    assert row["site_variance_before"] == pytest.approx((share * (means - (share * means).sum()) ** 2).sum())
    groups = [raw.loc[site == name, "DN_L"] for name in "ABC"]
    assert row["p_site_before"] == pytest.approx(f_oneway(*groups).pvalue)


def test_missing_value_hardly_affects_other_scans(raw, site, covariates):
    holed = raw.copy()
    holed.loc["sub-11", "GP_L"] = np.nan
    harmonized = harmonize(holed, site=site, covariates=covariates)
    missing = harmonized.values.isna()
    assert missing.to_numpy().sum() == 1
    assert missing.loc["sub-11", "GP_L"]
    row: Any = harmonized.sites.set_index(["site", "nucleus"]).loc[("C", "GP_L")]
    assert (row["n"], row["n_unused"]) == (5, 1)
    assert np.nanmax(np.abs(harmonized.values.to_numpy() - NEUROCOMBAT)) < 0.01


def test_scan_without_covariate_is_excluded(raw, site, covariates):
    covariates.loc["sub-00", "sex"] = None
    covariates.loc["sub-14", "age"] = np.nan
    harmonized = harmonize(raw, site=site, covariates=covariates)
    kept = harmonized.values.notna().any(axis=1)
    assert kept[~kept].index.tolist() == ["sub-00", "sub-14"]
    alone = harmonize(raw[kept], site=site[kept], covariates=covariates[kept])
    pd.testing.assert_frame_equal(alone.values, harmonized.values[kept])


def test_nucleus_missing_at_one_site(raw, site):
    raw.loc[site == "B", "DN_L"] = np.nan
    harmonized = harmonize(raw, site=site)
    assert harmonized.values["DN_L"].isna().tolist() == (site == "B").tolist()
    row: Any = harmonized.sites.set_index(["site", "nucleus"]).loc[("B", "DN_L")]
    assert (row["n"], row["note"]) == (0, "not harmonized: a site needs 3 values")


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (lambda raw, site: raw["DN_L"].where(site == "A"), "no second site with enough values"),
        (lambda raw, site: 0 * raw["DN_L"] + 0.1, "values do not vary within sites"),
    ],
    ids=["one site", "constant"],
)
def test_nucleus_not_harmonized_has_a_note(raw, site, change, note):
    harmonized = harmonize(raw.assign(DN_L=change(raw, site)), site=site)
    assert harmonized.values["DN_L"].isna().all()
    notes = harmonized.sites.loc[harmonized.sites["nucleus"] == "DN_L", "note"]
    assert f"not harmonized: {note}" in notes.tolist()
    without = harmonize(raw.drop(columns="DN_L"), site=site)
    pd.testing.assert_frame_equal(harmonized.values.drop(columns="DN_L"), without.values)


def test_combat_does_not_depend_on_unit_or_order(raw, site, covariates):
    order = np.random.default_rng(0).permutation(15)
    mixed = harmonize(1000 * raw.iloc[order], site=site.iloc[order], covariates=covariates.iloc[order])
    straight = harmonize(raw, site=site, covariates=covariates)
    pd.testing.assert_frame_equal(mixed.values.sort_index(), 1000 * straight.values)


def test_small_sites_are_rejected(raw, site, covariates):
    covariates.loc[["sub-05", "sub-06"], "age"] = np.nan
    with pytest.raises(
        InputError, match=r"site B has 2 participants \(2 more lack a covariate\), harmonization needs 3"
    ):
        harmonize(raw, site=site, covariates=covariates)
    site.iloc[5:7] = "A"
    with pytest.raises(
        InputError, match=r"^participants.tsv: site B has 2 participants, harmonization needs 3; merge it"
    ):
        harmonize(raw, site=site)


def test_single_sites_and_nuclei_are_rejected(raw, site):
    with pytest.raises(InputError, match=r"scans of only one site \(A\); harmonization needs two"):
        harmonize(raw, site=site.where(site == "A", "A"))
    with pytest.raises(InputError, match=r"1 nuclei can be harmonized \(no more columns\), ComBat needs 2"):
        harmonize(raw[["DN_L"]], site=site)


def test_confounded_covariate_is_rejected(raw, site):
    covariates = pd.DataFrame({"sex": ["F", "M", "F"] * 5, "group": np.where(site == "A", "PD", "HC")})
    message = r"^participants.tsv: group is confounded with the sites .* \(covariates without group harmonizes"
    with pytest.raises(InputError, match=message):
        harmonize(raw, site=site, covariates=covariates)


def test_other_lengths_are_rejected(raw, site):
    with pytest.raises(ValueError, match="15 scans, 14 sites, 15 rows of covariates and 15 participants"):
        harmonize(raw, site=site.iloc[1:])
