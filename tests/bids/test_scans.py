from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bids_dgmseg.bids.scans import find_scans
from bids_dgmseg.bids.skipped import find_left_out
from bids_dgmseg.config import Settings
from bids_dgmseg.errors import InputError

TREE = Path(__file__).parents[3] / "shared" / "tools" / "bids_tree"


def scans_of(root: Path, **options):
    return find_scans(Settings(bids_dir=root, output_dir=root / "derivatives" / "bids_dgmseg", **options))


def names_of(root: Path, **options) -> list[str]:
    return [scan.name for scan in scans_of(root, **options)]


def chi(*entities: str, extension: str = ".nii.gz", folder: str = "anat") -> str:
    """Path of a chi map from its entities, such as ``sub-01``, ``ses-1``, ``run-2``."""
    folders = [part for part in entities if part.startswith(("sub-", "ses-"))]
    return "/".join([*folders, folder, "_".join(entities) + "_Chimap" + extension])


def test_sessions_runs_and_both_extensions_are_found_in_order(dataset):
    root = dataset(
        "ds",
        chi("sub-02", extension=".nii"),
        chi("sub-01", "ses-2"),
        chi("sub-01", "ses-1", "run-2"),
        chi("sub-01", "ses-1", "run-1"),
    )
    assert names_of(root) == ["sub-01_ses-1_run-1", "sub-01_ses-1_run-2", "sub-01_ses-2", "sub-02"]


def test_a_scan_knows_its_parts(dataset):
    root = dataset("ds", chi("sub-01", "ses-1", "acq-x", "run-01"))
    (scan,) = scans_of(root)
    assert (scan.participant, scan.session, dict(scan.entities)) == ("01", "1", {"acq": "x", "run": "01"})
    assert scan.uri == "bids:raw:sub-01/ses-1/anat/sub-01_ses-1_acq-x_run-01_Chimap.nii.gz"
    assert scan.chi.is_absolute()
    assert scan.sidecar == {}
    assert scan.sidecar_path is None


def test_hidden_files_sourcedata_and_other_folders_do_not_count(dataset):
    root = dataset(
        "ds",
        chi("sub-01"),
        ".bidsignore",
        "sub-01/anat/._sub-01_Chimap.nii.gz",
        "code/x.py",
        "sub-01/.git/sub-01_acq-h_Chimap.nii.gz",
        "sourcedata/sub-03/anat/sub-03_Chimap.nii.gz",
        "tmp/sub-04_Chimap.nii.gz",
        "sub-01_notes.txt",
    )
    assert names_of(root) == ["sub-01"]


def test_selection_by_label(dataset):
    root = dataset("ds", chi("sub-01", "ses-1"), chi("sub-01", "ses-2"), chi("sub-02", "ses-1"), chi("sub-03"))
    assert names_of(root, participant_label=("01", "03")) == ["sub-01_ses-1", "sub-01_ses-2", "sub-03"]
    assert names_of(root, session_label=("1",)) == ["sub-01_ses-1", "sub-02_ses-1"]


def test_a_derivative_may_be_the_dataset(dataset):
    root = dataset("qsmxt", chi("sub-01", extension=".nii"), kind="derivative")
    (scan,) = scans_of(root)
    assert scan.uri == "bids:qsmxt:sub-01/anat/sub-01_Chimap.nii"


def test_derivatives_given_and_those_below_the_dataset_are_found(dataset):
    root = dataset("ds", "sub-01/anat/sub-01_T1w.nii.gz", "sub-02/anat/sub-02_T1w.nii.gz")
    dataset("ds/derivatives/qsmxt", chi("sub-01"), kind="derivative")
    other = dataset("my maps", chi("sub-02"), kind="derivative")
    assert [scan.dataset_name for scan in scans_of(root)] == ["qsmxt"]
    assert [scan.uri for scan in scans_of(root, derivatives=(other,))] == [
        "bids:my-maps:sub-02/anat/sub-02_Chimap.nii.gz"
    ]
    assert names_of(root, derivatives=(root / "derivatives", other)) == ["sub-01", "sub-02"]


