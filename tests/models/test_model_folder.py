import re
import sys
from dataclasses import replace

import pytest
import torch

from bids_dgmseg.errors import InputError
from bids_dgmseg.models.model_folder import atlas_files, read_model_folder, segmenter_parts, write_model_toml
from bids_dgmseg.models.registry import MODELS
from bids_dgmseg.models.weights import load_segmenters, save_weights, segmenter_network

SMALL = replace(
    MODELS["dcnnet"], arch={"dilations": [[1], [1, 2]], "initial_features": 2, "growth": 2, "bottleneck_layers": 1}
)


def test_a_folder_s_own_arguments_build_its_network(tmp_path):
    network = segmenter_network(SMALL)
    save_weights(network.state_dict(), tmp_path / "fold_0.safetensors")
    write_model_toml(SMALL, tmp_path, about={"licence": "CC0", "seed": 3})
    (loaded,) = load_segmenters(MODELS["dcnnet"], tmp_path)
    torch.testing.assert_close(loaded.state_dict(), network.half().float().state_dict())


def test_what_a_folder_does_not_say_is_the_registry_s(tmp_path):
    assert read_model_folder(MODELS["attunet25d"], tmp_path) is MODELS["attunet25d"]
    (tmp_path / "model.toml").write_text('model = "attunet25d"\n[arch]\nattention = false\n')
    assert read_model_folder(MODELS["attunet25d"], tmp_path).arch == {**MODELS["attunet25d"].arch, "attention": False}


def test_a_folder_names_network_heads_and_input_and_no_foreign_code(tmp_path):
    joint = replace(
        SMALL,
        heads=(("DN", "IN"),),
        input=replace(SMALL.input, spacing_mm=(1.0, 1.0, 2.0), patch_mm=(20.0, 20.0, 20.0), normalization="zscore"),
    )
    write_model_toml(joint, tmp_path, about={})
    assert read_model_folder(MODELS["dcnnet"], tmp_path) == replace(joint, arch={**MODELS["dcnnet"].arch, **joint.arch})
    (tmp_path / "model.toml").write_text('model = "dcnnet"\nnetwork = "os:system"\n')
    with pytest.raises(InputError, match=r"model.toml: network os:system is none of this program's"):
        read_model_folder(MODELS["dcnnet"], tmp_path)
    (tmp_path / "model.toml").write_text('model = "dcnnet"\nnormalization = "robust"\n')
    with pytest.raises(InputError, match=r"model.toml: normalization robust is none of ppm, zscore, minmax; choose an"):
        read_model_folder(MODELS["dcnnet"], tmp_path)


@pytest.mark.parametrize(
    "network",
    [
        "bids_dgmseg.networks.nonesuch:X",
        "bids_dgmseg.networks.dcn_net:X",
        "bids_dgmseg.networks.dcn_net",
        "bids_dgmseg.networks.dcn_net:nn",
        "bids_dgmseg.networks.dcn_net:Attended",
        "bids_dgmseg.networks.:X",
        "bids_dgmseg.networks.attention_unet:_ResNet50",
        "bids_dgmseg.networks.blocks:max_pool",
        "bids_dgmseg.cli.bids_app:main",
        "",
    ],
)
def test_a_network_that_is_not_there_is_said_with_its_file(network, tmp_path):
    (tmp_path / "model.toml").write_text(f'model = "dcnnet"\nnetwork = "{network}"\n')
    with pytest.raises(InputError, match=rf"model.toml: network {re.escape(network)} is none of this program's; choos"):
        load_segmenters(MODELS["dcnnet"], tmp_path)


def test_a_network_is_named_by_a_text(tmp_path):
    (tmp_path / "model.toml").write_text('model = "dcnnet"\nnetwork = 3\n')
    with pytest.raises(InputError, match=r"model.toml: network 3 is none of this program's; choose another folder"):
        read_model_folder(MODELS["dcnnet"], tmp_path)


def test_a_foreign_module_is_not_even_imported(tmp_path, monkeypatch):
    (tmp_path / "intruder.py").write_text("from bids_dgmseg.networks.dcn_net import DCNNet\n")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "model.toml").write_text('model = "dcnnet"\nnetwork = "intruder:DCNNet"\n')
    with pytest.raises(InputError, match="network intruder:DCNNet is none of this program's"):
        load_segmenters(MODELS["dcnnet"], tmp_path)
    assert "intruder" not in sys.modules


@pytest.mark.parametrize("arch", ["depth = 3", 'growth = "a"', "growth = -2", "dilations = 3"])
def test_arguments_that_a_network_does_not_take_are_said_with_their_file(arch, tmp_path):
    save_weights(segmenter_network(SMALL).state_dict(), tmp_path / "fold_0.safetensors")
    (tmp_path / "model.toml").write_text(f'model = "dcnnet"\n[arch]\n{arch}\n')
    with pytest.raises(
        InputError,
        match=r"model.toml: these are no arguments of bids_dgmseg.networks.dcn_net:DCNNet "
        r"\(.+\); copy the folder again",
    ):
        load_segmenters(MODELS["dcnnet"], tmp_path)


