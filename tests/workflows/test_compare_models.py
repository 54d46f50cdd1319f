"""The comparison of models, on phantoms and with the oracle."""

import csv

import pytest

from bids_dgmseg.errors import InputError
from bids_dgmseg.models.registry import MODELS
from bids_dgmseg.phantom.demo import DemoScan, write_demo
from tests.oracle import oracle_model


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Two coarse phantoms with their labels."""
    root = tmp_path_factory.mktemp("compare") / "ds"
    list(write_demo(root, [DemoScan("01", None, (2.5,) * 3), DemoScan("02", None, (2.5,) * 3, axes="LPS")]))
    return root


class HerePool:
    """Runs jobs in this process, since others do not know the oracle."""

    def __init__(self, *args, **options):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def submit(self, function, *args):
        result = function(*args)
        return type("Future", (), {"result": staticmethod(lambda: result)})


@pytest.fixture
def models(script, monkeypatch):
    """The oracle and a model that finds nothing."""
    for name, predictor in (("oracle", "Oracle"), ("blind", "Blind")):
        monkeypatch.setitem(MODELS, name, oracle_model(name, predictor))
    monkeypatch.setattr(script, "ProcessPoolExecutor", HerePool)
    monkeypatch.setattr(script, "limit_threads", lambda count: None)


def read_models(out):
    with (out / "models.tsv").open(encoding="utf-8") as file:
        return {row["model"]: row for row in csv.DictReader(file, delimiter="\t")}


@pytest.mark.slow
def test_models_are_compared(script, dataset, models, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    command = [str(dataset), str(out), "--models", "oracle", "blind"]
    assert script.main(command) == 0
    rows = read_models(out)
    assert float(rows["oracle"]["dice"]) > 0.75  # a model of 2 mm voxels on a grid of 2.5 mm
    assert (rows["oracle"]["n_missed"], rows["oracle"]["n_scans"]) == ("0", "2")
    assert float(rows["oracle"]["seconds"]) > 0
    assert (float(rows["blind"]["dice"]), rows["blind"]["n_missed"], rows["blind"]["hd95_mm"]) == (0, "32", "n/a")
    assert (out / "evaluation" / "methods.tsv").is_file()
    assert f"open {out / 'evaluation' / 'evaluate.html'}" in capsys.readouterr().out
    monkeypatch.setattr(script, "_segment", lambda *args: pytest.fail("segmented again"))
    assert script.main(command) == 0


def test_failed_scans_are_counted(script, dataset, models, tmp_path, monkeypatch, capsys):
    segment = script._segment

    def fail(chi, candidate, scan, settings, located):
        if scan.participant == "02":
            raise InputError("no brain found")
        return segment(chi, candidate, scan, settings, located)

    monkeypatch.setattr(script, "_segment", fail)
    assert script.main([str(dataset), str(tmp_path / "out"), "--models", "oracle"]) == 1
    assert "failed: oracle: sub-02: no brain found" in capsys.readouterr().out
    row = read_models(tmp_path / "out")["oracle"]
    assert (row["n_scans"], row["n_failed"]) == ("1", "1")
    command = [str(dataset), str(tmp_path / "other"), "--models", "oracle", "--participant-label"]
    assert script.main([*command, "02"]) == 2
    assert "no scan could be segmented: oracle: sub-02: no brain found" in capsys.readouterr().err
    assert script.main([*command, "09"]) == 2
    assert "no labelled scan of these participants" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (["nonesuch"], "nonesuch: no such model"),
        (["dgm16=nowhere"], "no such folder; check the folder passed for dgm16"),
        (["multiatlas"], "multiatlas: no atlases; pass a labelled dataset as `atlases`"),
        (["dgm16", "dgm16"], "dgm16: two models would be named dgm16"),
    ],
)
def test_invalid_candidate_is_an_error(script, models, message):
    with pytest.raises(InputError, match=message):
        script.parse_candidates(models)
