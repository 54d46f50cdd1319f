"""Interfaces of the steps: each runs alone from files to files."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from nipype.interfaces.base import isdefined

from bids_dgmseg.errors import InputError
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.interfaces import (
    AlignSessions,
    ConformChi,
    CorrectLabels,
    ImplausibleMapError,
    LocalizeNuclei,
    MeasureNuclei,
    PlotNuclei,
    ReconstructQSM,
    SampleMaps,
    SaveDerivatives,
    SegmentNuclei,
)
from bids_dgmseg.io.nifti import load_image, write_like
from bids_dgmseg.models.registry import get_model
from bids_dgmseg.models.structures import STRUCTURES
from tests.conftest import coarse_chi, write_map
from tests.run.test_multi_echo_scans import write_echoes


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path, monkeypatch, oracle):
    """Interfaces write into the current folder, as those of Nipype do."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


@pytest.fixture
def chi(tmp_path) -> str:
    """Map of the phantom in ppm."""
    return str(write_map(tmp_path / "ds", "sub-01", coarse_chi()))


@pytest.fixture
def segmented(chi):
    """Outputs of SegmentNuclei for the map of the phantom."""
    return SegmentNuclei(in_chi=chi, model="oracle").run().outputs


def test_conform_converts_to_ppm(tmp_path):
    ppb = coarse_chi().with_array(coarse_chi().array * 1000)
    path = write_map(tmp_path / "ds", "sub-01", ppb, sidecar={"Units": "ppb", "ReferenceRegion": "CSF"})
    outputs = ConformChi(in_chi=str(path)).run().outputs
    assert (outputs.units, outputs.reference) == ("ppb", "CSF")
    found = Volume.read(outputs.out_chi).array
    np.testing.assert_allclose(found[np.isfinite(found)], coarse_chi().array[np.isfinite(found)], atol=1e-6)


def test_conform_refuses_what_is_no_map(tmp_path):
    (path := tmp_path / "sub-01_Chimap.nii.gz").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"^sub-01_Chimap.nii.gz: "):
        ConformChi(in_chi=str(path)).run()
    assert not list(Path.cwd().glob("*.nii*"))


def test_segment_localizes_by_itself(chi, segmented):
    box = LocalizeNuclei(in_chi=chi, model="oracle").run().outputs.out_box
    with_box = SegmentNuclei(in_chi=chi, model="oracle", in_box=box).run().outputs
    first, second = (Volume.read(outputs.out_dseg, np.uint8).array for outputs in (segmented, with_box))
    np.testing.assert_array_equal(first, second)
    assert set(np.unique(first)) == {0, *(structure.index for structure in STRUCTURES)}
    assert segmented.labels == [structure.abbreviation for structure in STRUCTURES]


def test_labels_are_on_the_grid_of_the_map(chi, segmented):
    given, dseg, probseg = (load_image(path) for path in (chi, segmented.out_dseg, segmented.out_probseg))
    assert dseg.shape == given.shape == probseg.shape[:3]
    np.testing.assert_array_equal(dseg.affine, given.affine)


def test_probabilities_in_the_box_are_those_of_the_map(segmented):
    whole, box = (load_image(path) for path in (segmented.out_probseg, segmented.out_probseg_box))
    start = np.rint((np.linalg.inv(whole.affine) @ box.affine)[:3, 3]).astype(int)
    x, y, z = (slice(low, low + size) for low, size in zip(start, box.shape[:3], strict=True))
    np.testing.assert_array_equal(whole.get_fdata()[x, y, z], box.get_fdata())
    assert whole.get_fdata().sum() == pytest.approx(box.get_fdata().sum())  # 0 elsewhere


def test_midplane_of_symmetric_head_is_its_middle(chi):
    plane = LocalizeNuclei(in_chi=chi, model="oracle", find_midplane=True).run().outputs.midplane
    assert plane["normal"] == pytest.approx([1, 0, 0], abs=0.02)
    assert plane["offset_mm"] == pytest.approx(0, abs=1)


