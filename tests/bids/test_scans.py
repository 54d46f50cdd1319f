from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from bids_dgmseg.bids.dataset import open_inputs
from bids_dgmseg.bids.scans import find_scans, find_skipped
from bids_dgmseg.config import Selection
from bids_dgmseg.errors import InputError


def inputs_of(root: Path, **selection):
    return open_inputs(root, Selection(**selection), output_dir=root / "derivatives" / "bids_dgmseg")


def scans_of(root: Path, **selection):
    return find_scans(inputs_of(root, **selection))


def skipped_of(root: Path, **selection) -> list[str]:
    inputs = inputs_of(root, **selection)
    return find_skipped(inputs, find_scans(inputs))


def names_of(root: Path, **selection) -> list[str]:
    return [scan.name for scan in scans_of(root, **selection)]


def chi(*entities: str, extension: str = ".nii.gz", folder: str = "anat") -> str:
    """Path of a chi map from its entities, such as ``sub-01``, ``ses-1``, ``run-2``."""
    folders = [part for part in entities if part.startswith(("sub-", "ses-"))]
    return "/".join([*folders, folder, "_".join(entities) + "_Chimap" + extension])


@pytest.mark.parametrize(
    ("files", "names"),
    [
        pytest.param(
            [
                chi("sub-02", extension=".nii"),
                chi("sub-01", "ses-2"),
                chi("sub-01", "ses-1", "run-2"),
                chi("sub-01", "ses-1", "run-1"),
            ],
            ["sub-01_ses-1_run-1", "sub-01_ses-1_run-2", "sub-01_ses-2", "sub-02"],
            id="in order",
        ),
        pytest.param(
            [
                ".bidsignore",
                "Sepia_Chimap.nii.gz",
                "sub-01/anat/._sub-01_Chimap.nii.gz",
                "sub-01/.git/sub-01_acq-h_Chimap.nii.gz",
                "sourcedata/sub-03/anat/sub-03_Chimap.nii.gz",
                "tmp/sub-04_Chimap.nii.gz",
                chi("sub-01"),
            ],
            ["sub-01"],
            id="hidden files and other folders",
        ),
        pytest.param(
            [chi("sub-01", extension=".nii"), "sub-01/anat/sub-01_Chimap-pos.nii", chi("sub-01", "desc-diamagnetic")],
            ["sub-01"],
            id="partial chi maps",
        ),
        (["sub-01/ses-2/Sepia_Chimap.nii.gz"], ["sub-01_ses-2"]),
        (["sub-01/Chimap.nii"], ["sub-01"]),
    ],
)
def test_maps_are_found_in_participant_folders(dataset, files, names):
    assert names_of(dataset("ds", *files)) == names


def test_scan_has_entities_and_uri(dataset):
    root = dataset("ds", chi("sub-01", "ses-1", "acq-x", "run-01"))
    (scan,) = scans_of(root)
    assert (scan.participant, scan.session, dict(scan.entities)) == ("01", "1", {"acq": "x", "run": "01"})
    assert scan.uri == "bids:raw:sub-01/ses-1/anat/sub-01_ses-1_acq-x_run-01_Chimap.nii.gz"
    assert scan.chi.is_absolute()
    assert scan.sidecar == {}


def test_participants_and_sessions_are_selected(dataset):
    root = dataset("ds", chi("sub-01", "ses-1"), chi("sub-01", "ses-2"), chi("sub-02", "ses-1"), chi("sub-03"))
    assert names_of(root, participants=("01", "03")) == ["sub-01_ses-1", "sub-01_ses-2", "sub-03"]
    assert names_of(root, sessions=("1",)) == ["sub-01_ses-1", "sub-02_ses-1"]


def test_derivatives_are_searched(dataset):
    root = dataset("ds", "sub-01/anat/sub-01_T1w.nii.gz", "sub-02/anat/sub-02_T1w.nii.gz")
    dataset("ds/derivatives/qsmxt", chi("sub-01"), kind="derivative")
    other = dataset("my maps", chi("sub-02"), kind="derivative")
    assert [scan.dataset_name for scan in scans_of(root)] == ["qsmxt"]
    assert [scan.uri for scan in scans_of(root, derivatives=(other,))] == [
        "bids:my-maps:sub-02/anat/sub-02_Chimap.nii.gz"
    ]
    assert names_of(root, derivatives=(root / "derivatives", other)) == ["sub-01", "sub-02"]


