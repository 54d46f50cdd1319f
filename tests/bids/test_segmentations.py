from pathlib import Path

import pytest

from bids_dgmseg.bids.segmentations import check_reference, find_images, match_scans, read_label_table
from bids_dgmseg.config import ReferenceRegion
from bids_dgmseg.errors import InputError
from bids_dgmseg.models.registry import MODELS
from bids_dgmseg.models.structures import ALL_STRUCTURES


def paths(*names: str) -> list[Path]:
    return [Path(f"{name}_dseg.nii.gz") for name in names]


def matched(reference: list[str], other: list[str], *choose: str) -> dict[str, str]:
    """Match images by stem."""
    found = match_scans(paths(*reference), paths(*other), choose=choose)
    return {a.name.removesuffix("_dseg.nii.gz"): b.name.removesuffix("_dseg.nii.gz") for a, b in found.items()}


NAMED = ["sub-01_ses-1_acq-x_seg-manual", "sub-01_ses-2_acq-x_seg-manual"]
PREDICTED = ["sub-01_ses-1_acq-x_seg-dgm16", "sub-01_ses-2_acq-y_seg-dgm16", "sub-02_ses-1_acq-x_seg-dgm16"]
DESC = ["sub-01_desc-medi", "sub-01_desc-rts"]


@pytest.mark.parametrize(
    ("reference", "other", "choose", "pairs"),
    [
        pytest.param(NAMED, PREDICTED, [], {NAMED[0]: PREDICTED[0]}, id="segmentation entities differ"),
        (["sub-01_run-1"], ["sub-01_run-01", "sub-01_run-10"], [], {"sub-01_run-1": "sub-01_run-01"}),
        pytest.param(DESC, DESC[::-1], [], {name: name for name in DESC}, id="desc must match if both have it"),
        (["sub-01"], ["sub-01_seg-dgm16_desc-rts"], [], {"sub-01": "sub-01_seg-dgm16_desc-rts"}),
        (["sub-01", "sub-01_desc-x"], ["sub-01_seg-a", "sub-01_seg-b"], ["seg-b"], {"sub-01": "sub-01_seg-b"}),
        (["sub-01"], ["sub-01_seg-a", "sub-01_desc-x"], ["desc-x"], {"sub-01": "sub-01_desc-x"}),
        (["sub-01_seg-a", "sub-01_desc-x"], ["sub-01_seg-b"], ["desc-x"], {"sub-01_desc-x": "sub-01_seg-b"}),
        (
            DESC,
            [f"{name}_seg-{name[-1]}" for name in DESC],
            ["seg-s"],
            {name: f"{name}_seg-{name[-1]}" for name in DESC},
        ),
    ],
)
def test_images_of_the_same_scan_match(reference, other, choose, pairs):
    assert matched(reference, other, *choose) == pairs


def test_ambiguous_segmentations_are_rejected():
    with pytest.raises(
        InputError,
        match=r"sub-01_seg-a_dseg.nii.gz, sub-01_seg-b_dseg.nii.gz are of the same scan; "
        r"select one with `choose`, such as `choose` seg-a",
    ):
        matched(["sub-01"], ["sub-01_seg-a", "sub-01_seg-b"])


def test_images_are_found_in_subject_folders(tmp_path):
    with pytest.raises(InputError, match=r"no _dseg.nii\[.gz\] files in sub-X folders; pass the root directory"):
        find_images(tmp_path, "dseg")
    wanted = [tmp_path / "sub-01/anat/sub-01_dseg.nii", tmp_path / "sub-02/ses-1/anat/sub-02_ses-1_dseg.nii.gz"]
    others = ["dseg.nii.gz", "sub-01/anat/sub-01_probseg.nii.gz", "sub-01/anat/.sub-01_dseg.nii.gz", "sub-01.nii"]
    for path in [*wanted, *(tmp_path / name for name in others)]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert find_images(tmp_path, "dseg") == wanted


def test_partial_chi_maps_are_ignored(tmp_path):
    (tmp_path / "sub-01").mkdir()
    for name in ("Chimap", "desc-paramagnetic_Chimap", "desc-diamagnetic_Chimap"):
        (tmp_path / f"sub-01/sub-01_{name}.nii").touch()
    assert [path.name for path in find_images(tmp_path, "Chimap")] == ["sub-01_Chimap.nii"]


def table(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_nearest_label_table_has_precedence(tmp_path):
    image = tmp_path / "ds/sub-01/anat/sub-01_seg-x_dseg.nii.gz"
    for name, number in (("dseg.tsv", 1), ("seg-x_dseg.tsv", 2), ("sub-01/anat/sub-01_seg-x_dseg.tsv", 3)):
        table(tmp_path / "ds" / name, f"index\tname\tabbreviation\n{number}\tleft dentate\tDN_L\n")
        assert read_label_table(image).abbreviations == {number: "DN_L"}


def test_label_table_outside_dataset_is_ignored(tmp_path):
    table(tmp_path / "dseg.tsv", "index\tname\tabbreviation\n7\tx\tDN_L\n")
    table(tmp_path / "ds/dataset_description.json", "{}")
    found = read_label_table(tmp_path / "ds/sub-01/anat/sub-01_dseg.nii.gz")
    assert found.source is None
    assert found.abbreviations == {structure.index: structure.abbreviation for structure in ALL_STRUCTURES}


def test_label_table_may_lack_abbreviations(tmp_path):
    table(tmp_path / "x_dseg.tsv", "index\tname\n0\tbackground\n11\tleft hippocampus\n")
    assert read_label_table(tmp_path / "x_dseg.nii").abbreviations == {11: "left hippocampus"}


@pytest.mark.parametrize("name", ["Left-Dentate-Nucleus", "left dentate nucleus", "dn_l", "Left-Cerebellum-Dentate"])
def test_names_of_other_programs_are_matched(tmp_path, name):
    table(tmp_path / "x_dseg.tsv", f"index\tname\n7\t{name}\n8\tred nucleus\n")
    assert read_label_table(tmp_path / "x_dseg.nii").abbreviations == {7: "DN_L", 8: "RN"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("number\tlabel\n1\tx\n", "columns index and abbreviation are missing; provide a BIDS label table"),
        (
            "index\tabbreviation\none\tDN_L\n",
            "index 'one' with abbreviation 'DN_L'; every row needs an integer",
        ),
        ("index\tabbreviation\n1\tDN_L\n2\tDN_L\n", "2 or DN_L is listed twice; keep one row per label"),
    ],
)
def test_invalid_label_table_is_rejected(tmp_path, text, message):
    table(tmp_path / "dseg.tsv", text)
    with pytest.raises(InputError, match=f"dseg.tsv: {message}"):
        read_label_table(tmp_path / "x_dseg.nii")


def test_nucleus_with_parts_can_be_the_reference():
    for name in ("GP", "SN_R", "GPe", "CN_L"):
        check_reference(ReferenceRegion(kind="structure", structure=name), MODELS["dgm24"])
    with pytest.raises(InputError, match="`reference_structure` GPe: not labelled by dgm16"):
        check_reference(ReferenceRegion(kind="structure", structure="GPe"), MODELS["dgm16"])
