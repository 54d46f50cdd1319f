"""The Slurm script, with a scheduler that runs each task immediately."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "workflows" / "slurm.sh"

SBATCH = r"""#!/usr/bin/env bash
echo "$*" >>"$FAKE/sbatch.log"
while [[ $1 == --* ]]; do
    case $1 in
        --array=*) tasks=${1#--array=1-} ;;
        --cpus-per-task=*) export SLURM_CPUS_PER_TASK=${1#*=} ;;
    esac
    shift
done
script=$1
shift
if [ -n "${tasks:-}" ]; then
    export SLURM_ARRAY_TASK_COUNT=${tasks%\%*}
    for SLURM_ARRAY_TASK_ID in $(seq "$SLURM_ARRAY_TASK_COUNT"); do
        SLURM_ARRAY_TASK_ID=$SLURM_ARRAY_TASK_ID "$script" "$@" >&2
    done
    echo "41;cluster"
else
    "$script" "$@" >&2
    echo 42
fi
"""
APP = r"""#!/usr/bin/env bash
if [[ " $* " == *" --dry-run "* ]]; then exec "$PYTHON" -m bids_dgmseg "$@"; fi
echo "$*" >>"$FAKE/app.log"
"""


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    root = tmp_path / "my data"
    for scan in (
        "sub-01/ses-1/anat/sub-01_ses-1",
        "sub-01/ses-2/anat/sub-01_ses-2",
        "sub-02/anat/sub-02",
        "sub-10/anat/sub-10",
    ):
        chi = root / f"{scan}_Chimap.nii.gz"
        chi.parent.mkdir(parents=True)
        chi.touch()
    (root / "dataset_description.json").write_text(json.dumps({"Name": "x", "BIDSVersion": "1.10.0"}))
    return root


@pytest.fixture
def submit(tmp_path, dataset):
    """Run the script with a fake scheduler; return the process and the calls of app and scheduler."""
    fake = tmp_path / "bin"
    fake.mkdir()
    for name, text in (("sbatch", SBATCH), ("bids_dgmseg", APP)):
        (fake / name).write_text(text)
        (fake / name).chmod(0o755)

    def call(*options: str, **environment: str) -> tuple[subprocess.CompletedProcess[str], list[str], list[str]]:
        variables = {**os.environ, "PATH": f"{fake}:{os.environ['PATH']}", "FAKE": str(fake), "PYTHON": sys.executable}
        command = [str(SCRIPT), str(dataset), str(tmp_path / "out"), *options]
        run = subprocess.run(
            command,
            env={**variables, "SCRATCH_DIR": str(tmp_path), **environment},
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
        )
        logs = [fake / "app.log", fake / "sbatch.log"]
        app, sbatch = (log.read_text().splitlines() if log.is_file() else [] for log in logs)
        return run, app, sbatch

    return call


def labels_of(call: str) -> list[str]:
    return call.partition("--participant-label ")[2].partition(" --")[0].split()


def test_each_participant_is_a_task(submit):
    run, app, sbatch = submit("--no-masks")
    assert run.returncode == 0, run.stderr
    assert [labels_of(call) for call in app[:-1]] == [["01"], ["02"], ["10"]]
    assert all("--nprocs 2 --mem-gb 7.2 -w " in call and call.endswith(" --no-masks") for call in app[:-1])
    assert app[-1].endswith(" group")
    assert "--array=1-3%50" in sbatch[0]
    assert "--dependency=afterany:41 " in sbatch[1]
    assert "3 participants in array 41 (3 tasks), group level in job 42" in run.stdout


def test_participant_with_invalid_files_has_a_task(submit, dataset):
    (dataset / "sub-02" / "anat" / "sub-02_Chimap.json").write_text("{")
    _, app, _ = submit()
    assert [labels_of(call) for call in app[:-1]] == [["01"], ["02"], ["10"]]


def test_participant_with_echoes_has_a_task(submit, dataset):
    anat = dataset / "sub-03" / "anat"
    anat.mkdir(parents=True)
    for part in ("phase", "mag"):
        stem = anat / f"sub-03_echo-1_part-{part}_MEGRE"
        stem.with_suffix(".nii.gz").touch()
        stem.with_suffix(".json").write_text(json.dumps({"EchoTime": 0.005, "MagneticFieldStrength": 3}))
    run, app, _ = submit(PARTICIPANTS="03")
    assert [labels_of(call) for call in app[:-1]] == [["03"]]
    assert "1 participant in array 41 (1 task), group" in run.stdout


def test_participants_share_the_allowed_tasks(submit):
    _, app, sbatch = submit(MAX_TASKS="2")
    assert "--array=1-2%50" in sbatch[0]
    assert [labels_of(call) for call in app[:-1]] == [["01", "10"], ["02"]]


def test_participants_are_selected(submit):
    _, app, _ = submit(PARTICIPANTS="02 sub-10")
    assert [labels_of(call) for call in app[:-1]] == [["02"], ["10"]]


def test_resources_reach_scheduler_and_app(submit):
    _, app, sbatch = submit(CPUS="4", MEM_GB="10", TIME="00:10:00", SBATCH="sbatch --partition=short", AT_ONCE="7")
    assert all(word in sbatch[0] for word in ("--partition=short", "--mem=10G", "--time=00:10:00", "%7"))
    assert "--nprocs 4 --mem-gb 9 " in app[0]


def test_a_task_leaves_no_intermediate_files(submit, tmp_path):
    submit()
    assert list(tmp_path.glob("bids_dgmseg.*")) == []


def test_invalid_dataset_or_option_submits_nothing(submit, dataset):
    run, app, sbatch = submit("--participant-label", "01")
    assert (run.returncode, app, sbatch) == (2, [], [])
    assert "PARTICIPANTS=" in run.stderr
    (dataset / "dataset_description.json").unlink()
    run, app, sbatch = submit()
    assert (run.returncode, app, sbatch) == (2, [], [])
    assert "dataset_description.json not found" in run.stderr