def test_own_output_is_not_an_input(dataset):
    root = dataset("ds", chi("sub-01"))
    output = dataset("ds/derivatives/old", chi("sub-01"), kind="derivative")
    (output / "dataset_description.json").write_text('{"GeneratedBy": [{"Name": "bids_dgmseg"}]}')
    assert names_of(root) == ["sub-01"]


def test_filter_file_of_babs_selects_its_session(dataset, filter_file):
    root = dataset("ds", chi("sub-01", "ses-01"), chi("sub-01", "ses-02"))
    filter_file.write_text(
        '{"fmap": {"datatype": "fmap"}, "t2w": {"datatype": "anat", "session": "02", "suffix": "T2w"},'
        ' "t1w": {"datatype": "anat", "session": "02", "suffix": "T1w"}}'
    )
    assert names_of(root, filter_file=filter_file) == ["sub-01_ses-02"]


def test_nearest_inherited_sidecar_has_precedence(dataset):
    root = dataset("ds", chi("sub-01", "ses-1", "acq-x"))
    (root / "Chimap.json").write_text('{"Units": "ppb", "MagneticFieldStrength": 3}')
    (root / "acq-y_Chimap.json").write_text('{"Units": "Hz"}')
    (root / "sub-01" / "sub-01_Chimap.json").write_text('{"Units": "ppm"}')
    (scan,) = scans_of(root)
    assert scan.sidecar == {"Units": "ppm", "MagneticFieldStrength": 3}


def test_sessions_without_map_are_reported(dataset):
    root = dataset(
        "ds",
        chi("sub-01", "ses-1"),
        "sub-01/ses-2/anat/sub-01_ses-2_echo-1_part-mag_MEGRE.nii.gz",
        "sub-01/ses-3/anat/sub-01_ses-3_T1w.nii.gz",
        chi("sub-02", "ses-2"),
        "sub-03/anat/sub-03_T1w.nii.gz",
    )
    reason = (
        "no _Chimap of total susceptibility in the space of the participant and no _MEGRE, _T2starw or _GRE with "
        "part-phase; skipped"
    )
    assert skipped_of(root) == [f"sub-01_ses-2: {reason}", f"sub-03: {reason}"]
    selected = skipped_of(root, sessions=("1", "3"))
    assert selected == [f"{name}: {reason}" for name in ("sub-01_ses-3", "sub-02", "sub-03")]


def test_invalid_participant_folders_are_reported(dataset):
    root = dataset("ds", chi("sub-01"), "sub-1_0/anat/sub-1_0_Chimap.nii.gz", "sub-/anat/sub-_Chimap.nii.gz")
    assert skipped_of(root) == ["sub-, sub-1_0: not a valid BIDS name; skipped, rename the folder"]
    assert skipped_of(root, participants=("01",)) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"participants": ("99",)}, r"^ds: no sub-99; check `participant_label` \(existing: sub-01, sub-02\)$"),
        ({"sessions": ("9",)}, r"^ds: no ses-9; check `session_label` \(existing: ses-1\)$"),
        ({"participants": ("02",)}, r"^ds: sub-02: no _Chimap .*; check the selection"),
        ({"derivatives": (Path("/nowhere"),)}, r"^/nowhere: no such folder; check `derivatives`$"),
        ({"filter_file": Path("/nowhere/f.json")}, r"^/nowhere/f.json: no such file"),
    ],
)
def test_wrong_selection_is_rejected(dataset, options, message):
    root = dataset("ds", chi("sub-01", "ses-1"), "sub-02/anat/sub-02_T1w.nii.gz")
    with pytest.raises(InputError, match=message):
        scans_of(root, **options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"t1w": {}}', r'^filter.json: no "chimap" or "megre" block'),
        ('{"chimap": {"acqisition": "x"}}', r"^filter.json: unknown entity acqisition"),
    ],
)
def test_wrong_filter_file_is_rejected(dataset, text, message, filter_file):
    filter_file.write_text(text)
    with pytest.raises(InputError, match=message):
        scans_of(dataset("ds", chi("sub-01")), filter_file=filter_file)