def test_own_output_is_no_input(dataset):
    root = dataset("ds", chi("sub-01"))
    output = dataset("ds/derivatives/old", chi("sub-01"), kind="derivative")
    (output / "dataset_description.json").write_text('{"GeneratedBy": [{"Name": "bids_dgmseg"}]}')
    assert names_of(root) == ["sub-01"]


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("sub-01/Sepia_Chimap.nii.gz", "sub-01"),
        ("sub-01/ses-2/Sepia_Chimap.nii.gz", "sub-01_ses-2"),
        ("sub-01/anat/sub-01_Sepia_Chimap.nii.gz", "sub-01"),
        ("sub-01/ses-2/qsm/sub-01_ses-2_acq-x_Sepia_Chimap.nii.gz", "sub-01_ses-2_acq-x"),
        ("sub-01/Chimap.nii", "sub-01"),
    ],
)
def test_sepia_names_count_inside_a_subject(dataset, file, name):
    root = dataset("sepia", file, "Sepia_Chimap.nii.gz", kind="derivative")
    assert names_of(root) == [name]


def test_sepia_without_a_description_is_a_derivative(dataset, tmp_path):
    root = dataset("ds", "sub-01/anat/sub-01_part-phase_MEGRE.nii.gz")
    sepia = dataset("sepia", "sub-01/Sepia_Chimap.nii.gz")
    (sepia / "dataset_description.json").unlink()
    assert names_of(root, derivatives=(sepia,)) == ["sub-01"]


def test_parts_of_chi_are_left_alone(dataset):
    root = dataset(
        "ds",
        chi("sub-01", extension=".nii"),
        "sub-01/anat/sub-01_Chimap-pos.nii",
        "sub-01/anat/sub-01_Chimap-neg.nii",
        chi("sub-01", "desc-paramagnetic"),
        chi("sub-01", "desc-diamagnetic"),
    )
    assert names_of(root) == ["sub-01"]


@pytest.mark.parametrize(
    ("block", "names"),
    [
        ({"acquisition": "a"}, ["sub-01_acq-a_run-01", "sub-01_acq-a_run-02"]),
        ({"acq": ["a", "b"], "run": 1}, ["sub-01_acq-a_run-01"]),
        ({"acquisition": None}, ["sub-01_desc-x"]),
        ({"acquisition": "*"}, ["sub-01_acq-a_run-01", "sub-01_acq-a_run-02", "sub-01_acq-b"]),
        ({"desc": "paramagnetic"}, ["sub-01_desc-paramagnetic"]),
        ({"scope": "raw", "acquisition": "b"}, ["sub-01_acq-b"]),
    ],
)
def test_a_filter_file_selects(dataset, tmp_path, block, names):
    root = dataset(
        "ds",
        chi("sub-01", "acq-a", "run-01"),
        chi("sub-01", "acq-a", "run-02"),
        chi("sub-01", "acq-b"),
        chi("sub-01", "desc-x"),
        chi("sub-01", "desc-paramagnetic"),
    )
    (tmp_path / "filter.json").write_text(json.dumps({"t1w": {}, "chimap": block}))
    assert names_of(root, bids_filter_file=tmp_path / "filter.json") == names


@pytest.mark.parametrize("text", ['{"chimap": {"scope": "raw"}}', '{"chimap": {"scope": "qsmxt"}}'])
def test_a_scope_chooses_between_sources(dataset, tmp_path, text):
    root = dataset("ds", chi("sub-01"))
    dataset("ds/derivatives/qsmxt", chi("sub-01"), kind="derivative")
    (tmp_path / "filter.json").write_text(text)
    (scan,) = scans_of(root, bids_filter_file=tmp_path / "filter.json")
    assert scan.dataset_name == json.loads(text)["chimap"]["scope"]


def test_sidecars_are_inherited_the_nearest_wins(dataset):
    root = dataset("ds", chi("sub-01", "ses-1", "acq-x"))
    (root / "Chimap.json").write_text('{"Units": "ppb", "MagneticFieldStrength": 3}')
    (root / "acq-y_Chimap.json").write_text('{"Units": "Hz"}')
    (root / "sub-01" / "sub-01_Chimap.json").write_text('{"Units": "ppm"}')
    (scan,) = scans_of(root)
    assert scan.sidecar == {"Units": "ppm", "MagneticFieldStrength": 3}
    assert scan.sidecar_path == root / "sub-01" / "sub-01_Chimap.json"


