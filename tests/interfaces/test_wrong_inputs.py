"""Inputs that do not fit each other: one line that names them, and nothing is written."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from bids_dgmseg.errors import InputError
from bids_dgmseg.interfaces import (
    AlignSessions,
    CorrectLabels,
    MeasureNuclei,
    NormalizeToMNI,
    PlotNuclei,
    ReconstructQSM,
    SampleMaps,
    SaveDerivatives,
    SegmentNuclei,
)
from bids_dgmseg.workflows import init_dgmseg_wf, init_participant_wf

SHAPE = (12, 12, 12)
BOX = {"low": [0.0, 0.0, 0.0], "high": [11.0, 11.0, 11.0]}


def write(path: Path, array: np.ndarray, *, shift_mm: float = 0) -> str:
    affine = np.diag([1.0, 1.0, 1.0, 1.0])
    affine[0, 3] = shift_mm
    nib.Nifti1Image(array, affine).to_filename(path)
    return str(path)


@pytest.fixture
def files(tmp_path, monkeypatch) -> dict[str, str]:
    """A map with labels and probabilities of dgm16, and an image elsewhere."""
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(1)
    chi = generator.normal(0, 0.02, SHAPE).astype(np.float32)
    dseg = np.zeros(SHAPE, np.uint8)
    dseg[2:10, 2:10, 2:10] = 11
    probseg = np.stack([dseg == index for index in range(1, 17)], axis=-1).astype(np.float32)
    (tmp_path / "stats.tsv").write_text("abbreviation\tvolume_mm3\nCN_L\t512\n", encoding="utf-8")
    (tmp_path / "other.tsv").write_text("participant_id\nsub-01\n", encoding="utf-8")
    return {
        "in_chi": write(tmp_path / "chi.nii", chi),
        "in_dseg": write(tmp_path / "dseg.nii", dseg),
        "in_probseg": write(tmp_path / "probseg.nii", probseg),
        "elsewhere": write(tmp_path / "elsewhere.nii", dseg, shift_mm=3),
        "elsewhere_probseg": write(tmp_path / "elsewhere_probseg.nii", probseg, shift_mm=3),
        "stats": str(tmp_path / "stats.tsv"),
        "other_table": str(tmp_path / "other.tsv"),
    }


def pick(files: dict[str, str], *names: str) -> dict[str, str]:
    return {name: files[name] for name in names}


@pytest.mark.parametrize(
    "wrong",
    [
        lambda elsewhere: {"in_r2star": elsewhere},
        lambda elsewhere: {"in_regions": {"brain": elsewhere}},
        lambda elsewhere: {"in_regions": {"ventricles": elsewhere}, "reference": "csf"},
        lambda elsewhere: {"in_regions": {"brain": elsewhere}, "reference": "whole-brain"},
        lambda elsewhere: {"reference_mask": elsewhere, "reference": "csf"},
    ],
)
def test_measures_need_images_on_the_grid_of_the_map(files, wrong):
    step = MeasureNuclei(**pick(files, "in_chi", "in_dseg", "in_probseg"), **wrong(files["elsewhere"]))
    with pytest.raises(
        InputError, match=r"^elsewhere.nii: is not on the (same )?grid (of|as) the map \(corners are 3 mm"
    ):
        step.run()
    assert not Path("stats.tsv").read_text(encoding="utf-8").startswith("index")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"reference": "structure"}, r"^`reference` structure: requires `reference_structure`"),
        ({"reference": "structure", "reference_structure": "XX"}, r"^`reference_structure` XX: not labelled by dgm16"),
        (
            {"reference": "csf"},
            r"^`reference` csf: no ventricles in `in_regions`; set `find_ventricles` of LocalizeNuclei, or "
            r"`reference_mask`$",
        ),
        ({"in_space": {"box": BOX}}, r"^`in_space`: has no volumes; pass one of `out_spaces` of AlignSessions$"),
        ({"in_box": {"low": [0, 0, 0]}}, r"^box with low: expected low and high, its corners in mm$"),
    ],
)
def test_measures_explain_wrong_options(files, wrong, message):
    with pytest.raises(InputError, match=message):
        MeasureNuclei(**pick(files, "in_chi", "in_dseg", "in_probseg"), **wrong).run()


def test_figures_and_standard_space_need_one_grid(files):
    with pytest.raises(InputError, match=r"^elsewhere.nii: is not on the grid of the map"):
        PlotNuclei(**pick(files, "in_chi", "in_dseg"), in_automatic=files["elsewhere"]).run()
    with pytest.raises(InputError, match=r"^elsewhere.nii: is not on the grid of the map"):
        NormalizeToMNI(in_chi=files["in_chi"], in_dseg=files["elsewhere"]).run()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"in_space": {"box": BOX}}, r"^`in_space`: has no midplane, sessions, to_map, volumes, warnings; pass one of"),
        ({"in_box": {"high": [1, 1, 1]}}, r"^box with high: expected low and high, its corners in mm$"),
        (
            {"in_box": {"low": [50, 0, 0], "high": [60, 11, 11]}},
            r"^`in_box`: lies outside of chi.nii; pass the box of this map$",
        ),
        ({"needs_space": True}, r"^`in_space`: is not set; pass one of `out_spaces` of AlignSessions$"),
    ],
)
def test_segmentation_explains_incomplete_dictionaries(files, wrong, message):
    with pytest.raises(InputError, match=message):
        SegmentNuclei(in_chi=files["in_chi"], **wrong).run()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"names": ["a"]}, r"^`names`: 1 for 2 maps; pass one per map$"),
        ({"metadata": [{}]}, r"^`metadata`: 1 for 2 maps; pass one per map$"),
    ],
)
def test_sessions_need_one_entry_each(files, wrong, message):
    with pytest.raises(InputError, match=message):
        AlignSessions(in_sessions=[files["in_chi"]] * 2, **wrong).run()


def test_one_session_cannot_be_aligned(files):
    with pytest.raises(InputError, match=r"^`in_sessions`: one map; pass those of two or more sessions$"):
        AlignSessions(in_sessions=[files["in_chi"]]).run()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"echo_times_s": [5.0, 10.0]}, r"^echo_times_s: \[5.0, 10.0\], expected ascending times in seconds"),
        ({"echo_times_s": [0.01, 0.005]}, r"^echo_times_s: \[0.01, 0.005\], expected ascending"),
        ({"field_strength_t": 0.0}, r"^field_strength_t: 0.0, expected the field strength in T"),
        ({"field_strength_t": 123.2}, r"^field_strength_t: 123.2, expected the field strength in T"),
    ],
)
def test_reconstruction_checks_units(files, wrong, message):
    given = {"echo_times_s": [0.005, 0.01], "field_strength_t": 3.0} | wrong
    images = [files["in_chi"]] * 2
    with pytest.raises(InputError, match=message):
        ReconstructQSM(in_phase=images, in_magnitude=images, **given).run()


def test_further_maps_need_names_and_a_table_of_measures(files):
    images = pick(files, "in_chi", "in_dseg")
    with pytest.raises(InputError, match=r"^`names`: 2 for 1 maps; pass one per map, or none$"):
        SampleMaps(**images, in_stats=files["stats"], in_maps=[files["in_chi"]], names=["a", "b"]).run()
    with pytest.raises(InputError, match=r"^`units`: 2 for 1 maps; pass one per map, or none$"):
        SampleMaps(**images, in_stats=files["stats"], in_maps=[files["in_chi"]], units=["ppm", "ms"]).run()
    with pytest.raises(InputError, match=r"^other.tsv: no column abbreviation; pass out_stats of MeasureNuclei$"):
        SampleMaps(**images, in_stats=files["other_table"], in_maps=[files["in_chi"]]).run()


def test_further_maps_need_a_brain_on_the_grid_of_the_map(files, tmp_path):
    images = pick(files, "in_chi", "in_dseg") | {"in_stats": files["stats"], "in_maps": [files["in_chi"]]}
    coarse = write(tmp_path / "coarse.nii", np.ones((6, 6, 6), np.uint8))
    with pytest.raises(InputError, match=r"^coarse.nii: is not on the grid of the map"):
        SampleMaps(**images, in_regions={"brain": coarse}).run()


def test_columns_of_a_map_are_replaced(files, tmp_path):
    (tmp_path / "again").mkdir()
    given = pick(files, "in_chi", "in_dseg") | {"in_maps": [write(tmp_path / "sub-01_R1map.nii", np.ones(SHAPE))]}
    first = SampleMaps(**given, in_stats=files["stats"]).run(cwd=str(tmp_path / "again")).outputs.out_stats
    before = Path(first).read_bytes()
    second = SampleMaps(**given, in_stats=first).run(cwd=str(tmp_path)).outputs.out_stats
    assert b"R1map_mean_per_s" in before
    assert Path(second).read_bytes() == before


@pytest.mark.parametrize("step", ["plot", "sample", "correct"])
def test_labels_with_other_numbers_are_refused(step, files, tmp_path):
    labels = np.zeros(SHAPE, np.int16)
    labels[2:6], labels[6:10] = 12, 20005  # left putamen and left red nucleus with the numbers of FreeSurfer
    images = {"in_chi": files["in_chi"], "in_dseg": write(tmp_path / "fs.nii", labels)}
    run = {
        "plot": lambda: PlotNuclei(**images).run(),
        "sample": lambda: SampleMaps(**images, in_stats=files["stats"], in_maps=[files["in_chi"]]).run(),
        "correct": lambda: CorrectLabels(in_dseg=images["in_dseg"], in_correction=files["in_dseg"]).run(),
    }
    with pytest.raises(InputError, match=r"^fs.nii: label 20005 is not a nucleus of dgm16; pass labels with the num"):
        run[step]()


def save(files: dict[str, str], out: str, **given) -> list[str]:
    options = {"entities": {"sub": "01"}, "in_stats": files["stats"], "in_box": BOX, "masks": False} | given
    step = SaveDerivatives(out_dir=out, **pick(files, "in_dseg", "in_probseg") | options)
    return list(step.run().outputs.out_files)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"in_box": {"low": [0, 0, 0]}}, r"^box with low: expected low and high"),
        ({"in_stats": "other_table"}, r"^other.tsv: no column abbreviation; pass `out_stats` of MeasureNuclei$"),
        ({"in_probseg": "elsewhere_probseg"}, r"^elsewhere_probseg.nii: is not on the grid of the labels; pass"),
    ],
)
def test_derivatives_are_written_completely_or_not_at_all(files, tmp_path, wrong, message):
    given = {key: files.get(value, value) if isinstance(value, str) else value for key, value in wrong.items()}
    with pytest.raises(InputError, match=message):
        save(files, str(tmp_path / "out"), **given)
    assert not (tmp_path / "out").exists()


def test_relative_output_folder_is_refused(files):
    with pytest.raises(InputError, match=r"^`out_dir` out: is relative, and nodes run in other folders"):
        save(files, "out")
    with pytest.raises(InputError, match=r"^`out_dir` out: is relative"):
        init_participant_wf("out")


def test_derivatives_form_a_dataset(files, tmp_path):
    save(files, str(tmp_path / "out"))
    description = json.loads((tmp_path / "out" / "dataset_description.json").read_text(encoding="utf-8"))
    assert (description["DatasetType"], description["GeneratedBy"][0]["Name"]) == ("derivative", "bids_dgmseg")
    assert {"dseg.tsv", ".bidsignore", "README"} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_description_of_a_dataset_is_kept(files, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "dataset_description.json").write_text('{"Name": "mine"}', encoding="utf-8")
    save(files, str(tmp_path / "out"))
    assert (tmp_path / "out" / "dataset_description.json").read_text(encoding="utf-8") == '{"Name": "mine"}'
    assert not (tmp_path / "out" / "README").exists()


def test_workflows_refuse_unknown_names():
    with pytest.raises(ValueError, match=r"^mem_gb: no step segmnt; choose from reconstruct, conform"):
        init_dgmseg_wf(mem_gb={"segmnt": 4.0})
    with pytest.raises(InputError, match=r"^output_space MNI: unknown"):
        init_participant_wf("/out", output_space="MNI")