def test_localizer_without_network_has_no_regions(chi):
    outputs = LocalizeNuclei(in_chi=chi, model="oracle").run().outputs
    assert outputs.out_regions == {}
    assert not isdefined(outputs.out_head_labels)


def test_further_maps_have_no_value_of_a_missing_nucleus(chi, segmented, tmp_path):
    dseg = Volume.read(segmented.out_dseg, np.uint8)
    lost = np.where(dseg.array == STRUCTURES.named("RN_L").index, 0, dseg.array)
    given = {"in_chi": chi, "in_dseg": str(write_like(lost, Path(chi), tmp_path / "lost.nii.gz")), "model": "oracle"}
    stats = MeasureNuclei(**given, in_probseg=segmented.out_probseg, bilateral=True).run().outputs.out_stats
    (tmp_path / "sampled").mkdir()
    path = tmp_path / "sub-01_R2starmap.nii"
    nib.Nifti1Image(np.full(dseg.shape, 25, np.float32), dseg.affine).to_filename(path)
    step = SampleMaps(**given, in_stats=stats, in_maps=[str(path)], bilateral=True)
    outputs = step.run(cwd=str(tmp_path / "sampled")).outputs
    table = pd.read_csv(outputs.out_stats, sep="\t", na_values="n/a").set_index("abbreviation")
    assert table.loc[["RN_L", "RN"], ["mean_ppm", "R2starmap_n_valid", "R2starmap_mean_per_s"]].isna().all(axis=None)
    assert table.loc[["RN_R", "DN"], "R2starmap_mean_per_s"].tolist() == [25, 25]


@pytest.mark.parametrize("probabilities", ["out_probseg", "out_probseg_box"])
def test_measures_are_those_of_the_phantom(chi, segmented, phantom, probabilities):
    outputs = MeasureNuclei(
        in_chi=chi, in_dseg=segmented.out_dseg, in_probseg=getattr(segmented, probabilities), model="oracle"
    ).run()
    table = pd.read_csv(outputs.outputs.out_stats, sep="\t").set_index("abbreviation")
    for name, volume_mm3 in phantom.volumes_mm3.items():
        # 16 mm3 per voxel; the surface of the smallest nucleus (100 mm3) is that of a few voxels
        assert table.loc[name, "volume_pv_mm3"] == pytest.approx(volume_mm3, rel=0.15)
    assert outputs.outputs.rating == outputs.outputs.report["rating"]


def test_measures_relative_to_a_nucleus(chi, segmented):
    given = {"in_chi": chi, "in_dseg": segmented.out_dseg, "in_probseg": segmented.out_probseg_box, "model": "oracle"}
    outputs = MeasureNuclei(**given, reference="structure", reference_structure="CN").run().outputs
    table = pd.read_csv(outputs.out_stats, sep="\t").set_index("abbreviation")
    zero = outputs.report["reference"]["mean_ppm"]
    assert table.loc["RN_L", "mean_ref_ppm"] == pytest.approx(table.loc["RN_L", "mean_ppm"] - zero, abs=1e-6)


def test_labels_on_another_grid_are_refused(tmp_path, chi, segmented):
    image = load_image(segmented.out_dseg)
    (other := tmp_path / "other_dseg.nii.gz").touch()
    nib.Nifti1Image(np.asarray(image.dataobj)[1:], image.affine).to_filename(other)
    with pytest.raises(InputError, match=r"^other_dseg.nii.gz: is not on the grid of the map \(shape"):
        MeasureNuclei(in_chi=chi, in_dseg=str(other), in_probseg=segmented.out_probseg, model="oracle").run()
    with pytest.raises(InputError, match=r"^other_dseg.nii.gz: is not on the grid of the map \(shape"):
        PlotNuclei(in_chi=chi, in_dseg=str(other), model="oracle").run()


