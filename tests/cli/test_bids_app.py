from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import bids_dgmseg
from bids_dgmseg import resources as machine
from bids_dgmseg.cli import bids_app as cli
from bids_dgmseg.cli.bids_app import main, read_config
from bids_dgmseg.errors import InputError

BASE = ("ds", "out", "participant")


def fails_with(code: int, *argv: str) -> bool:
    with pytest.raises(SystemExit) as stop:
        read_config([*BASE, *argv])
    return stop.value.code == code


def test_paths_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = read_config([*BASE, "--derivatives", "a", "../b", "-w", "work", "--bids-filter-file", "f.json"])
    assert config.bids_dir == tmp_path / "ds"
    assert config.output_dir == tmp_path / "out"
    assert config.selection.derivatives == (tmp_path / "a", tmp_path.parent / "b")
    assert config.control.work_dir == tmp_path / "work"
    assert config.selection.filter_file == tmp_path / "f.json"


def test_labels_have_no_prefix_or_duplicates():
    config = read_config(
        [*BASE, "--participant-label", "sub-01", "01", "02", "--session-label", "ses-a", "--participant-label", "03"]
    )
    assert config.selection.participants == ("01", "02", "03")
    assert config.selection.sessions == ("a",)


def test_options_may_be_spelled_with_underscores():
    config = read_config([*BASE, "--participant_label", "01", "--mem_gb=3", "--work_dir=/a_b"])
    assert (config.selection.participants, config.resources.mem_gb, config.control.work_dir) == (
        ("01",),
        3.0,
        Path("/a_b"),
    )


def test_flags_reach_the_configuration():
    plain = read_config(BASE)
    assert (
        plain.segmentation.masks,
        plain.segmentation.viewer,
        plain.control.force,
        plain.control.dry_run,
        plain.control.skip_bids_validation,
        plain.control.stop_on_first_crash,
    ) == (
        True,
        True,
        False,
        False,
        False,
        False,
    )
    flags = "--no-masks --no-viewer --force --dry-run --skip-bids-validation --stop-on-first-crash -vv --device cuda"
    given = read_config([*BASE, *flags.split()])
    assert (
        given.segmentation.masks,
        given.segmentation.viewer,
        given.control.force,
        given.control.dry_run,
        given.control.skip_bids_validation,
        given.control.stop_on_first_crash,
    ) == (
        False,
        False,
        True,
        True,
        True,
        True,
    )
    assert (given.control.verbose, given.resources.device) == (2, "cuda")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--merge", "sites"),
        ("--site-column", "scanner"),
        ("--group-column", "arm"),
        ("--control-filter", "age > 40"),
        ("--covariates", "sex"),
        ("--measures", "mean_ppm"),
        ("--evaluation", "evaluated"),
        ("--bootstrap", "100"),
    ],
)
def test_group_option_is_rejected_at_participant_level(option, value, capsys):
    assert main([*BASE, option, value]) == 2
    assert capsys.readouterr().err == (
        f"bids_dgmseg: error: {option} is only valid at the group level; omit it at the participant level\n"
    )


def test_model_alias_is_resolved():
    assert read_config(BASE).segmentation.model is None
    assert read_config([*BASE, "--model", "default"]).segmentation.model == "dgm16"


@pytest.mark.parametrize(
    "argv",
    [
        ("--nprocs", "0"),
        ("--nprocs", "two"),
        ("--omp-nthreads", "-1"),
        ("--mem-gb", "0"),
        ("--mem-gb", "inf"),
        ("--mem-gb", "nan"),
        ("--device", "tpu"),
        ("--participant-label", "sub-"),
        ("--participant-label", "sub_01"),
        ("--work-dir", ""),
        ("--particpant-label", "01"),
    ],
)
def test_invalid_option_exits_with_2(argv, capsys):
    assert fails_with(2, *argv)
    assert "bids_dgmseg: error: " in capsys.readouterr().err


def test_message_shows_the_invalid_number(capsys):
    assert fails_with(2, "--mem-gb", "lots")
    assert "argument --mem-gb: 'lots' is not a positive number" in capsys.readouterr().err


