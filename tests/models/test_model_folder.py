import re
import sys
from dataclasses import replace

import pytest
import torch

from bids_dgmseg.errors import InputError
from bids_dgmseg.io.files import sha256, write_json
from bids_dgmseg.models.model_folder import (
    atlas_files,
    find_folds_trained_on,
    load_segmenters,
    load_weights,
    read_model_folder,
    read_weights,
    save_weights,
    segmenter_network,
    write_model_toml,
)
from bids_dgmseg.models.registry import MODELS, weights_folder

SMALL = replace(
    MODELS["dcnnet"], arch={"dilations": [[1], [1, 2]], "initial_features": 2, "growth": 2, "bottleneck_layers": 1}
)


def read(folder, text, model=MODELS["dcnnet"]):
    (folder / "model.toml").write_text(text, encoding="utf-8")
    return read_model_folder(model, folder)


def test_arguments_in_the_folder_build_its_network(tmp_path):
    network = segmenter_network(SMALL)
    save_weights(network.state_dict(), tmp_path / "fold_0.safetensors")
    write_model_toml(SMALL, tmp_path, about={"licence": "CC0", "seed": 3})
    (loaded,) = load_segmenters(read_model_folder(MODELS["dcnnet"], tmp_path), tmp_path)
    torch.testing.assert_close(loaded.state_dict(), network.half().float().state_dict())


def test_missing_keys_come_from_the_registry(tmp_path):
    model = MODELS["attunet25d"]
    assert read_model_folder(model, tmp_path) is model
    assert read(tmp_path, "[arch]\nattention = false\n", model).arch == {**model.arch, "attention": False}


def test_a_written_description_is_read_back(tmp_path):
    joint = replace(
        SMALL,
        heads=(("DN", "IN"),),
        mirrored=True,
        input=replace(SMALL.input, spacing_mm=(1.0, 1.0, 2.0), normalization="zscore", zero_padding=True),
    )
    write_model_toml(joint, tmp_path, about={"temperatures": [1.0, 1.5, 2.0]})
    expected = replace(joint, arch={**MODELS["dcnnet"].arch, **joint.arch}, temperatures=(1.0, 1.5, 2.0))
    assert read_model_folder(MODELS["dcnnet"], tmp_path) == expected


@pytest.mark.parametrize(
    "network", ["os:system", "bids_dgmseg.networks.dcn_net:X", "bids_dgmseg.networks.dcn_net", "intruder:DCNNet", ""]
)
def test_networks_outside_the_list_are_not_imported(network, tmp_path, monkeypatch):
    (tmp_path / "intruder.py").write_text("from bids_dgmseg.networks.dcn_net import DCNNet\n")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "model.toml").write_text(f'model = "dcnnet"\nnetwork = "{network}"\n')
    with pytest.raises(InputError, match=rf"model.toml: unknown network {re.escape(repr(network))}; expected one of"):
        load_segmenters(read_model_folder(MODELS["dcnnet"], tmp_path), tmp_path)
    assert "intruder" not in sys.modules


@pytest.mark.parametrize("arch", ["depth = 3", 'growth = "a"', "growth = -2", "dilations = 3"])
def test_impossible_arguments_are_refused(arch, tmp_path):
    save_weights(segmenter_network(SMALL).state_dict(), tmp_path / "fold_0.safetensors")
    (tmp_path / "model.toml").write_text(f'model = "dcnnet"\n[arch]\n{arch}\n')
    message = r"model.toml: invalid arch of bids_dgmseg.networks.dcn_net:DCNNet \(.+\); copy the folder again"
    with pytest.raises(InputError, match=message):
        load_segmenters(read_model_folder(MODELS["dcnnet"], tmp_path), tmp_path)


def test_weights_of_other_classes_are_refused(tmp_path):
    model = replace(MODELS["dgm16"], arch={"features": [2, 4]}, auxiliary=())
    fewer = replace(model, labels=model.labels[:14])
    save_weights(segmenter_network(fewer).state_dict(), tmp_path / "segmenter.safetensors")
    with pytest.raises(InputError, match=r"not weights of dgm16 \(heads\.0\.bias is 15, expected 17: another network"):
        load_weights(segmenter_network(model), model, "segmenter", tmp_path)


def test_large_variances_keep_their_values(tmp_path):
    """Float16 ends at 65504; the variances of batch normalization do not."""
    state = {"running_var": torch.tensor([2.0, 7.5e6]), "weight": torch.tensor([0.25]), "count": torch.tensor(70_000)}
    save_weights(state, tmp_path / "fold_0.safetensors")
    read = read_weights(tmp_path / "fold_0.safetensors")
    assert {name: values.tolist() for name, values in read.items()} == {
        "running_var": [2.0, 7.5e6],
        "weight": [0.25],
        "count": 70_000,
    }


