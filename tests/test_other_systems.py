"""Linux without what macOS and Windows lack: the package imports, both programs start, the app and the API segment.

On macOS and Windows themselves the same is tested with nothing taken away (.github/workflows/tests.yml): paths with a
drive, or files that cannot be renamed while they are open, can only be seen there.
"""

import csv
import subprocess
import sys

import pytest

from bids_dgmseg.phantom.head import PHANTOM

_TAKE_AWAY = '''
import builtins, multiprocessing, os, signal, sys
from multiprocessing import forkserver

import filelock, matplotlib.pyplot, nilearn.plotting, psutil, skimage.measure, statsmodels.api, torch
import bids.layout, nipype.pipeline.engine, nipype.pipeline.plugins
import nnunetv2.inference.predict_from_raw_data, nnunetv2.training.nnUNetTrainer.nnUNetTrainer

for name in (
    "os.sched_getaffinity",  # nor on macOS
    *("os.geteuid", "os.getuid", "os.sysconf", "os.posix_spawn", "os.fork", "os.killpg"),
    *("signal.SIGHUP", "signal.SIGKILL", "signal.pthread_sigmask"),
):
    module, _, attribute = name.partition(".")
    delattr(sys.modules[module], attribute)
signal.SIGBREAK = 21
multiprocessing.get_all_start_methods = lambda: ["spawn"]
forkserver.ForkServer.ensure_running = None
without = {"fcntl", "grp", "pwd", "resource", "termios"}
import_any = builtins.__import__

def import_there(name, globals=None, *args, **kwargs):
    if name in without and (globals or {}).get("__name__", "").startswith("bids_dgmseg"):
        raise ModuleNotFoundError(f"No module named {name!r}")
    return import_any(name, globals, *args, **kwargs)

def hide_linux_files(event, args):
    """Libraries for Linux read them, too, so that only the package's own reading fails."""
    if event == "open" and str(args[0]).startswith(("/proc/", "/sys/")):
        frame = sys._getframe(1)
        while frame and frame.f_globals.get("__name__") in ("pathlib", "pathlib._local", "io"):
            frame = frame.f_back
        if frame and frame.f_globals.get("__name__", "").startswith("bids_dgmseg"):
            raise FileNotFoundError(2, "No such file", args[0])

builtins.__import__ = import_there
sys.addaudithook(hide_linux_files)
'''
_START = """
import importlib, pkgutil, sys
from pathlib import Path

import bids_dgmseg
modules = [one.name for one in pkgutil.walk_packages(bids_dgmseg.__path__, "bids_dgmseg.")]
assert len(modules) > 100
for name in modules:
    if not name.endswith("__main__"):
        importlib.import_module(name)

from bids_dgmseg.cli import bids_app, main
for program in (bids_app, main):
    try:
        program.main(["--help"])
    except SystemExit as end:
        assert end.code == 0
"""
_SEGMENT = """
from bids_dgmseg.models.registry import MODELS
from tests.oracle import oracle_model
MODELS["oracle"] = oracle_model()

from bids_dgmseg import segment
from bids_dgmseg.cli.bids_app import main
dataset, out = sys.argv[1:]
options = ["--model", "oracle", "--skip-bids-validation", "--no-viewer", "--nprocs", "2"]
assert main([dataset, out, "participant", *options]) == 0
assert main([dataset, out, "participant", *options]) == 0
assert main([dataset, out, "group", "--model", "oracle"]) == 0
table = segment(Path(dataset, "sub-01", "anat", "sub-01_Chimap.nii.gz"), "oracle").table
table.to_csv(Path(out, "api.tsv"), sep="\\t", index=False)
"""


def test_app_and_api_segment_without_posix(bids_dataset, tmp_path):
    """Volumes are those of the phantom, 4/3 pi a b c, whichever way they were measured."""
    dataset, out = bids_dataset("sub-01"), tmp_path / "out"
    missing = _TAKE_AWAY if sys.platform == "linux" else ""
    command = [sys.executable, "-c", missing + _START + _SEGMENT, str(dataset), str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: bids_dgmseg" in done.stdout
    assert "usage: dgmseg" in done.stdout
    for path in (out / "api.tsv", out / "sub-01/anat/sub-01_seg-oracle_stats.tsv"):
        with path.open(encoding="utf-8") as file:
            rows = {row["abbreviation"]: float(row["volume_mm3"]) for row in csv.DictReader(file, delimiter="\t")}
        assert rows["CN_L"] == pytest.approx(PHANTOM.volumes_mm3["CN_L"], rel=0.03)  # voxels of 2.5 mm
    assert (out / "group.html").is_file()
