from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import bids_dgmseg
from bids_dgmseg.arguments import flag_of, non_negative_float, positive_float, positive_int
from bids_dgmseg.cli import bids_app
from bids_dgmseg.cli.bids_app import main, read_config
from bids_dgmseg.config import Resources

BASE = ("ds", "out", "participant")
NUMBERS = (non_negative_float, positive_float, positive_int)


def run_python(*arguments: str) -> str:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True).stdout


def test_paths_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = read_config([*BASE, "--derivatives", "a", "../b", "-w", "work", "--bids-filter-file", "f.json"])
    assert (config.bids_dir, config.output_dir) == (tmp_path / "ds", tmp_path / "out")
    assert config.selection.derivatives == (tmp_path / "a", tmp_path.parent / "b")
    assert config.selection.filter_file == tmp_path / "f.json"
    assert config.control.work_dir == tmp_path / "work"


def test_labels_have_no_prefix_or_duplicates():
    labels = ["--participant-label", "sub-01", "01", "02", "--session-label", "ses-a", "--participant-label", "03"]
    selection = read_config([*BASE, *labels]).selection
    assert (selection.participants, selection.sessions) == (("01", "02", "03"), ("a",))


@pytest.mark.parametrize(("words", "extent"), [([], ""), (["--prove"], "short"), (["--prove", "full"], "full")])
def test_extent_of_the_proof_may_be_left_out(words, extent):
    assert read_config([*BASE, *words]).segmentation.prove == extent


def test_options_may_be_spelled_with_underscores():
    config = read_config([*BASE, "--participant_label", "01", "--mem_gb=3", "--work_dir=/a_b"])
    assert (config.selection.participants, config.resources.mem_gb) == (("01",), 3.0)
    assert config.control.work_dir == Path("/a_b")


@pytest.mark.parametrize("level", ["participant", "group"])
def test_options_of_the_other_level_are_rejected(level, capsys):
    for other, item in bids_app.list_options():
        if other in (None, level):
            continue
        action = next(action for action in bids_app.build_parser()._actions if flag_of(item) in action.option_strings)
        value = (
            []
            if action.nargs == 0
            else ["MNI152NLin2009cAsym"]
            if item.name == "output_space"
            else [str(next(iter(action.choices or ["T1map"])))]
        )
        assert main(["ds", "out", level, flag_of(item), *(["1"] if action.type in NUMBERS else value)]) == 2, item
        message = f"{flag_of(item)} is only valid at the {other} level; omit it at the {level} level"
        assert capsys.readouterr().err == f"bids_dgmseg: error: {message}\n"


def test_help_shows_the_options_of_both_levels_or_of_one(capsys):
    options = ("--nprocs", "--weights", "--measures")
    for words, shown in ([], "--nprocs"), (["participant"], "--weights"), (["ds", "out", "group"], "--measures"):
        with pytest.raises(SystemExit, match=r"^0$"):
            read_config([*words, "--help"])
        text = capsys.readouterr().out
        assert [name for name in options if name in text] == [shown]


def test_option_is_known_to_four_files():
    """A new option costs its field and the places that use it."""
    package = Path(bids_dgmseg.__file__).parent
    for name in ("skip_bids_validation", "accept_implausible"):
        files = [path for path in package.rglob("*.py") if re.search(rf"\b{name}\b", path.read_text(encoding="utf-8"))]
        assert len(files) <= 4, (name, files)


def test_model_alias_is_resolved():
    assert read_config(BASE).segmentation.model is None
    assert read_config([*BASE, "--model", "default"]).segmentation.model == "dgm16"


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--nprocs", "two", "'two' is not a positive integer"),
        ("--mem-gb", "inf", "'inf' is not a positive number"),
        ("--participant-label", "sub-", "'sub-' is not a label (letters and digits, with or without sub-)"),
        ("--work-dir", "", "an empty path"),
        (
            "--particpant_label",
            "01",
            "unrecognized arguments: --particpant-label 01\ndid you mean --participant-label?",
        ),
    ],
)
def test_invalid_option_exits_with_2(option, value, message, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        read_config([*BASE, option, value])
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 2


def test_resources_default_to_what_is_available(monkeypatch):
    monkeypatch.setattr(bids_app, "count_cpus", lambda: 12)
    monkeypatch.setattr(bids_app, "available_memory_gb", lambda: 10.0)
    assert read_config(BASE).resources == Resources(nprocs=12, omp_nthreads=1, mem_gb=9.0)


def test_dry_run_writes_nothing_and_imports_no_torch(tmp_path):
    chi = tmp_path / "ds" / "sub-01" / "anat" / "sub-01_Chimap.nii.gz"
    chi.parent.mkdir(parents=True)
    chi.touch()
    (tmp_path / "ds" / "dataset_description.json").write_text(json.dumps({"Name": "x", "BIDSVersion": "1.10.0"}))
    argv = [str(tmp_path / "ds"), str(tmp_path / "out"), "participant", "--dry-run", "-w", str(tmp_path / "work")]
    code = f"import sys; from bids_dgmseg.cli.bids_app import main; code = main({argv!r})"
    out = run_python("-c", f"{code}; print(code, 'torch' in sys.modules)")
    assert out.splitlines()[-1] == "0 False"
    assert "sub-01: would segment " in out
    assert not (tmp_path / "out").exists()
