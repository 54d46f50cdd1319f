"""Voxelwise tests in standard space: false positives and planted effects of simulated studies, and their files."""

import json
import shutil
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from statsmodels.regression.linear_model import OLS

from bids_dgmseg.config import GroupAnalysis
from bids_dgmseg.errors import InputError
from bids_dgmseg.normalization.standard_space import nucleus_shape, standard_grid
from bids_dgmseg.report.voxelwise_figures import voxelwise_figures
from bids_dgmseg.study.analyses import with_variables
from bids_dgmseg.study.cohort import load_cohort
from bids_dgmseg.study.results_folders import ResultsFolder
from bids_dgmseg.study.study import build_study
from bids_dgmseg.study.voxelwise import analyse_voxels, infer_voxels, write_voxel_maps
from tests.study.conftest import people


def simulate(rng, *, effect=0.0):
    """Eight controls and eight patients, 27 voxels, an effect of age and one of the group in eight voxels."""
    group, age = np.repeat([0.0, 1.0], 8), rng.uniform(-10, 10, 16)
    values = rng.normal(0.1, 0.01, (16, 27)) + 0.001 * age[:, None]
    values[:, :8] += effect * group[:, None]
    return values, pd.DataFrame({"intercept": 1.0, "group PD": group, "age": age})


@pytest.fixture
def mask():
    return nib.Nifti1Image(np.pad(np.ones((3, 3, 3), np.uint8), 4), np.diag([2.0, 2.0, 2.0, 1.0]))


def test_statistics_are_those_of_regression(mask):
    values, design = simulate(np.random.default_rng(1), effect=0.02)
    images = infer_voxels(values, design, "group PD", mask, n_permutations=19)
    fit = OLS(values[:, 3], design).fit()
    at = tuple(np.argwhere(mask.get_fdata() > 0)[3])
    assert images["effect"].get_fdata()[at] == pytest.approx(fit.params["group PD"])
    assert images["t"].get_fdata()[at] == pytest.approx(fit.tvalues["group PD"])
    assert images["logp"].shape == mask.shape
    assert images["logp"].get_fdata()[at] == pytest.approx(np.log10(20))  # the smallest p of 19 permutations
    assert not images["t"].get_fdata()[mask.get_fdata() == 0].any()


@pytest.mark.parametrize(("correction", "n_permutations", "n_null"), [("cluster", 39, 20), ("tfce", 19, 6)])
def test_false_positives_are_rare_and_effects_found(mask, correction, n_permutations, n_null):
    """Of 20 null studies at p = 0.05, 4 or fewer with 99.7 % probability; benchmarks/voxelwise.py has the rate."""
    rng = np.random.default_rng(2)
    found: list[bool] = []
    for effect in [0.0] * n_null + [0.03] * 2:
        values, design = simulate(rng, effect=effect)
        options: Any = {"n_permutations": n_permutations, "correction": correction, "rng_seed": len(found)}
        images = infer_voxels(values, design, "group PD", mask, **options)
        found.append(bool((images["logp"].get_fdata() > 1.3).any()))
    assert sum(found[:n_null]) <= n_null / 5
    assert all(found[n_null:])


@pytest.fixture
def folder(write_study):
    """Sixteen people with maps in MNI space at 2 mm; patients have 0.03 ppm more in the left dentate."""
    folder = write_study("study", people(("A", 8, "HC"), ("A", 8, "PD")), nuclei=("DN_L", "DN_R", "NAC_L"))
    rng, grid = np.random.default_rng(3), standard_grid(2)
    inside = {name: nucleus_shape(name, grid) >= 0.5 for name in ("DN_L", "DN_R")}
    for number in range(16):
        chi = np.zeros(grid.shape, np.float32)
        for name, shape in inside.items():
            chi[shape] = rng.normal(0.1, 0.01, shape.sum()) + 0.03 * (number >= 8 and name == "DN_L")
        stem = f"sub-{number:02d}_ses-0_space-MNI152NLin2009cAsym_res-2_desc-dgm16_Chimap.nii.gz"
        nib.save(nib.Nifti1Image(chi, grid.affine), folder / f"sub-{number:02d}" / "ses-0" / "anat" / stem)
    return folder


def analyse(folder, **options):
    cohort = load_cohort([ResultsFolder(folder, "out", folder)])
    study = build_study(cohort, GroupAnalysis(measures=("mean_ppm",), voxelwise=True, permutations=39, **options))
    return analyse_voxels(with_variables(study), [folder])


