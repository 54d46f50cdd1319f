from typing import Any

import numpy as np
import pandas as pd
import pytest

from bids_dgmseg.errors import InputError
from bids_dgmseg.stats.combat import fit_combat, sites_apart

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


def harmonize(values: pd.DataFrame, *, site: Any, covariates: Any = None, **options: Any) -> tuple[Any, Any]:
    """Return the harmonized values, and the table of the sites by site and nucleus."""
    covariates = pd.DataFrame(index=values.index) if covariates is None else covariates
    model = fit_combat(values, site=site, covariates=covariates, **options)
    harmonized = model.apply(values, site=site, covariates=covariates)
    return harmonized, model.describe_sites(harmonized, site).set_index(["site", "nucleus"])


def test_combat_agrees_with_neurocombat(raw, site, covariates):
    before = raw.copy()
    harmonized, _ = harmonize(raw, site=site, covariates=covariates)
    assert np.abs(harmonized.to_numpy() - NEUROCOMBAT).max() < 1e-9  # printed to 1e-10
    pd.testing.assert_frame_equal(raw, before)
    twice, _ = harmonize(raw, site=site, covariates=covariates.assign(months=12 * covariates["age"]))  # duplicate
    assert np.abs(twice.to_numpy() - NEUROCOMBAT).max() < 1e-9


def test_repeated_scans_count_once(raw, site, covariates):
    """Two scans of five participants with the same means as one: estimates are unchanged."""
    changes = np.random.default_rng(2).normal(0, 0.002, (5, 5))
    again = pd.concat([raw, raw[:5] - changes]).set_axis(range(20))
    again.iloc[:5] += changes
    places = [*range(15), *range(5)]
    harmonized, sites = harmonize(
        again,
        site=site.iloc[places].set_axis(range(20)),
        covariates=covariates.iloc[places].set_axis(range(20)),
        participant=pd.Series(raw.index[places]),
    )
    once, sites_once = harmonize(raw, site=site, covariates=covariates)
    means = (harmonized[:5] + harmonized[15:].set_axis(range(5))) / 2
    assert means.to_numpy() == pytest.approx(once[:5].to_numpy())
    assert harmonized[5:15].to_numpy() == pytest.approx(once[5:].to_numpy())
    pd.testing.assert_frame_equal(sites.drop(columns="n"), sites_once.drop(columns="n"))
    assert sites.loc[("A", "DN_L"), ["n", "n_participants"]].tolist() == [10, 5]


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


def test_missing_value_hardly_affects_other_scans(raw, site, covariates):
    holed = raw.copy()
    holed.loc["sub-11", "GP_L"] = np.nan
    harmonized, sites = harmonize(holed, site=site, covariates=covariates)
    missing = harmonized.isna()
    assert missing.to_numpy().sum() == 1
    assert missing.loc["sub-11", "GP_L"]
    assert sites.loc[("C", "GP_L"), ["n", "n_unused"]].tolist() == [5, 1]
    assert np.nanmax(np.abs(harmonized.to_numpy() - NEUROCOMBAT)) < 0.01


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (lambda raw, site: raw["DN_L"].where(site == "A"), "only one site has enough data"),
        (lambda raw, site: 0 * raw["DN_L"] + 0.1, "values do not vary beyond sites and covariates"),
    ],
    ids=["one site", "constant"],
)
def test_nucleus_not_harmonized_has_a_note(raw, site, change, note):
    harmonized, sites = harmonize(raw.assign(DN_L=change(raw, site)), site=site)
    assert harmonized["DN_L"].isna().all()
    assert set(sites.xs("DN_L", level="nucleus")["note"]) == {f"not harmonized: {note}"}
    without, _ = harmonize(raw.drop(columns="DN_L"), site=site)
    pd.testing.assert_frame_equal(harmonized.drop(columns="DN_L"), without)


def test_single_sites_and_nuclei_are_rejected(raw, site):
    with pytest.raises(InputError, match=r"only 0 nuclei can be harmonized \(only one site has enough data\)"):
        fit_combat(raw, site=site.where(site == "A", "A"))
    with pytest.raises(InputError, match=r"only 1 nuclei can be harmonized \(no more columns\), ComBat needs 2"):
        fit_combat(raw[["DN_L"]], site=site)


def test_confounded_covariate_is_rejected(raw, site):
    covariates = pd.DataFrame({"sex": ["F", "M", "F"] * 5, "group": np.where(site == "A", "PD", "HC")})
    message = r"^participants.tsv: group and site are confounded .* run with `covariates` without group"
    with pytest.raises(InputError, match=message):
        fit_combat(raw, site=site, covariates=covariates)


KNOWN = {
    0: [0.1241837951, 0.1340589393, 0.0682013136, 0.1826096500, 0.1526191916],
    7: [0.1172578623, 0.1427453157, 0.0556386010, 0.1118710794, 0.1283854340],
    20: [0.1060972845, 0.1514109002, 0.0546175158, 0.1211971019, 0.1242699147],
}
"""neuroHarmonize 2.5.2, harmonizationApply at sites A, B, C in turn; EB tolerance 1e-13 instead of 1e-4."""


def test_other_scans_of_the_sites_agree_with_neuroharmonize(raw, site, covariates):
    model = fit_combat(raw, site=site, covariates=covariates)
    values = pd.DataFrame(np.vstack([1.1 * np.array(RAW)[::-1] + 0.003, 0.9 * np.array(RAW) + 0.001]), columns=NUCLEI)
    ages = np.array(AGE)
    others = pd.DataFrame({"age": [*(ages[::-1] + 2), *(ages - 3)], "sex": [*SEX[::-1], *SEX]})
    result = model.apply(values, site=pd.Series(list("ABC") * 10), covariates=others)
    assert np.abs(result.loc[list(KNOWN)].to_numpy() - list(KNOWN.values())).max() < 1e-9
    new = pd.Series(list("ABD") * 10)
    at_others = model.apply(values, site=new, covariates=others)
    assert at_others.isna().all(axis=1).tolist() == (new == "D").tolist()
    notes = model.describe_sites(at_others, new).set_index("site")["note"]
    assert set(notes["D"]) == {"not harmonized: site not in the fit"}
    unknown = model.apply(values, site=pd.Series(list("ABC") * 10), covariates=others.assign(sex="O"))
    assert unknown.isna().all(axis=None)