def test_other_folders_are_rejected(dataset, tmp_path):
    with pytest.raises(InputError, match=r"^ds: no _Chimap .* and no _MEGRE, .* pass .* `derivatives`$"):
        scans_of(dataset("ds"))
    with pytest.raises(InputError, match=r": dataset_description.json not found; pass the root directory"):
        scans_of(tmp_path)
    with pytest.raises(InputError, match=r"gone: no such folder; pass the root directory of the BIDS dataset$"):
        scans_of(tmp_path / "gone")


def test_broken_sidecar_affects_only_its_scan(dataset):
    root = dataset("ds", chi("sub-01"), chi("sub-02"))
    (root / "sub-01" / "anat" / "sub-01_Chimap.json").write_text('{\n "Units": ppm\n}')
    problem = "sub-01_Chimap.json: invalid JSON (line 2, column 11); fix the file"
    assert [(scan.name, scan.problem) for scan in scans_of(root)] == [("sub-01", problem), ("sub-02", None)]
    (root / "Chimap.json").write_text('{\n "Units": ppm\n}')  # it applies to all scans
    with pytest.raises(InputError, match=r"^Chimap.json: invalid JSON \(line 2, column 11\); fix the file$"):
        scans_of(root)


def test_same_scan_in_two_datasets_is_rejected(dataset):
    root = dataset("ds", chi("sub-01", "run-1"))
    derivative = dataset("qsmxt", chi("sub-01", "run-01", extension=".nii"), kind="derivative")
    both = r"^ds/sub-01/anat/sub-01_run-1_Chimap.nii.gz and qsmxt/sub-01/anat/sub-01_run-01_Chimap.nii are maps"
    with pytest.raises(InputError, match=both + r".*`derivatives` or `filter_file`"):
        scans_of(root, derivatives=(derivative,))


def test_misplaced_file_is_rejected(dataset):
    root = dataset("ds", "sub-01/anat/sub-02_Chimap.nii.gz")
    with pytest.raises(InputError, match=r"^sub-02_Chimap.nii.gz: located in the folder of sub-01; rename"):
        find_scans(inputs_of(root))


def test_misplaced_files_can_be_skipped(dataset):
    root = dataset("ds", "sub-01/anat/sub-02_Chimap.nii.gz", chi("sub-01"), "sub-01/ses-1/anat/sub-01_ses-2_Chimap.nii")
    lines: list[str] = []
    (scan,) = find_scans(inputs_of(root), misplaced=lines)
    assert scan.name == "sub-01"
    assert lines == [
        "sub-02_Chimap.nii.gz: located in the folder of sub-01; rename or move the file",
        "sub-01_ses-2_Chimap.nii: located in the folder of ses-1; rename or move the file",
    ]


@pytest.fixture
def qsmxt(dataset) -> Path:
    """A tree as QSMxT 9.22 writes it with all its options: two runs, the second without combined maps."""
    root: Path = dataset("ds", "sub-01/anat/sub-01_T1w.nii.gz")
    names = "singlepass cosmos mms msa total paramagnetic diamagnetic".split()
    descs = ["", *(f"_desc-{name}" for name in names)]
    maps = [f"sub-01_run-1{desc}_Chimap.nii" for desc in descs]
    maps += ["sub-01_run-2_Chimap.nii", "sub-01_run-2_desc-singlepass_Chimap.nii"]
    others = ["sub-01_run-1_desc-sti11_Chitensor.nii", "sub-01_run-1_desc-reliable_mask.nii", "sub-01_run-1_swi.nii"]
    files = [f"sub-01/anat/{name}" for name in (*maps, *others)]
    intermediate = "workflow/sub-01/run-1/invert/sub-01_run-1_Chimap-raw.nii"
    dataset("ds/derivatives/qsmxt", *files, intermediate, kind="derivative")
    return root


def test_one_of_the_maps_of_qsmxt_is_used(qsmxt):
    assert names_of(qsmxt) == ["sub-01_run-1", "sub-01_run-2"]
    assert skipped_of(qsmxt) == [
        "sub-01_run-1_Chimap.nii, sub-01_run-2_Chimap.nii: used instead of other maps of the same acquisition "
        "(sub-01_run-1_desc-cosmos_Chimap.nii, sub-01_run-1_desc-mms_Chimap.nii, "
        "sub-01_run-1_desc-singlepass_Chimap.nii, sub-01_run-1_desc-total_Chimap.nii, "
        "sub-01_run-2_desc-singlepass_Chimap.nii); select others with `chi` or `filter_file`"
    ]