def test_probabilities_of_another_model_are_refused(chi, segmented, tmp_path):
    labels = Volume.read(segmented.out_dseg, np.uint8)
    own = [one.index for one in get_model("dcnnet").structures]
    kept = np.where(np.isin(labels.array, own), labels.array, 0).astype(np.uint8)
    dseg = write_like(kept, segmented.out_dseg, tmp_path / "dseg.nii.gz")
    step = MeasureNuclei(in_chi=chi, in_dseg=str(dseg), in_probseg=segmented.out_probseg, model="dcnnet")
    with pytest.raises(InputError, match=r"has 16 volumes, dcnnet has 4 nuclei; pass their names as `labels`$"):
        step.run()


@pytest.mark.parametrize("interface", [LocalizeNuclei, SegmentNuclei])
def test_unknown_model_is_one_line(chi, interface):
    with pytest.raises(InputError, match=r"dgm17: no such model; choose from "):
        interface(in_chi=chi, model="dgm17").run()


@pytest.mark.figures
def test_only_chosen_planes_are_drawn(chi, segmented):
    outputs = PlotNuclei(in_chi=chi, in_dseg=segmented.out_dseg, model="oracle", planes=["axial"], viewer=False).run()
    assert set(outputs.outputs.out_figures) == {"axial"}
    assert Path(outputs.outputs.out_figures["axial"]).read_bytes().startswith(b"\x89PNG")


def test_derivatives_are_named_by_entities(tmp_path, chi, segmented):
    measured = MeasureNuclei(
        in_chi=chi, in_dseg=segmented.out_dseg, in_probseg=segmented.out_probseg_box, model="oracle"
    ).run()
    box = LocalizeNuclei(in_chi=chi, model="oracle").run().outputs.out_box
    files = SaveDerivatives(
        out_dir=str(tmp_path / "out"),
        entities={"sub": "01", "ses": "b", "acq": "x"},
        model="oracle",
        in_dseg=segmented.out_dseg,
        in_probseg=segmented.out_probseg,
        in_stats=measured.outputs.out_stats,
        in_box=box,
        masks=False,
    ).run()
    names = {Path(path).relative_to(tmp_path / "out").as_posix() for path in files.outputs.out_files}
    stem = "sub-01/ses-b/anat/sub-01_ses-b_acq-x_seg-oracle"
    ends = (
        "dseg.nii.gz",
        "dseg.tsv",
        "dseg.json",
        "probseg.nii.gz",
        "probseg.json",
        "stats.tsv",
        "stats.json",
        "qc.json",
    )
    assert names == {f"{stem}_{end}" for end in ends}


def test_entities_without_subject_are_refused(tmp_path, segmented):
    step = SaveDerivatives(
        out_dir=str(tmp_path / "out"),
        entities={"ses": "b"},
        in_dseg=segmented.out_dseg,
        in_probseg=segmented.out_probseg,
        in_stats=segmented.out_dseg,
        in_box={"low": [0, 0, 0], "high": [1, 1, 1]},
    )
    with pytest.raises(InputError, match=r"^`entities`: no sub; "):
        step.run()
    assert not (tmp_path / "out").exists()


@pytest.fixture
def echoes(tmp_path) -> dict[str, list[str]]:
    """Files of the phantom's echoes by part."""
    folder = write_echoes(tmp_path / "echoes")
    return {part: sorted(map(str, folder.glob(f"*_part-{part}_*.nii.gz"))) for part in ("phase", "mag")}


def test_echoes_become_a_map(echoes):
    outputs = ReconstructQSM(
        in_phase=echoes["phase"],
        in_magnitude=echoes["mag"],
        echo_times_s=[0.004, 0.012, 0.02, 0.028],
        field_strength_t=3.0,
        phase_sign="positive",
        accept_implausible=True,
    ).run()
    made, first = load_image(outputs.outputs.out_chi), load_image(echoes["phase"][0])
    np.testing.assert_array_equal(made.affine, first.affine)
    assert made.shape == first.shape
    assert outputs.outputs.report["PhaseSignFrom"] == "stated by the user"


def test_number_of_echo_times_must_fit(echoes):
    step = ReconstructQSM(
        in_phase=echoes["phase"], in_magnitude=echoes["mag"], echo_times_s=[0.004], field_strength_t=3.0
    )
    with pytest.raises(InputError, match=r"^`in_phase` and `in_magnitude`: 4 and 4 images for 1 echo times"):
        step.run()


