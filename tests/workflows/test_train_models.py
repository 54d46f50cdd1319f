"""The workflow that trains folds and models, on coarse phantoms."""

import subprocess
from types import SimpleNamespace

import pytest

from bids_dgmseg.cli.main import build_parser
from tests.lab.train.conftest import small_recipes  # noqa: F401 - a fixture


def test_each_model_and_fold_is_a_node(script, tmp_path):
    models = ["dcnnet", "deepqsmseg", "nnunet2step"]
    workflow = script.init_train_models_wf(out=tmp_path, models=models, folds=3, options=["--seed", "2"])
    nodes = [name for name in workflow.list_node_names() if name.startswith("train_")]
    assert nodes == [f"train_{model}_fold_{fold}" for model in models for fold in range(3)]
    gather = workflow.get_node("gather")
    assert len([edge for edge in workflow._graph.in_edges(gather)]) == 9
    for name in nodes:  # none waits for another
        assert [before.name for before in workflow._graph.predecessors(workflow.get_node(name))] == ["inputs"]


def test_nodes_call_dgmseg_with_valid_options(script, tmp_path, monkeypatch):
    asked = {}

    def take(command, **how):
        args = build_parser().parse_args(command[3:])
        asked[args.model, args.fold[0]] = args
        curve = args.out / ("dentate" if args.model == "nnunet2step" else "") / f"fold_{args.fold[0]}" / "curve.tsv"
        curve.parent.mkdir(parents=True, exist_ok=True)
        curve.write_text("epoch\tvalidation_loss\n1\t0.5\n")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(script, "subprocess", SimpleNamespace(run=take))  # Nipype has its own
    options = f"--models attunet25d nnunet2step --folds 2 --work-dir {tmp_path / 'work'} -- --minutes 30"
    assert script.main([str(tmp_path), str(tmp_path / "out"), *options.split()]) == 0
    assert set(asked) == {(model, fold) for model in ("attunet25d", "nnunet2step") for fold in (0, 1)}
    assert {args.minutes for args in asked.values()} == {30}
    assert {args.dataset for args in asked.values()} == {tmp_path}
    assert asked["attunet25d", 1].folds == 2
    assert asked["nnunet2step", 1].out == tmp_path / "out" / "nnunet2step"


@pytest.mark.parametrize(
    ("curve", "content", "expected"),
    [
        pytest.param(
            "dcnnet/fold_1/curve.tsv",
            "epoch\tsteps\tlearning_rate\tloss\tvalidation_loss\tDN\tIN\n"
            "1\t3\t0.1\t9\t0.5\t0.8\t0.6\n2\t3\t0.1\t8\t0.4\t0.9\tn/a\n3\t3\t0.1\t7\t0.6\t0.1\t0.1\n",
            ("dcnnet", "1", 3, "2", "0.4", "0.9000"),
            id="least validation loss of a fold",
        ),
        pytest.param(
            "nnunet2step/dentate/fold_0/curve.tsv",
            "epoch\tloss\tvalidation_loss\tlearning_rate\tDN_L\tDN_R\n"
            "1\t0.1\t-0.7\t0.01\t0.9\t0.9\n2\t0\t-0.6\t0.005\t0.8\tn/a\n",
            ("nnunet2step", "0", 2, "2", "-0.6", "0.8000"),
            id="last epoch of nnU-Net",
        ),
    ],
)
def test_best_epoch_is_that_of_the_kept_weights(script, tmp_path, curve, content, expected):
    path = tmp_path / curve
    path.parent.mkdir(parents=True)
    path.write_text(content)
    columns = ("model", "fold", "epochs", "best_epoch", "validation_loss", "mean_dice")
    assert script.summarize(path) == dict(zip(columns, expected, strict=True))


def test_failed_run_reports_the_first_reason(script, tmp_path, monkeypatch, capsys):
    def fail(command, **how):
        return subprocess.CompletedProcess(command, 2, "", "dgmseg train: error: ds: is empty\n")

    monkeypatch.setattr(script, "subprocess", SimpleNamespace(run=fail))
    monkeypatch.chdir(tmp_path)
    arguments = [str(tmp_path), str(tmp_path / "out"), "--models", "dcnnet", "--work-dir", str(tmp_path / "work")]
    for folds in ("1", "2"):
        assert script.main([*arguments, "--folds", folds]) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith("train_models: error: dcnnet fold 0: dgmseg train: error: ds: is empty (see ")
    assert not list(tmp_path.glob("crash*"))