def test_sepia_sidecar_belongs_to_its_own_map(dataset):
    root = dataset("ds", "sub-01/Sepia_Chimap.nii.gz", kind="derivative")
    (root / "sub-01" / "Sepia_Chimap.json").write_text('{"Units": "ppm"}')
    (root / "sub-01" / "Other_Chimap.json").write_text('{"Units": "ppb"}')
    assert scans_of(root)[0].sidecar == {"Units": "ppm"}


def test_a_participants_sidecar_reaches_a_map_with_sepias_name(dataset):
    root = dataset("ds", "sub-01/ses-2/Sepia_Chimap.nii.gz", kind="derivative")
    (root / "sub-01" / "sub-01_Chimap.json").write_text('{"Units": "ppb"}')
    (root / "sub-01" / "sub-01_ses-1_Chimap.json").write_text('{"Units": "ppm"}')
    assert scans_of(root)[0].sidecar == {"Units": "ppb"}


def test_those_without_a_map_are_known(dataset):
    root = dataset("ds", chi("sub-01"), "sub-02/anat/sub-02_T1w.nii.gz")
    settings = Settings(bids_dir=root, output_dir=root / "out")
    assert find_left_out(settings, find_scans(settings)) == ["sub-02: no _Chimap; left out"]


def left_out_of(root, **options):
    settings = Settings(bids_dir=root, output_dir=root / "out", **options)
    return find_left_out(settings, find_scans(settings))


def test_a_session_with_echoes_but_no_map_is_known_and_one_asked_for_by_name(dataset):
    root = dataset(
        "ds",
        chi("sub-01", "ses-1"),
        "sub-01/ses-2/anat/sub-01_ses-2_echo-1_part-mag_MEGRE.nii.gz",
        "sub-01/ses-3/anat/sub-01_ses-3_T1w.nii.gz",
        chi("sub-02", "ses-2"),
    )
    assert left_out_of(root) == ["sub-01_ses-2: no _Chimap, and no _MEGRE with part-phase; left out"]
    assert left_out_of(root, session_label=("1", "3")) == [
        "sub-01_ses-3: no _Chimap; left out",
        "sub-02: no _Chimap in ses-1, ses-3; left out",
    ]


def test_whose_map_was_not_chosen_is_not_said_to_have_none(dataset, tmp_path):
    (tmp_path / "filter.json").write_text('{"chimap": {"acquisition": "gre"}}')
    root = dataset("ds", chi("sub-01", "acq-gre"), chi("sub-02"), chi("sub-03", "desc-paramagnetic"))
    assert left_out_of(root, bids_filter_file=tmp_path / "filter.json") == [
        f"sub-{label}: no _Chimap that filter.json selects; left out" for label in ("02", "03")
    ]
    assert left_out_of(root) == ["sub-03: no _Chimap of all sources, only of para- or diamagnetic ones; left out"]


@pytest.mark.parametrize(
    ("filtered", "message"),
    [
        (True, r"^ds: no _Chimap that filter.json selects; check --bids-filter-file$"),
        (
            False,
            r"^ds: no _Chimap of all sources, only of para- or diamagnetic ones; give maps of total susceptibility",
        ),
    ],
)
def test_beside_echoes_too_maps_that_are_not_chosen_are_the_reason(dataset, tmp_path, filtered, message):
    (tmp_path / "filter.json").write_text('{"chimap": {"acquisition": "gre"}}')
    root = dataset("ds", chi("sub-01", "desc-diamagnetic"), "sub-01/anat/sub-01_echo-1_part-mag_MEGRE.nii.gz")
    with pytest.raises(InputError, match=message):
        scans_of(root, bids_filter_file=tmp_path / "filter.json" if filtered else None)


def test_a_description_that_was_not_fetched_is_said(dataset):
    root = dataset("ds", chi("sub-01"))
    (root / "dataset_description.json").unlink()
    (root / "dataset_description.json").symlink_to("nowhere")
    with pytest.raises(InputError, match=r"^dataset_description.json: content not fetched \(broken symlink"):
        scans_of(root)


