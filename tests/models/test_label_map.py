import csv
import json
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from bids_dgmseg.errors import InputError
from bids_dgmseg.models.label_map import match_name, read_label_map
from bids_dgmseg.models.nnunet_folder import read_labels
from bids_dgmseg.models.registry import Weights, get_model
from bids_dgmseg.models.structures import ALL_STRUCTURES
from bids_dgmseg.segmentation.engines import choose_labels
from bids_dgmseg.segmentation.segment import check_ready

MODEL = get_model("nnunet2step")


def write_labels(folder: Path, labels: dict[str, Any], **more: object) -> Path:
    """Write what is read of a single model folder to match its labels."""
    folder.mkdir(parents=True)
    (folder / "plans.json").write_text("{}")
    (folder / "dataset.json").write_text(json.dumps({"labels": labels, **more}))
    return folder


def test_labels_match_by_abbreviation_or_name(tmp_path):
    folder = write_labels(tmp_path / "m", {"background": 0, "Right_Red-Nucleus": 1, "dn_l": 2, "ignore": 3})
    model, notes = choose_labels(MODEL, folder)
    assert model.labels == ("DN_L", "RN_R")
    assert model.label_numbers == {"DN_L": (2,), "RN_R": (1,)}
    assert notes == []


def test_names_of_freesurfer_match():
    table = files("bids_dgmseg").joinpath("data", "freesurfer_aseg.tsv").read_text(encoding="utf-8")
    names = {int(number): name for number, name in list(csv.reader(table.splitlines(), delimiter="\t"))[1:]}
    expected = {one.abbreviation for one in ALL_STRUCTURES if one.freesurfer in names}
    assert {"NAC_L", "NAC_R", "THA_L", "SN_R"} < expected
    assert {match_name(names[one.freesurfer]) for one in ALL_STRUCTURES if one.freesurfer in names} == expected
    assert match_name("Right-Thalamus-Proper") == "THA_R"  # until FreeSurfer 6


def test_labels_without_a_match_become_background(tmp_path):
    labels = {"background": 0, "Left_Dentate-Nucleus": 1, "DN_R": 2, "lesion": 5}
    model, notes = choose_labels(MODEL, write_labels(tmp_path / "m", labels))
    assert model.label_numbers == {"DN_L": (1,), "DN_R": (2,)}
    assert notes == ["m: label 5 (lesion) matches no nucleus and becomes background"]


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("label\tabbreviation\nsinister\tDN_L\n2\tDN_R\n", id="tsv"),
        pytest.param("\ufefflabel\tabbreviation\nsinister\tDN_L \n2\tDN_R\n", id="BOM"),
        pytest.param('{"sinister": "DN_L", "2": "DN_R"}', id="json"),
    ],
)
def test_label_map_is_a_table_or_json(tmp_path, text):
    path = tmp_path / ("map.json" if text.startswith("{") else "map.tsv")
    path.write_text(text)
    assert read_label_map(path) == {"sinister": "DN_L", "2": "DN_R"}


def test_cerebellum_is_found_by_name(tmp_path):
    write_labels(tmp_path / "w" / "dentate", {"background": 0, "DN_L": 1, "DN_R": 2})
    write_labels(tmp_path / "w" / "cerebellum", {"background": 0, "cerebrum": 1, "Cerebellum": 2})
    assert choose_labels(MODEL, tmp_path / "w")[0].label_numbers["cerebellum"] == (2,)


def test_only_labels_of_two_steps_are_postprocessed(tmp_path):
    step = write_labels(tmp_path / "w" / "dentate", {"background": 0, "DN_L": 1, "DN_R": 2})
    largest, unchanged = (choose_labels(MODEL, folder)[0] for folder in (tmp_path / "w", step))
    assert (largest.postprocessing.min_component_fraction, unchanged.postprocessing.min_component_fraction) == (1, 0)
    assert (largest.postprocessing.own_side_only, unchanged.postprocessing.own_side_only) == (True, False)
    assert "cerebellum" not in largest.label_numbers  # there is no such folder


def test_regions_are_numbered_in_their_order(tmp_path):
    folder = write_labels(tmp_path / "m", {"background": 0, "both": [1, 2], "DN_R": [2]}, regions_class_order=[1, 2])
    assert read_labels(folder) == {"both": 1, "DN_R": 2}


@pytest.mark.parametrize(
    ("dentate", "cerebellum", "message"),
    [
        (
            {"background": 0, "left": 1, "right": 2},
            {"cerebellum": 1},
            r"^w: none of its labels \(1 \(left\), 2 \(right\)\) is a known nucleus; name one DN_L in dataset",
        ),
        (
            {"background": 0, "DN_L": 1},
            {"background": 0, "a": 1, "b": 2},
            r"^w/cerebellum: none of its labels \(a, b\) is the cerebellum; name it so in dataset",
        ),
    ],
)
def test_unmatched_labels_are_refused(tmp_path, dentate, cerebellum, message):
    write_labels(tmp_path / "w" / "dentate", dentate)
    write_labels(tmp_path / "w" / "cerebellum", cerebellum)
    with pytest.raises(InputError, match=message):
        choose_labels(MODEL, tmp_path / "w")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("map.json", '{"left": "Dentate"}', r"^map.json: unknown nucleus Dentate; use e.g. DN_L, or cerebellum$"),
        ("map.tsv", "label\tabbreviation\n1\tDN_L\n1\tDN_R\n", r"^map.tsv: a label is listed twice; keep one row"),
        ("map.tsv", "label\tabbreviation\n1\tDN_L\n2\n", r"^map.tsv: a label without abbreviation; use e.g. DN_L"),
        (
            "map.tsv",
            "number\tname\n1\tDN_L\n",
            r"^map.tsv: not a label map; write a TSV with the columns label and abbreviation, or a JSON object$",
        ),
    ],
)
def test_invalid_label_map_is_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        read_label_map(tmp_path / name)


def test_folder_and_model_must_be_of_nnunet(tmp_path):
    with pytest.raises(InputError, match=r"dentate: not an nnU-Net model folder \(no dataset.json\); pass the folder"):
        choose_labels(MODEL, tmp_path)


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("w", r"^dentate/plans.json: its checksum differs from the registry's; install the package again$"),
        ("none", r"^nnunet2step: no weights in the package; train it \(dgmseg train "),
    ],
)
def test_changed_or_missing_weights_are_refused(tmp_path, monkeypatch, folder, message):
    write_labels(tmp_path / "w" / "dentate", {"background": 0, "DN_L": 1, "DN_R": 2})
    monkeypatch.setattr("bids_dgmseg.segmentation.engines.weights_folder", lambda model: tmp_path / folder)
    model = replace(MODEL, weights=Weights({"dentate/plans.json": "00ff"}, licence="CC-BY-4.0", trained_on="nothing"))
    with pytest.raises(InputError, match=message):
        check_ready(model, weights=None, device="cpu")