def test_weights_of_another_model_are_refused(tmp_path):
    write_model_toml(SMALL, tmp_path, about={})
    with pytest.raises(InputError, match=r"model.toml: holds weights of dcnnet, not of deepqsmseg; choose --model dcn"):
        read_model_folder(MODELS["deepqsmseg"], tmp_path)


def test_a_folder_of_other_classes_is_to_be_trained_on_from(tmp_path):
    model, source = MODELS["attunet25d"], tmp_path / "source"
    write_model_toml(replace(model, heads=(("RN", "SN-STN"),)), source, about={})
    with pytest.raises(
        InputError,
        match=r"^source: its network tells RN, SN-STN apart, attunet25d needs RN, SN, STN; "
        r"train on from it \(dgmseg train attunet25d DATASET OUT --from FOLDER\)",
    ):
        read_model_folder(model, source)


def test_a_damaged_description_is_refused(tmp_path):
    (tmp_path / "model.toml").write_text("model = ")
    with pytest.raises(InputError, match=r"model.toml: not valid TOML \(.*\); copy the folder again"):
        read_model_folder(SMALL, tmp_path)


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        ([], ["segmenter"]),
        (["fold_1", "fold_0", "fold_10", "localizer"], ["fold_0", "fold_1", "fold_10"]),
    ],
)
def test_folds_are_read_in_their_order(tmp_path, names, parts):
    for name in names:
        (tmp_path / f"{name}.safetensors").touch()
    assert segmenter_parts(SMALL, tmp_path) == parts


def test_a_second_checkpoint_is_for_the_best_quality_alone(tmp_path):
    for name in ("segmenter", "segmenter_2"):
        (tmp_path / f"{name}.safetensors").touch()
    assert segmenter_parts(SMALL, tmp_path) == ["segmenter"]
    assert segmenter_parts(replace(SMALL, ensemble=True), tmp_path) == ["segmenter", "segmenter_2"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("spacing_mm = 3", "spacing_mm is not three numbers above 0"),
        ("spacing_mm = [1, 1]", "spacing_mm is not three numbers above 0"),
        ("patch_mm = [64, 0, 64]", "patch_mm is not three numbers above 0"),
        ('temperatures = ["a", "b"]', "temperatures is not numbers above 0, one a class"),
        ("temperatures = [1.5]", "temperatures is not numbers above 0, one a class"),
        ("heads = 3", "heads is not lists of classes"),
        ('heads = ["DN"]', "heads is not lists of classes"),
        ('mirrored = "yes"', "mirrored is not true or false"),
        ("arch = [8, 16]", "arch is not a table of arguments"),
    ],
)
def test_a_value_of_another_kind_is_said(line, message, tmp_path):
    (tmp_path / "model.toml").write_text(line + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=rf"^{re.escape(str(tmp_path))}/model.toml: {message}; copy the folder again$"):
        read_model_folder(SMALL, tmp_path)


def test_a_folder_s_temperatures_are_taken(tmp_path):
    # Two heads of one nucleus and a background each.
    write_model_toml(SMALL, tmp_path, about={"temperatures": [1.0, 1.5, 1.0, 2.0]})
    assert read_model_folder(SMALL, tmp_path).temperatures == (1.0, 1.5, 1.0, 2.0)


def test_a_folder_says_whether_it_wants_mirror_images(tmp_path):
    for mirrored in (True, False):
        write_model_toml(replace(SMALL, mirrored=mirrored), tmp_path, about={})
        assert read_model_folder(replace(SMALL, mirrored=not mirrored), tmp_path).mirrored is mirrored


def test_each_reference_map_needs_its_labels(tmp_path):
    with pytest.raises(InputError, match=r"^dcnnet: no reference maps in .*references; add NAME_Chimap.nii.gz with"):
        atlas_files(SMALL, tmp_path)
    (tmp_path / "references").mkdir()
    (tmp_path / "references" / "a_Chimap.nii.gz").touch()
    with pytest.raises(InputError, match=r"references has no a_dseg.nii.gz; add the labels of that map$"):
        atlas_files(SMALL, tmp_path)
    (tmp_path / "references" / "a_dseg.nii.gz").touch()
    assert [[path.name for path in pair] for pair in atlas_files(SMALL, tmp_path)] == [
        ["a_Chimap.nii.gz", "a_dseg.nii.gz"],
    ]


def test_a_model_without_weights_in_the_package_says_what_to_do():
    with pytest.raises(InputError, match=r"^unshipped: no weights in the package; train it \(dgmseg train unship"):
        load_segmenters(replace(SMALL, name="unshipped"))