def test_folders_whose_labels_bids_does_not_allow_are_known(dataset):
    root = dataset("ds", chi("sub-01"), "sub-1_0/anat/sub-1_0_Chimap.nii.gz", "sub-/anat/sub-_Chimap.nii.gz")
    settings = Settings(bids_dir=root, output_dir=root / "out")
    assert find_left_out(settings, find_scans(settings)) == [
        f"{name}: not a BIDS name (letters and digits behind sub-); left out, so rename it"
        for name in ("sub-", "sub-1_0")
    ]
    chosen = replace(settings, participant_label=("01",))
    assert find_left_out(chosen, find_scans(chosen)) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"participant_label": ("99",)}, r"^ds: no sub-99; check --participant-label \(there are sub-01, sub-02\)$"),
        ({"session_label": ("9",)}, r"^ds: no ses-9; check --session-label \(there are ses-1\)$"),
        ({"participant_label": ("02",)}, r"^ds: no _Chimap and no _MEGRE for sub-02; check --participant-label"),
        ({"derivatives": (Path("/nowhere"),)}, r"^/nowhere: no such folder; check --derivatives$"),
        ({"bids_filter_file": Path("/nowhere/f.json")}, r"^/nowhere/f.json: no such file"),
    ],
)
def test_a_wrong_selection_is_refused(dataset, options, message):
    root = dataset("ds", chi("sub-01", "ses-1"), "sub-02/anat/sub-02_T1w.nii.gz")
    with pytest.raises(InputError, match=message):
        scans_of(root, **options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"chimap": {"acquisition": "x",}}', r"^filter.json: invalid JSON \(line 1, column 32\)"),
        ('{"t1w": {}}', r'^filter.json: has no "chimap" block'),
        ('{"chimap": {"acqisition": "x"}}', r"^filter.json: no entity is called acqisition"),
        ("[1]", r"^filter.json: contains a list, expected a JSON object"),
        ('{"chimap": {"acquisition": "nosuch"}}', r"^ds: no _Chimap that filter.json selects"),
    ],
)
def test_a_wrong_filter_file_is_refused(dataset, tmp_path, text, message):
    (tmp_path / "filter.json").write_text(text)
    with pytest.raises(InputError, match=message):
        scans_of(dataset("ds", chi("sub-01")), bids_filter_file=tmp_path / "filter.json")


def test_echoes_alone_ask_for_a_reconstruction(dataset):
    root = dataset("ds", "sub-01/anat/sub-01_echo-1_part-phase_MEGRE.nii.gz")
    with pytest.raises(InputError, match=r"^ds: _MEGRE but no _Chimap; reconstruct .* QSMxT, .* --derivatives$"):
        scans_of(root)


def test_an_empty_dataset_is_refused(dataset):
    with pytest.raises(InputError, match=r"^ds: no _Chimap and no _MEGRE in it; give .* --derivatives$"):
        scans_of(dataset("ds"))


def test_a_folder_that_is_no_dataset_is_refused(tmp_path):
    with pytest.raises(InputError, match=r": no dataset_description.json; give the root folder of the BIDS dataset$"):
        scans_of(tmp_path)
    with pytest.raises(InputError, match=r"gone: no such folder; give the root folder of the BIDS dataset$"):
        scans_of(tmp_path / "gone")


def test_a_broken_sidecar_is_a_problem_of_its_own_scan(dataset):
    root = dataset("ds", chi("sub-01"), chi("sub-02"))
    (root / "sub-01" / "anat" / "sub-01_Chimap.json").write_text('{\n "Units": ppm\n}')
    problem = "sub-01_Chimap.json: invalid JSON (line 2, column 11); fix the file"
    assert [(scan.name, scan.problem) for scan in scans_of(root)] == [("sub-01", problem), ("sub-02", None)]


def test_a_sidecar_that_breaks_all_scans_is_refused_with_its_place(dataset):
    root = dataset("ds", chi("sub-01"), chi("sub-02"))
    (root / "Chimap.json").write_text('{\n "Units": ppm\n}')
    with pytest.raises(InputError, match=r"^Chimap.json: invalid JSON \(line 2, column 11\); fix the file$"):
        scans_of(root)