def test_unknown_model_and_weights_exit_with_2(capsys, tmp_path):
    assert main([*BASE, "--model", "unet"]) == 2
    assert main([*BASE, "--weights", str(tmp_path / "gone")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("bids_dgmseg: error: --model unet: no such model; choose from default, dgm16")
    assert lines[1] == f"bids_dgmseg: error: {tmp_path / 'gone'}: no such folder; check --weights"


def test_version(capsys):
    assert fails_with(0, "--version")
    assert capsys.readouterr().out == f"bids_dgmseg {bids_dgmseg.__version__}\n"


def test_resources_default_to_what_is_available(monkeypatch):
    monkeypatch.setattr(cli, "count_cpus", lambda: 12)
    monkeypatch.setattr(cli, "available_memory_gb", lambda: 10.0)
    config = read_config(BASE)
    assert (config.resources.nprocs, config.resources.omp_nthreads, config.resources.mem_gb) == (12, 8, 9.0)


def test_threads_never_exceed_nprocs():
    config = read_config([*BASE, "--nprocs", "3", "--omp-nthreads", "8"])
    assert (config.resources.nprocs, config.resources.omp_nthreads) == (3, 3)


def test_affinity_and_quota_limit_the_cpus(monkeypatch, tmp_path):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr(machine, "_own_cgroups", lambda: [tmp_path])
    assert machine.count_cpus() == 16
    (tmp_path / "cpu.max").write_text("350000 100000\n")
    assert machine.count_cpus() == 3
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert machine.count_cpus() == 16


def test_container_limit_counts_for_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "_free_bytes", lambda: 50_000_000_000)
    monkeypatch.setattr(machine, "_own_cgroups", lambda: [tmp_path])
    assert machine.available_memory_gb() == 50
    (tmp_path / "memory.max").write_text("4000000000\n")
    (tmp_path / "memory.current").write_text("1000000000\n")
    assert machine.available_memory_gb() == 3


def test_work_dir_defaults_to_the_temporary_folder():
    assert read_config(BASE).control.work_dir.is_relative_to(Path(tempfile.gettempdir()))


@pytest.mark.parametrize("code", [0, 1])
def test_exit_code_is_that_of_the_level(monkeypatch, code):
    monkeypatch.setattr("bids_dgmseg.workflow.participant.run_participant", lambda config: code)
    monkeypatch.setattr("bids_dgmseg.workflow.group.run_group", lambda config: code)
    assert main(["ds", "out", "participant", "--skip-bids-validation"]) == code
    assert main(["ds", "out", "group"]) == code


def test_input_error_is_one_line_and_exits_with_2(monkeypatch, capsys):
    def refuse(config):
        raise InputError("ds: wrong\n  and more")

    monkeypatch.setattr("bids_dgmseg.workflow.participant.run_participant", refuse)
    assert main(BASE) == 2
    assert capsys.readouterr().err == "bids_dgmseg: error: ds: wrong and more\n"


def test_interrupt_exits_with_130(monkeypatch, capsys):
    def interrupt(config):
        raise KeyboardInterrupt

    monkeypatch.setattr("bids_dgmseg.workflow.group.run_group", interrupt)
    assert main(["ds", "out", "group"]) == 130
    assert "interrupted" in capsys.readouterr().err


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


def test_help_imports_nothing_heavy():
    run = run_python(
        "import sys; from bids_dgmseg.cli.bids_app import build_parser; build_parser().format_help(); "
        "print(*sys.modules)"
    )
    heavy = {"torch", "nipype", "pandas", "bids", "matplotlib", "numpy", "nibabel", "scipy", "rich"}
    assert heavy & set(run.stdout.split()) == set()


def test_dry_run_writes_nothing_and_imports_no_torch(tmp_path):
    chi = tmp_path / "ds" / "sub-01" / "anat" / "sub-01_Chimap.nii.gz"
    chi.parent.mkdir(parents=True)
    chi.touch()
    (tmp_path / "ds" / "dataset_description.json").write_text(json.dumps({"Name": "x", "BIDSVersion": "1.10.0"}))
    argv = [str(tmp_path / "ds"), str(tmp_path / "out"), "participant", "--dry-run", "-w", str(tmp_path / "work")]
    run = run_python(
        f"import sys; from bids_dgmseg.cli.bids_app import main; code = main({argv!r}); "
        "print(code, 'torch' in sys.modules)"
    )
    assert run.stdout.splitlines()[-1] == "0 False"
    assert "sub-01: " in run.stdout
    assert not (tmp_path / "out").exists()


def test_package_runs_as_a_program():
    run = subprocess.run([sys.executable, "-m", "bids_dgmseg", "--version"], capture_output=True, text=True, check=True)
    assert run.stdout == f"bids_dgmseg {bids_dgmseg.__version__}\n"
