from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator

import pytest

from bids_dgmseg.config import RunConfig, RunControl
from bids_dgmseg.errors import InputError
from bids_dgmseg.io.files import remove_temporary_files
from bids_dgmseg.run.environment import LOG_NAME, log_to, run_folder, terminate_as_interrupt
from bids_dgmseg.run.plan import check_folders
from tests.conftest import start_dataset


def test_logs_and_warnings_go_only_to_the_file(tmp_path, capfd):
    with log_to(tmp_path):
        logging.getLogger("nipype.workflow").warning("a node is slow")
        logging.getLogger("nibabel.global").warning("sizeof_hdr should be 348")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("mean of empty slice", RuntimeWarning, stacklevel=1)
    text = (tmp_path / LOG_NAME).read_text()
    assert "nipype.workflow WARNING: a node is slow" in text
    assert "nibabel.global WARNING: sizeof_hdr should be 348" in text
    assert "RuntimeWarning: mean of empty slice" in text
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def raw(tmp_path):
    (tmp_path / "ds").mkdir()
    return tmp_path / "ds"


def check(raw, out="../out", work="../work"):
    """Check an output and a working directory, relative to the dataset."""
    control = RunControl(work_dir=(raw / work).resolve())
    check_folders(RunConfig(bids_dir=raw, output_dir=(raw / out).resolve(), control=control))


@pytest.mark.parametrize("place", [".", "sub-01/anat/out"])
def test_output_in_the_raw_data_is_rejected(raw, place):
    with pytest.raises(InputError, match="output directory is inside the raw dataset"):
        check(raw, place)


@pytest.mark.parametrize(
    ("place", "message"), [("work", "is inside the raw dataset"), ("../out/work", "is inside the output directory")]
)
def test_work_dir_in_other_data_is_rejected(raw, place, message):
    with pytest.raises(InputError, match=f"^work: `work_dir` {message}"):
        check(raw, work=place)


def test_run_folders_are_separate_and_private(tmp_path):
    with run_folder(tmp_path / "work") as folder, run_folder(tmp_path / "work") as other:
        assert folder != other
        assert folder.stat().st_mode & 0o777 == 0o700
        (other / "sub-01").mkdir()  # of a failed scan
    assert list((tmp_path / "work").glob("[!.]*")) == [other]
    with run_folder(tmp_path / "work"):  # the next run
        assert not other.exists()


def test_workers_need_neither_a_temporary_folder_of_the_system_nor_home(tmp_path):
    """On a read-only file system, only the output and the working directory can be written."""
    (tmp_path / "home").mkdir()
    for scan in ("sub-01", "sub-02"):
        (tmp_path / "ds" / scan / "anat").mkdir(parents=True)
        (tmp_path / "ds" / scan / "anat" / f"{scan}_Chimap.nii.gz").touch()
    start_dataset(tmp_path / "ds")
    code = (
        "import os, sys, tempfile; tempfile._candidate_tempdir_list = lambda: [os.environ[name] for name in ['TMPDIR'] "
        "if name in os.environ]; from bids_dgmseg.cli.bids_app import main; sys.exit(main(sys.argv[1:]))"
    )
    run = [sys.executable, "-c", code, tmp_path / "ds", tmp_path / "out", "participant", "--nprocs", "2"]
    others = ("TMPDIR", "TEMP", "TMP", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "MPLCONFIGDIR")
    environment = {name: value for name, value in os.environ.items() if name not in others}
    environment["HOME"] = str(tmp_path / "home")
    done = subprocess.run([*run, "-w", tmp_path / "work"], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (1, False), done.stderr
    assert "2 of 2 scan(s) failed" in done.stderr  # both maps are empty: each worker has read one
    assert list((tmp_path / "home").iterdir()) == []


def test_run_without_a_temporary_folder_names_the_option(monkeypatch):
    monkeypatch.setattr("bids_dgmseg.run.environment._temporary_folder", lambda: None)
    message = "temporary folder cannot be written; choose another folder with -w$"
    with pytest.raises(InputError, match=message), run_folder(None):
        pass


@pytest.mark.parametrize(("mode", "is_safe"), [(0o777, False), (0o1777, True)])
def test_work_dir_that_anyone_can_change_is_rejected(tmp_path, mode, is_safe):
    tmp_path.chmod(mode)
    message = "other users could replace intermediate files in it"
    with contextlib.nullcontext() if is_safe else pytest.raises(InputError, match=message), run_folder(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_planted_configuration_is_not_read(tmp_path):
    """A shared work folder, and the current folder, with configuration and a module of another user."""
    for folder in (tmp_path, tmp_path / "nipype", tmp_path / "matplotlib"):
        folder.mkdir(exist_ok=True)
        (folder / "nipype.cfg").write_text("[execution]\nhash_method = planted\n")
        (folder / "matplotlibrc").write_text("lines.linewidth: 77\n")
        (folder / "signal.py").write_text("raise SystemExit('planted')\n")
    code = """
import os, subprocess, sys
from pathlib import Path
from bids_dgmseg.run.environment import ignore_current_folder, run_folder
with ignore_current_folder(), run_folder(Path(sys.argv[1])):
    import matplotlib
    from nipype import config
    print(config.get("execution", "hash_method"), matplotlib.rcParams["lines.linewidth"])
    subprocess.run([sys.executable, "-c", "import signal"], check=True)
print(os.getcwd())
"""
    script = tmp_path / "scripts" / "program.py"
    script.parent.mkdir()
    script.write_text(code)
    command = [sys.executable, str(script), str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["timestamp", "1.5", str(tmp_path)], done.stderr


PROGRAM = """
import sys, time
from pathlib import Path
from bids_dgmseg.errors import run_command
from bids_dgmseg.io.files import atomic_write
from bids_dgmseg.run.environment import run_folder, terminate_as_interrupt

def work():
    with run_folder(Path(sys.argv[1])), atomic_write(Path(sys.argv[2])):
        print("ready", flush=True)
        while True:
            time.sleep(0.1)  # a signal that arrives just before a long sleep would be handled after it

with terminate_as_interrupt():
    sys.exit(run_command("run", work))
"""


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Start a process with a folder in ``work`` that writes ``out/x``."""
    processes = []

    def call() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", PROGRAM, str(tmp_path / "work"), str(tmp_path / "out" / "x")]
        processes.append(subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
        assert processes[-1].stdout is not None
        assert processes[-1].stdout.readline() == "ready\n"
        return processes[-1]

    yield call
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGHUP, 129), (signal.SIGTERM, 130)])
def test_terminated_run_leaves_nothing(start, tmp_path, number, code):
    process = start()
    process.send_signal(number)
    assert process.communicate()[1] == "run: interrupted\n"
    assert process.returncode == code
    assert [*(tmp_path / "work").iterdir(), *(tmp_path / "out").iterdir()] == []


def test_nohup_is_respected(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with terminate_as_interrupt():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_next_run_removes_only_what_killed_runs_left(start, tmp_path):
    killed = start()
    killed.kill()
    killed.wait()
    (abandoned,) = (tmp_path / "work").glob("[!.]*")
    (half_written,) = (tmp_path / "out").iterdir()
    os.utime(half_written, (0, 0))
    start()  # a living run, which removes the folder of the killed one
    assert not abandoned.exists()
    in_use = set((tmp_path / "work").glob("[!.]*"))
    remove_temporary_files(tmp_path / "out")
    with run_folder(tmp_path / "work") as folder:
        assert set((tmp_path / "work").glob("[!.]*")) == {folder, *in_use}
    assert len(in_use) == len(list((tmp_path / "out").iterdir())) == 1
    assert not half_written.exists()