def test_planted_effect_is_found_in_its_nucleus(folder):
    (folder / "sub-15" / "ses-0" / "anat").joinpath(
        "sub-15_ses-0_space-MNI152NLin2009cAsym_res-2_desc-dgm16_Chimap.nii.gz"
    ).unlink()
    damaged = next(folder.glob("sub-00/ses-0/anat/*_space-*_Chimap.nii.gz"))
    damaged.write_bytes(damaged.read_bytes()[:2000])
    analysis, maps = analyse(folder, voxelwise_correction="cluster")
    rows = analysis.tables[0].rows.set_index("abbreviation")
    assert set(rows["contrast"]) == {"PD vs HC"}
    assert rows["n"].tolist() == [14, 14, 14]
    assert rows.loc["NAC_L", "n_voxels"] == 0  # has no shape in MNI space
    assert rows.loc["DN_L", "mean_effect"] == pytest.approx(0.03, abs=0.004)
    assert rows.loc["DN_L", "p_min"] == pytest.approx(0.05)  # 2 of 40
    assert rows.loc["DN_L", "peak_x_mm"] < 0
    assert rows.loc["DN_R", "p_min"] > 0.05
    assert analysis.warnings[1].startswith(f"group_voxelwise.tsv: a map is left out: {damaged.name}: ")
    assert analysis.warnings[:1] == (
        "group_voxelwise.tsv: 1 scan has no map in MNI152NLin2009cAsym:res-2 and is left out: sub-15_ses-0; run the "
        "participant level with `output_space`",
    )
    paths = write_voxel_maps(folder, maps)
    stem = "seg-dgm16_space-MNI152NLin2009cAsym_res-2_contrast-PDvsHC_stat-t_statmap"
    assert folder / "voxelwise" / f"{stem}.nii.gz" in paths
    sidecar = json.loads((folder / "voxelwise" / f"{stem}.json").read_text())
    assert sidecar["Design"] == ["intercept", "group PD", "age", "sex"]
    assert (sidecar["Participants"], sidecar["Correction"]) == (14, "cluster")

    table = SimpleNamespace(dictionary=json.loads(json.dumps(analysis.tables[0].facts)))
    data: Any = SimpleNamespace(tables={"group_voxelwise": table}, models=["dgm16"])
    (figure,) = voxelwise_figures(data, folder)
    assert (folder / figure.plot.href).is_file()
    assert "voxel" in figure.alt
    write_voxel_maps(folder, [], is_wanted=False)
    assert not list((folder / "voxelwise").glob("*"))


def test_people_and_covariates_are_those_of_the_tables(folder):
    """The group is among the covariates; a participant of two groups is in neither."""
    table = pd.read_csv(folder / "participants.tsv", sep="\t", dtype=str).assign(updrs=[str(n % 5) for n in range(16)])
    table.to_csv(folder / "participants.tsv", sep="\t", index=False)
    options: Any = {"correlate": ("updrs",), "voxelwise_correction": "cluster"}
    analysis, _ = analyse(folder, covariates=("age", "group"), **options)
    designs = {one["Contrast"]: one["Design"] for one in analysis.tables[0].facts["Contrasts"]}
    assert designs["PD vs HC"] == ["intercept", "group PD", "age"]
    assert designs["updrs"] == ["intercept", "variable updrs", "age", "group"]

    own = folder / "sub-00"
    shutil.copytree(own / "ses-0", own / "ses-1")
    for path in (own / "ses-1" / "anat").iterdir():
        path.rename(path.with_name(path.name.replace("ses-0", "ses-1")))
    (own / "sub-00_sessions.tsv").write_text("session_id\tgroup\tage\nses-0\tHC\t50\nses-1\tPD\t54\n")
    analysis, _ = analyse(folder, voxelwise_correction="cluster")
    assert set(analysis.tables[0].rows["n"]) == {15}
    assert analysis.warnings == (
        "group_voxelwise.tsv: group of sub-00 differs between sessions; 1 of 16 participants is left out of "
        "comparisons of groups",
    )


def test_scans_without_the_variable_do_not_count(folder):
    """Of two sessions, one without a score, only the map of the other is in the test of the score."""
    table = pd.read_csv(folder / "participants.tsv", sep="\t", dtype=str).assign(updrs=[str(n % 5) for n in range(16)])
    table.to_csv(folder / "participants.tsv", sep="\t", index=False)
    options: Any = {"correlate": ("updrs",), "voxelwise_correction": "cluster"}
    expected = analyse(folder, **options)[0].tables[0].rows.query("contrast == 'updrs'")

    own = folder / "sub-01"
    shutil.copytree(own / "ses-0", own / "ses-1")
    for path in (own / "ses-1" / "anat").iterdir():
        path = path.rename(path.with_name(path.name.replace("ses-0", "ses-1")))
        if path.name.endswith("_Chimap.nii.gz"):
            image = nib.Nifti1Image.from_filename(path)
            nib.save(nib.Nifti1Image(image.get_fdata(dtype=np.float32) * 3, image.affine), path)
    table.assign(updrs=table["updrs"].mask(table["participant_id"] == "sub-01")).to_csv(
        folder / "participants.tsv", sep="\t", index=False, na_rep="n/a"
    )
    (own / "sub-01_sessions.tsv").write_text("session_id\tupdrs\nses-0\t1\nses-1\tn/a\n")
    analysis, _ = analyse(folder, **options)
    found = analysis.tables[0].rows.query("contrast == 'updrs'")
    assert set(found["n"]) == {16}
    assert found["mean_effect"].to_list() == pytest.approx(expected["mean_effect"].to_list(), nan_ok=True)


def test_studies_without_maps_in_standard_space_are_one_line(write_study):
    folder = write_study("study", people(("A", 8, "HC"), ("A", 8, "PD")), nuclei=("DN_L", "DN_R"))
    with pytest.raises(InputError, match=r"^`voxelwise`: no scan has a map in MNI152NLin2009cAsym \(such as …_space-"):
        analyse(folder)