def test_weights_that_are_not_numbers_are_refused(tmp_path):
    network = segmenter_network(MODELS["attunet25d"])
    state = network.state_dict()
    name = next(name for name in state if name.endswith("running_var"))
    save_weights({**state, name: torch.full_like(state[name], torch.inf)}, tmp_path / "fold_0.safetensors")
    with pytest.raises(InputError, match=rf"not weights of attunet25d \(its weights {name} are not finite numbers\)"):
        load_weights(network, MODELS["attunet25d"], "fold_0", tmp_path)


@pytest.mark.parametrize("model", list(MODELS))
def test_shipped_weights_are_numbers(model):
    for path in weights_folder(MODELS[model]).glob("*.safetensors"):
        read_weights(path)


def test_network_of_fewer_classes_gives_fewer_labels(tmp_path):
    model = MODELS["attunet25d"]
    write_model_toml(replace(model, heads=(("RN", "SN"),)), tmp_path, about={})
    trained = read_model_folder(model, tmp_path)
    assert trained.labels == ("RN_L", "RN_R", "SN_L", "SN_R")
    assert trained.classes == ("RN", "SN")
    assert read_model_folder(trained, tmp_path) == trained


def test_other_classes_need_further_training(tmp_path):
    model, source = MODELS["attunet25d"], tmp_path / "source"
    write_model_toml(replace(model, heads=(("RN", "SN-STN"),)), source, about={})
    message = (
        r"^source: its network has the classes RN, SN-STN, attunet25d needs RN, SN, STN; continue the training from it "
        r"\(dgmseg train attunet25d DATASET OUT --from FOLDER\)"
    )
    with pytest.raises(InputError, match=message):
        read_model_folder(model, source)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("model = ", r"invalid TOML \(.*\)"),
        ("spacing_mm = [1, 1]", "spacing_mm: expected array of length 3, got 2"),
        ("patch_mm = [64, 0, 64]", r"patch_mm\[1\]: expected float > 0.0"),
        ('temperatures = ["a", "b"]', r"temperatures\[0\]: expected float, got str"),
        ("temperatures = [1.5]", "temperatures: 1 values, expected 4"),
        ('heads = ["DN"]', r"heads\[0\]: expected array, got str"),
        ("arch = [8, 16]", "arch: expected object, got array"),
        ("slices = -1", "slices: expected int >= 0"),
        ('normalization = "robust"', "normalization: invalid enum value 'robust'"),
    ],
)
def test_impossible_values_are_named(line, message, tmp_path):
    with pytest.raises(InputError, match=rf"^{re.escape(str(tmp_path))}/model.toml: {message}; copy the folder again$"):
        read(tmp_path, line + "\n")


def test_folds_that_a_step_lacks_are_not_unseen(tmp_path):
    chi, folder = tmp_path / "sub-01_Chimap.nii.gz", tmp_path / "weights"
    chi.write_bytes(b"map")
    for name in ("cerebellum/fold_0", "dentate/fold_0", "dentate/fold_1"):
        (folder / name).mkdir(parents=True)
        (folder / name / "checkpoint_final.pth").touch()
    record = {"maps": {"sub-01": sha256(chi)}, "folds": [{"training": ["01"]}, {"training": ["02"]}]}
    write_json(record, folder / "training.json")
    assert find_folds_trained_on(folder, chi) == {0: True}
    (folder / "cerebellum/fold_1").mkdir()
    (folder / "cerebellum/fold_1/checkpoint_final.pth").touch()
    assert find_folds_trained_on(folder, chi) == {0: True, 1: False}


def test_every_atlas_needs_labels(tmp_path):
    with pytest.raises(InputError, match=r"^dcnnet: no atlases in .*references; add NAME_Chimap.nii.gz with NAME_dseg"):
        atlas_files(SMALL, tmp_path)
    (tmp_path / "references").mkdir()
    (tmp_path / "references" / "a_Chimap.nii.gz").touch()
    with pytest.raises(InputError, match=r"references has no a_dseg.nii.gz; add the labels of that map$"):
        atlas_files(SMALL, tmp_path)
    (tmp_path / "references" / "a_dseg.nii.gz").touch()
    assert [[path.name for path in pair] for pair in atlas_files(SMALL, tmp_path)] == [
        ["a_Chimap.nii.gz", "a_dseg.nii.gz"]
    ]


def test_models_without_weights_say_what_to_do():
    with pytest.raises(InputError, match=r"^unshipped: no weights in the package; train it \(dgmseg train unship"):
        load_segmenters(replace(SMALL, name="unshipped"))
