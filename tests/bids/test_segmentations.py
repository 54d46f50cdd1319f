from pathlib import Path

import pytest

from bids_dgmseg.bids.segmentations import find_images, match_scans, name_scan, read_label_table
from bids_dgmseg.errors import InputError
from bids_dgmseg.models.structures import STRUCTURES


def paths(*names: str) -> list[Path]:
    return [Path(f"{name}_dseg.nii.gz") for name in names]


def matched(reference: list[str], other: list[str], *choose: str) -> dict[str, str]:
    """By stem, to be read easily."""
    found = match_scans(paths(*reference), paths(*other), choose=choose)
    return {a.name.removesuffix("_dseg.nii.gz"): b.name.removesuffix("_dseg.nii.gz") for a, b in found.items()}


def test_partners_share_all_entities_but_the_segmentation():
    reference = ["sub-01_ses-1_acq-x_seg-manual", "sub-01_ses-2_acq-x_seg-manual"]
    other = ["sub-01_ses-1_acq-x_seg-dgm16", "sub-01_ses-2_acq-y_seg-dgm16", "sub-02_ses-1_acq-x_seg-dgm16"]
    assert matched(reference, other) == {reference[0]: other[0]}


def test_run_1_and_run_01_are_one_run():
    assert matched(["sub-01_run-1"], ["sub-01_run-01", "sub-01_run-10"]) == {"sub-01_run-1": "sub-01_run-01"}


def test_desc_counts_where_both_have_it():
    names = ["sub-01_desc-medi", "sub-01_desc-rts"]
    assert matched(names, names[::-1]) == {name: name for name in names}


def test_desc_does_not_count_where_only_one_has_it():
    assert matched(["sub-01"], ["sub-01_seg-dgm16_desc-rts"]) == {"sub-01": "sub-01_seg-dgm16_desc-rts"}


def test_several_segmentations_of_a_scan_must_be_chosen_from():
    with pytest.raises(
        InputError,
        match=r"sub-01_seg-a_dseg.nii.gz, sub-01_seg-b_dseg.nii.gz are of the same scan; "
        r"say which with --choose, such as --choose seg-a",
    ):
        matched(["sub-01"], ["sub-01_seg-a", "sub-01_seg-b"])


def test_the_chosen_one_is_taken_and_the_other_left_alone():
    assert matched(["sub-01", "sub-01_desc-x"], ["sub-01_seg-a", "sub-01_seg-b"], "seg-b") == {"sub-01": "sub-01_seg-b"}


def test_a_scan_is_named_without_its_segmentation():
    assert name_scan(Path("sub-01_ses-1_run-02_seg-dgm16_dseg.nii.gz")) == "sub-01_ses-1_run-2"
    assert name_scan(Path("manual.nii.gz")) == "manual"


def test_images_are_looked_for_in_participants_folders_only(tmp_path):
    wanted = [tmp_path / "sub-01/anat/sub-01_dseg.nii", tmp_path / "sub-02/ses-1/anat/sub-02_ses-1_dseg.nii.gz"]
    others = ["dseg.nii.gz", "sub-01/anat/sub-01_probseg.nii.gz", "sub-01/anat/.sub-01_dseg.nii.gz", "sub-01.nii"]
    for path in [*wanted, *(tmp_path / name for name in others)]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert find_images(tmp_path, "dseg") == wanted


def test_no_images_are_an_error(tmp_path):
    with pytest.raises(InputError, match=r"no _dseg.nii\[.gz\] in sub-X folders; give the root folder"):
        find_images(tmp_path, "dseg")


def test_a_part_of_chi_is_no_map(tmp_path):
    (tmp_path / "sub-01").mkdir()
    for name in ("Chimap", "desc-paramagnetic_Chimap", "desc-diamagnetic_Chimap"):
        (tmp_path / f"sub-01/sub-01_{name}.nii").touch()
    assert [path.name for path in find_images(tmp_path, "Chimap")] == ["sub-01_Chimap.nii"]


def table(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_the_nearest_label_table_counts(tmp_path):
    image = tmp_path / "ds/sub-01/anat/sub-01_seg-x_dseg.nii.gz"
    for place, number in (("dseg.tsv", 1), ("seg-x_dseg.tsv", 2), ("sub-01/anat/sub-01_seg-x_dseg.tsv", 3)):
        table(tmp_path / "ds" / place, f"index\tname\tabbreviation\n{number}\tleft dentate\tDN_L\n")
        assert read_label_table(image).abbreviations == {number: "DN_L"}


def test_a_table_outside_the_dataset_does_not_count(tmp_path):
    table(tmp_path / "dseg.tsv", "index\tname\tabbreviation\n7\tx\tDN_L\n")
    table(tmp_path / "ds/dataset_description.json", "{}")
    found = read_label_table(tmp_path / "ds/sub-01/anat/sub-01_dseg.nii.gz")
    assert found.source is None
    assert found.abbreviations == {structure.index: structure.abbreviation for structure in STRUCTURES}


def test_a_table_without_abbreviations_goes_by_name(tmp_path):
    table(tmp_path / "x_dseg.tsv", "index\tname\n0\tbackground\n11\tleft caudate\n")
    assert read_label_table(tmp_path / "x_dseg.nii").abbreviations == {11: "left caudate"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("number\tlabel\n1\tx\n", "has no columns index and abbreviation; write a BIDS label table"),
        ("index\tabbreviation\none\tDN_L\n", "index 'one' with abbreviation 'DN_L'; give each label both"),
        ("index\tabbreviation\n1\tDN_L\n2\tDN_L\n", "2 or DN_L is there twice; give each label one row"),
    ],
)
def test_what_is_no_label_table_is_refused(tmp_path, text, message):
    table(tmp_path / "dseg.tsv", text)
    with pytest.raises(InputError, match=f"dseg.tsv: {message}"):
        read_label_table(tmp_path / "x_dseg.nii")
