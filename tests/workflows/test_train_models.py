"""The workflow that trains folds and models, on coarse phantoms."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bids_dgmseg.models import MODELS
from bids_dgmseg.segment.weights import load_segmenters
from tests.pipeline.test_training import SMALL, make_dataset

SCRIPT = Path(__file__).parents[2] / "workflows" / "train_models.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_models", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_models"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["train_models"]


def test_each_model_and_fold_is_a_node_and_every_curve_is_compared(script, tmp_path):
    models = ["dcnnet", "deepqsmseg"]
    workflow = script.init_train_models_wf(out=tmp_path, models=models, folds=3, options=["--seed", "2"])
    names = workflow.list_node_names()
    assert [name for name in names if name.startswith("train_")] == [
        f"train_{model}_fold_{fold}" for model in ("dcnnet", "deepqsmseg") for fold in range(3)
    ]
    gather = workflow.get_node("gather")
    assert len([edge for edge in workflow._graph.in_edges(gather)]) == 6
    assert workflow.get_node("train_dcnnet_fold_2").inputs.options == ["--seed", "2"]


def test_the_best_epoch_is_the_one_with_the_least_validation_loss(script, tmp_path):
    curve = tmp_path / "dcnnet" / "fold_1" / "curve.tsv"
    curve.parent.mkdir(parents=True)
    curve.write_text(
        "epoch\tsteps\tlearning_rate\tloss\tvalidation_loss\tDN\tIN\n"
        "1\t3\t0.1\t9\t0.5\t0.8\t0.6\n2\t3\t0.1\t8\t0.4\t0.9\tn/a\n3\t3\t0.1\t7\t0.6\t0.1\t0.1\n"
    )
    assert script.summarize(curve) == {
        "model": "dcnnet", "fold": "1", "epochs": 3, "best_epoch": "2", "validation_loss": "0.4", "mean_dice": "0.9000",
    }  # fmt: skip


@pytest.mark.slow
def test_folds_are_trained_into_one_folder_a_model(script, tmp_path, capsys):
    dataset = make_dataset(tmp_path / "ds")
    options = ["--", "--epochs", "1", "--device", "cpu", "--workers", "0", *SMALL["dcnnet"]]
    given = [str(dataset), str(tmp_path / "out"), "--models", "dcnnet", "--folds", "2", "--work-dir", str(tmp_path)]
    assert script.main([*given, *options]) == 0
    assert len(load_segmenters(replace(MODELS["dcnnet"]), tmp_path / "out" / "dcnnet")) == 2
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[:3] for line in lines[-2:]] == [["dcnnet", "0", "1"], ["dcnnet", "1", "1"]]


def test_a_training_that_fails_says_why(script, tmp_path):
    out = str(tmp_path / "out")
    interface = script.Train(model="dcnnet", fold=0, folds=1, in_dataset=str(tmp_path), out_folder=out)
    with pytest.raises(RuntimeError, match=r"dcnnet fold 0: .*no dataset_description.json"):
        interface.run(cwd=str(tmp_path))
