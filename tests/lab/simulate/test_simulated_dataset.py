import csv

import nibabel as nib
import numpy as np
import pytest

from bids_dgmseg.cli.main import main
from bids_dgmseg.errors import InputError
from bids_dgmseg.io.nifti import load_image
from bids_dgmseg.lab.simulate import simulated_dataset
from bids_dgmseg.lab.simulate.ranges import NO_PATHOLOGY, ArtefactRanges
from bids_dgmseg.lab.simulate.sample import View, draw_sample
from bids_dgmseg.lab.simulate.simulated_dataset import cerebellum_mask, simulate_dataset, whole_head_view
from bids_dgmseg.lab.simulate.template import read_template
from tests.test_promise import VALIDATOR, validate


@pytest.fixture(scope="module")
def simulated(tmp_path_factory, template):
    root = tmp_path_factory.mktemp("simulated") / "ds"
    names = list(simulate_dataset(root, n_scans=2, seed=5, template=template, spacing_mm=4))
    assert names == ["sub-01", "sub-02"]
    return root


def test_same_seed_gives_same_files(simulated, template, tmp_path):
    list(simulate_dataset(tmp_path / "again", n_scans=2, seed=5, template=template, spacing_mm=4))
    paths = [path.relative_to(simulated) for path in simulated.rglob("*") if path.is_file()]
    again = (path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*") if path.is_file())
    assert set(paths) == set(again)
    for path in paths:
        assert (simulated / path).read_bytes() == (tmp_path / "again" / path).read_bytes()


def test_cerebellum_mask_contains_dentates(simulated):
    for path in sorted((simulated / "derivatives" / "truth").rglob("*_label-cerebellum_mask.nii.gz")):
        mask = np.asarray(load_image(path).dataobj)
        beside = path.with_name(path.name.replace("label-cerebellum_mask", "seg-truth_dseg"))
        dseg = np.asarray(load_image(beside).dataobj)
        assert set(np.unique(mask)) == {0, 1}
        assert mask[(dseg > 0) & (dseg <= 4)].all()  # dentate and interposed nuclei
        assert not mask[dseg > 4].any()
        volume_ml = mask.sum() * 4**3 / 1000
        assert 60 < volume_ml < 250


def test_cerebellum_mask_excludes_fourth_ventricle():
    labels = np.array([0, 1, 4, 5, 25, 28, 29, 30, 34, 35], np.uint8)
    assert cerebellum_mask(labels).tolist() == [0, 1, 1, 0, 0, 0, 1, 1, 1, 0]


def test_different_seeds_share_no_map(simulated, template, tmp_path):
    list(simulate_dataset(tmp_path / "other", n_scans=1, seed=6, template=template, spacing_mm=4))
    (other,) = (tmp_path / "other" / "sub-01").rglob("*_Chimap.nii.gz")
    for path in simulated.glob("sub-*/anat/*_Chimap.nii.gz"):
        assert not np.array_equal(load_image(path).dataobj, load_image(other).dataobj)


def test_typical_scans_are_of_healthy_subjects_at_3_tesla(monkeypatch, template, tmp_path):
    views: list[View] = []

    def draw_and_record(heads, view, seed):
        views.append(view)
        return draw_sample(heads, view, seed)

    monkeypatch.setattr(simulated_dataset, "draw_sample", draw_and_record)
    options = ["--scans", "1", "--seed", "5", "--labels", str(template), "--spacing-mm", "4"]
    assert main(["simulate", str(tmp_path / "typical"), *options, "--typical"]) == 0
    assert main(["simulate", str(tmp_path / "all"), *options]) == 0
    readmes = [(tmp_path / name / "README").read_text() for name in ("typical", "all")]
    assert ["healthy subjects" in text for text in readmes] == [True, False]
    typical, usual = views
    assert typical.artefacts.reconstruction.b0_tesla == (3.0,)
    assert typical.values.pathology == NO_PATHOLOGY
    assert (typical.artefacts.thick, usual.artefacts.thick) == (0.0, ArtefactRanges().thick)
    low, high = usual.values.age_years
    assert typical.values.age_years == pytest.approx((low + (high - low) / 4, high - (high - low) / 4))


@pytest.mark.skipif(VALIDATOR is None, reason="bids-validator-deno is not installed")
def test_dataset_is_valid_bids(simulated, tmp_path):
    validate(simulated, tmp_path)


def test_participants_table(simulated):
    with (simulated / "participants.tsv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert [row["participant_id"] for row in rows] == ["sub-01", "sub-02"]
    for row in rows:
        (path,) = (simulated / "derivatives" / "truth" / row["participant_id"]).rglob("*_dseg.nii.gz")
        values = np.unique(load_image(path).dataobj)
        assert int(row["n_nuclei"]) == len(values) - 1
        assert set(values) <= set(range(17))


def test_field_of_view_is_independent_of_voxel_size():
    for spacing_mm in (0.8, 1.0, 2.0):
        view = whole_head_view(spacing_mm)
        assert np.multiply(view.shape, spacing_mm) == pytest.approx([176, 208, 176], abs=spacing_mm / 2)


def _exchange(array, first, other):
    return np.where(array == first, other, np.where(array == other, first, array))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda array: np.where(array == 22, 60, array), "60 is not a label of a template"),
        (lambda array: np.where(array == 11, 22, array), r"label 11 \(left caudate nucleus\) not found"),
        (lambda array: np.where(array == 23, 22, array), r"label 23 \(lateral ventricle\) not found"),
        (lambda array: _exchange(array, 13, 15), r"label 13 \(left putamen\) lies where 15 \(left globus pallidus\)"),
        (lambda array: array[::-1], r"label 1 \(left dentate nucleus\) lies where 2 \(right dentate nucleus\)"),
    ],
)
def test_template_with_other_labels_is_rejected(template, tmp_path, change, message):
    image, path = load_image(template), tmp_path / "labels.nii.gz"
    nib.Nifti1Image(change(np.asarray(image.dataobj)).astype(np.uint8), image.affine).to_filename(path)
    with pytest.raises(InputError, match=f"labels.nii.gz: {message}"):
        read_template(path)