def test_maps_of_qsmxt_have_an_order(qsmxt):
    order = ["", "_desc-cosmos", "_desc-mms", "_desc-singlepass", "_desc-total"]
    for desc, following in pairwise(order):
        (qsmxt / f"derivatives/qsmxt/sub-01/anat/sub-01_run-1{desc}_Chimap.nii").unlink()
        assert names_of(qsmxt) == [f"sub-01_run-1{following}", "sub-01_run-2"]


def test_entities_select_another_map_of_qsmxt(qsmxt, filter_file):
    assert names_of(qsmxt, chi=("desc-cosmos",)) == ["sub-01_run-1_desc-cosmos"]
    assert names_of(qsmxt, chi=("desc-singlepass", "run-2")) == ["sub-01_run-2_desc-singlepass"]
    both = names_of(qsmxt, chi=("desc-singlepass", "desc-cosmos", "run-1"))
    assert both == ["sub-01_run-1_desc-cosmos", "sub-01_run-1_desc-singlepass"]
    filter_file.write_text('{"chimap": {"desc": ["mms", "msa"]}}')
    assert names_of(qsmxt, filter_file=filter_file) == ["sub-01_run-1_desc-mms", "sub-01_run-1_desc-msa"]
    filter_file.write_text('{"chimap": {"run": 1}}')
    assert names_of(qsmxt, filter_file=filter_file, chi=("desc-total",)) == ["sub-01_run-1_desc-total"]
    with pytest.raises(InputError, match=r"^`chi`: unknown entity nonsense; use the names of pybids"):
        names_of(qsmxt, chi=("nonsense-x",))


def test_maps_in_standard_space_alone_are_reported(dataset):
    root = dataset("ds", chi("sub-01", "space-MNI152NLin6Asym"), chi("sub-02"))
    (line,) = skipped_of(root)
    assert line.startswith("sub-01: no _Chimap of total susceptibility in the space of the participant")
    assert names_of(root, chi=("space-MNI152NLin6Asym",)) == ["sub-01_space-MNI152NLin6Asym"]
    with pytest.raises(InputError, match=r"^ds: sub-01: no _Chimap of total susceptibility "):
        scans_of(root, participants=("01",))


def test_folders_of_versions_are_searched(dataset):
    version = "9.22.0"
    root = dataset("ds", "sub-01/anat/sub-01_T1w.nii.gz")
    dataset(f"ds/derivatives/qsmxt/{version}", chi("sub-01"), kind="derivative")
    (root / f"derivatives/qsmxt/{version}/dataset_description.json").unlink()
    (scan,) = scans_of(root)
    assert scan.uri == f"bids:qsmxt-{version.replace('.', '-')}:{chi('sub-01')}"
    assert names_of(root, derivatives=(root / "derivatives",)) == ["sub-01"]


@pytest.mark.parametrize("raw", ["sourcedata/site-a", "rawdata"])
def test_study_is_searched(dataset, raw):
    study = dataset("study", kind="study")
    dataset(f"study/{raw}", chi("sub-01"), "sub-03/anat/sub-03_T1w.nii.gz")
    dataset(f"study/{raw}/derivatives/inner", chi("sub-04"), kind="derivative")
    dataset("study/derivatives/qsmxt", chi("sub-02"), kind="derivative")
    assert [scan.uri for scan in scans_of(study)] == [
        f"bids:raw:{chi('sub-01')}",
        f"bids:qsmxt:{chi('sub-02')}",
        f"bids:inner:{chi('sub-04')}",
    ]
    assert names_of(study, participants=("01",)) == ["sub-01"]


def test_sites_of_a_study_with_equal_labels_are_told_apart(dataset, filter_file):
    study = dataset("study", kind="study")
    for site in ("siteA", "siteB"):
        dataset(f"study/sourcedata/{site}", chi("sub-01"))
    with pytest.raises(InputError, match=r"select one .* or `filter_file` \({\"chimap\": {\"scope\": \"siteA\"}}\)$"):
        scans_of(study)
    filter_file.write_text('{"chimap": {"scope": "siteB"}}')
    (scan,) = scans_of(study, filter_file=filter_file)
    assert scan.dataset_root.name == "siteB"