def test_a_folder_that_cannot_be_listed_is_one_line(dataset, monkeypatch):
    root = dataset("ds", chi("sub-01"), chi("sub-02"))

    def deny(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(Path, "iterdir", deny)
    with pytest.raises(InputError, match=r"^sub-01: cannot be read \(Permission denied\); correct its permissions"):
        scans_of(root)


def test_compressed_and_not_of_one_name_are_the_problem_of_one_scan(dataset):
    root = dataset("ds", chi("sub-01"), chi("sub-01", extension=".nii"), chi("sub-02"))
    one, other = scans_of(root)
    assert one.problem == "sub-01_Chimap.nii: lies beside sub-01_Chimap.nii.gz; keep one of the two"
    assert (one.name, other.name, other.problem) == ("sub-01", "sub-02", None)


def test_two_sources_of_one_scan_are_refused(dataset):
    root = dataset("ds", chi("sub-01", "run-1"))
    given = dataset("qsmxt", chi("sub-01", "run-01", extension=".nii"), kind="derivative")
    both = r"^ds/sub-01/anat/sub-01_run-1_Chimap.nii.gz and qsmxt/sub-01/anat/sub-01_run-01_Chimap.nii are maps"
    with pytest.raises(InputError, match=both + r".*--derivatives or --bids-filter-file"):
        scans_of(root, derivatives=(given,))


def test_two_maps_of_one_scan_in_one_dataset_are_its_problem(dataset):
    root = dataset("ds", "sub-01/Sepia_Chimap.nii.gz", chi("sub-01"), kind="derivative")
    (scan,) = scans_of(root)
    assert "Sepia_Chimap.nii.gz and ds/sub-01/anat/sub-01_Chimap.nii.gz are maps of the same scan; keep one" in str(
        scan.problem
    )


def test_a_file_in_another_participants_folder_is_refused(dataset):
    root = dataset("ds", "sub-01/anat/sub-02_Chimap.nii.gz")
    with pytest.raises(InputError, match=r"^sub-02_Chimap.nii.gz: lies in sub-01; rename the file or move it$"):
        scans_of(root)


def test_parts_of_names_that_are_passed_over_are_told(dataset):
    root = dataset("ds", chi("sub-01", "acq-my-map"), chi("sub-02", "acq-x"))
    settings = Settings(bids_dir=root, output_dir=root / "out")
    (said,) = find_left_out(settings, find_scans(settings))
    assert said.startswith("sub-01_acq-my-map_Chimap.nii.gz: acq-my-map is no entity of BIDS (letters and digits")
    assert said.endswith("the scan is sub-01; rename the file")


def test_a_run_goes_on_without_files_in_the_wrong_folder(dataset):
    root = dataset("ds", "sub-01/anat/sub-02_Chimap.nii.gz", chi("sub-01"), "sub-01/ses-1/anat/sub-01_ses-2_Chimap.nii")
    said: list[str] = []
    (scan,) = find_scans(Settings(bids_dir=root, output_dir=root / "out"), misplaced=said)
    assert scan.name == "sub-01"
    assert said == [
        "sub-02_Chimap.nii.gz: lies in sub-01; rename the file or move it",
        "sub-01_ses-2_Chimap.nii: lies in ses-1; rename the file or move it",
    ]


def test_where_all_lie_wrong_there_is_no_run(dataset):
    root = dataset("ds", "sub-01/anat/sub-02_Chimap.nii.gz")
    with pytest.raises(InputError, match=r"^sub-02_Chimap.nii.gz: lies in sub-01; rename the file or move it$"):
        find_scans(Settings(bids_dir=root, output_dir=root / "out"), misplaced=[])


@pytest.mark.skipif(not TREE.is_dir(), reason="the example datasets are not on this machine")
def test_maps_of_the_example_derivative_are_found_from_the_raw_dataset():
    found = scans_of(TREE / "raw", derivatives=(TREE / "derivatives" / "qsmxt",))
    assert [scan.name for scan in found] == ["sub-01", "sub-02_ses-1_desc-rts"]
    assert {scan.sidecar["Units"] for scan in found} == {"ppm"}
