import signal
from dataclasses import replace

import pytest

from bids_dgmseg.cli import verb_models, verb_train
from bids_dgmseg.cli.main import VERBS, main
from bids_dgmseg.models.registry import MODELS, Weights, get_model
from tests.conftest import contents, start_dataset


def exits_with(*argv: str) -> object:
    with pytest.raises(SystemExit) as stop:
        main(list(argv))
    return stop.value.code


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb, capsys):
    assert exits_with(verb, "--help") == 0
    assert f"usage: dgmseg {verb}" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [(), ("sing",), ("demo",), ("simulate", "out"), ("train", "dcnnet")])
def test_invalid_usage_exits_with_2(argv):
    assert exits_with(*argv) == 2


def test_terminated_training_can_be_resumed(monkeypatch, capsys):
    monkeypatch.setattr(verb_train, "read_request", lambda args, verb: signal.raise_signal(signal.SIGTERM))
    assert main(["train", "dcnnet", "ds", "out"]) == 130
    advice = "dgmseg train: interrupted; run the same command again to resume\n"
    assert capsys.readouterr().err == advice


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["demo", "."], "demo: error: {name}: exists and is not an empty folder; choose a new one"),
        (["simulate", "out", "--scans", "1", "--labels", "none.nii.gz"], "simulate: error: none.nii.gz: no such label"),
        (["models", "show"], "models: error: show: no model given; choose from default, "),
        (
            ["train", "default", "ds", "out"],
            "train: error: dgm16: not trained by dgmseg train; use dgmseg finetune or dgmseg train-simulated\n",
        ),
    ],
)
def test_errors_are_one_line(argv, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.txt").touch()
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"dgmseg {message.format(name=tmp_path.name)}")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "argv",
    [
        ["train", "dcnnet", "ds", "OUT"],
        ["evaluate", "a.nii.gz", "b.nii.gz", "--out", "OUT"],
        ["measure", "map.nii.gz", "--labels", "dseg.nii.gz", "--out", "OUT"],
        ["corrections", "init", "results", "OUT"],
    ],
    ids=lambda argv: argv[0],
)
def test_output_in_raw_data_is_refused(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    start_dataset(tmp_path / "ds")
    (tmp_path / "ds" / "sub-01" / "anat").mkdir(parents=True)
    before = contents(tmp_path)
    assert main(["ds/models" if word == "OUT" else word for word in argv]) == 2
    error = capsys.readouterr().err
    advice = "choose a folder outside it or below ds/derivatives"
    assert error == f"dgmseg {argv[0]}: error: models: inside the raw data of ds; {advice}\n"
    assert contents(tmp_path) == before


@pytest.fixture
def weighty(tmp_path, monkeypatch):
    """A model with one file of weights, whose checksum was made with sha256sum."""
    sha256_of_abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    weights = Weights(files={"segmenter.safetensors": sha256_of_abc}, licence="CC0", trained_on="nothing")
    monkeypatch.setitem(MODELS, "weighty", replace(get_model("default"), name="weighty", weights=weights))
    monkeypatch.setattr(verb_models, "weights_folder", lambda model: tmp_path)
    return tmp_path / "segmenter.safetensors"


def test_models_are_listed(weighty, capsys):
    weighty.write_bytes(b"abc" * 1_000_000)
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["model", *MODELS]
    assert lines[-1].split()[:6] == ["weighty", "DN,IN,RN,SN,STN,CN,PUT,GP", "3.0", "MB", "CC0", "nothing"]


@pytest.mark.parametrize(
    ("content", "code", "said"),
    [
        pytest.param(b"abc", 0, "ok", id="whole"),
        pytest.param(b"abd", 1, "expected ba7816bf", id="damaged"),
        pytest.param(None, 1, "missing, expected ba7816bf", id="missing"),
    ],
)
def test_weights_are_checked(weighty, capsys, content, code, said):
    if content is not None:
        weighty.write_bytes(content)
    assert main(["models", "check", "weighty"]) == code
    assert said in capsys.readouterr().out