@pytest.mark.parametrize("parts", [["phase"], ["phase", "magnitude"], ["phase", "imag"]])
def test_parts_must_be_a_complex_signal(echoes, parts):
    images = dict(zip(("in_phase", "in_magnitude"), (echoes["phase"], echoes["mag"])[: len(parts)], strict=False))
    step = ReconstructQSM(**images, parts=parts, echo_times_s=[0.004, 0.012, 0.02, 0.028], field_strength_t=3.0)
    with pytest.raises(
        InputError, match=f"^`parts`: {', '.join(parts)}; pass phase and mag, real and imag, or complex"
    ):
        step.run()


def test_implausible_map_travels_with_its_figure(tmp_path):
    import pickle

    error = ImplausibleMapError(["spread 9 ppm"], report={"a": 1}, warnings=["b"], figure=tmp_path / "c.png")
    copy = pickle.loads(pickle.dumps(error))
    assert vars(copy) == vars(error)
    assert str(copy) == str(error)


def test_inputs_can_be_hashed(chi, segmented):
    steps = [
        ConformChi(in_chi=chi),
        SegmentNuclei(in_chi=chi, in_box={"low": [0.0, 1.0, 2.0], "high": [3.0, 4.0, 5.0]}),
        MeasureNuclei(in_chi=chi, in_dseg=segmented.out_dseg, in_probseg=segmented.out_probseg),
    ]
    for step in steps:
        first, second = (step.inputs.get_hashval(hash_method="content")[1] for _ in range(2))
        assert first == second
    steps[1].inputs.in_box = {"low": [0.0, 1.0, 2.0], "high": [3.0, 4.0, 6.0]}
    before = SegmentNuclei(in_chi=chi, in_box={"low": [0.0, 1.0, 2.0], "high": [3.0, 4.0, 5.0]})
    assert steps[1].inputs.get_hashval()[1] != before.inputs.get_hashval()[1]


def test_changed_file_next_to_an_input_counts_as_changed(tmp_path):
    """Nipype runs a node again if the hash of its inputs changes."""
    for name in ("sub-01_Chimap.nii.gz", "sub-01_dseg.nii.gz"):
        (tmp_path / name).touch()
    chi, dseg = str(tmp_path / "sub-01_Chimap.nii.gz"), str(tmp_path / "sub-01_dseg.nii.gz")
    steps = {
        ConformChi(in_chi=chi): "sub-01_Chimap.json",
        AlignSessions(in_sessions=[chi, chi]): "sub-01_Chimap.json",
        SampleMaps(in_chi=chi, in_dseg=dseg, in_stats=dseg, in_maps=[chi]): "sub-01_Chimap.json",
        CorrectLabels(in_dseg=dseg, in_correction=dseg): "sub-01_dseg.tsv",
    }
    for step, name in steps.items():
        (tmp_path / name).unlink(missing_ok=True)
        hashes = [step.inputs.get_hashval()[1]]
        for nucleus in ("DN_L", "DN_R"):
            (tmp_path / name).write_text(f"index\tabbreviation\n1\t{nucleus}\n")
            hashes.append(step.inputs.get_hashval()[1])
        assert len(set(hashes)) == 3, name
    stated = ConformChi(in_chi=chi, metadata={"Units": "ppm"}).inputs
    before = stated.get_hashval()[1]
    (tmp_path / "sub-01_Chimap.json").write_text("{}")  # not read
    assert stated.get_hashval()[1] == before


def test_every_trait_is_described():
    for interface in (
        ConformChi,
        LocalizeNuclei,
        MeasureNuclei,
        PlotNuclei,
        ReconstructQSM,
        SaveDerivatives,
        SegmentNuclei,
    ):
        for spec in (interface.input_spec(), interface.output_spec()):
            undescribed = [name for name, trait in spec.traits(transient=None).items() if not trait.desc]
            assert not undescribed, f"{interface.__name__}: {undescribed}"
