"""Nipype's plugins for schedulers; what Slurm itself does was tried on a cluster."""

import os
import sys
from pathlib import Path

import pytest

from bids_dgmseg.config import RunControl
from bids_dgmseg.errors import InputError
from bids_dgmseg.workflow.batch_jobs import read_plugin_file


@pytest.fixture
def control(tmp_path):
    """Return a function that writes the file."""

    def write(text: str, work_dir: Path | None = Path("/scratch")) -> RunControl:
        path = tmp_path / "plugin.yml"
        path.write_text(text)
        return RunControl(work_dir, plugin_file=path)

    return write


@pytest.mark.parametrize(
    "text",
    [
        "plugin: SLURM\nplugin_args:\n  sbatch_args: --account=a --mem=4G\n  max_jobs: 3\n",
        '{"plugin": "SLURM", "plugin_args": {"sbatch_args": "--account=a --mem=4G", "max_jobs": 3}}',
    ],
)
def test_yaml_and_json_are_read(control, text):
    given = read_plugin_file(control(text))
    assert (given.plugin, given.plugin_args) == ("SLURM", {"sbatch_args": "--account=a --mem=4G", "max_jobs": 3})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("plugin: SLURMGraph", "reports neither results nor failures; use SLURM"),
        ("plugin: MultiProc", "'MultiProc' does not submit jobs; use SLURM, SGE"),
        ("plugin: [", "not a Nipype plugin file"),
        ("plugin: !!python/object/apply:os.system [touch x]", "not a Nipype plugin file"),
        ("{}", "missing required field `plugin`"),
        ("plugin: SLURM\nplugin_args: {sbatch_args: '-A a; touch x'}", "contains ';'"),
        ("plugin: SLURM\nplugin_args: {sbatch_args: '$(touch x)'}", r"contains '\$'"),
        ("plugin: SLURM\nplugin_args: {status_callback: x}", "unknown plugin_args 'status_callback'"),
        ("plugin: SLURM\nplugin_args: {qsub_args: -q x}", "unknown plugin_args 'qsub_args' of SLURM"),
    ],
)
def test_other_plugins_and_shell_syntax_are_rejected(control, text, message):
    with pytest.raises(InputError, match=message):
        read_plugin_file(control(text))


@pytest.mark.parametrize(("work_dir", "message"), [(None, "set one with -w"), (Path("/my work"), "contains ' '")])
def test_jobs_need_a_shared_folder(control, work_dir, message):
    with pytest.raises(InputError, match=message):
        read_plugin_file(control("plugin: SLURM", work_dir))


SBATCH = """#!/bin/bash
echo "$*" >>"$0.log"
for script; do :; done
bash "$script" >"$script.out" 2>&1
echo "Submitted batch job 7"
"""


def test_error_of_a_job_is_reported(bids_dataset, run, tmp_path, monkeypatch, capsys):
    """The job runs in bash at once; whole runs were tried on a one-node Slurm, because each job imports torch."""
    dataset, folder = bids_dataset("sub-01"), tmp_path / "bin"
    next(dataset.rglob("sub-01_Chimap.nii.gz")).write_bytes(b"damaged")
    folder.mkdir()
    for name, text in (("sbatch", SBATCH), ("squeue", "#!/bin/bash\n")):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (tmp_path / "plugin.yml").write_text("plugin: SLURM\nplugin_args: {sbatch_args: --account=lab}\n")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.delenv("LOGNAME", raising=False)
    assert run(dataset, "--nipype-plugin-file", str(tmp_path / "plugin.yml")) == 1
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("sub-01_Chimap.nii.gz: cannot be read as NIfTI ")
    assert last.startswith("1 of 1 scan failed: sub-01; see ")
    (call,) = (folder / "sbatch.log").read_text().splitlines()
    assert call.startswith("--account=lab --cpus-per-task=1 --mem=")
