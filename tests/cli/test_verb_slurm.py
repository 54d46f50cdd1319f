import json
import os
import subprocess
from pathlib import Path

import pytest

from bids_dgmseg.cli.main import main


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Two participants; the map of the second is a link out of the dataset."""
    root = tmp_path / "my 'data'"
    for name in ("sub-01", "sub-02"):
        (root / name / "anat").mkdir(parents=True)
    (root / "sub-01" / "anat" / "sub-01_Chimap.nii.gz").touch()
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "key.nii.gz").touch()
    (root / "sub-02" / "anat" / "sub-02_Chimap.nii.gz").symlink_to(tmp_path / "store" / "key.nii.gz")
    (root / "dataset_description.json").write_text(json.dumps({"Name": "x", "BIDSVersion": "1.10.0"}))
    return root


def run_script(script: Path, program: str, tmp_path: Path) -> list[str]:
    """Run a script with another `program` on the path, and return its arguments."""
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin" / program
    fake.write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" >"{tmp_path}/arguments"\n')
    fake.chmod(0o755)
    environment = {"PATH": f"{fake.parent}:{os.environ['PATH']}", "TMPDIR": str(tmp_path), "SLURM_ARRAY_TASK_ID": "2"}
    subprocess.run(["bash", script], env=environment, check=True)
    return (tmp_path / "arguments").read_text().splitlines()


def test_task_runs_its_participant_in_the_container(tmp_path, dataset, capsys):
    (tmp_path / "image.sif").touch()
    out = tmp_path / "out"
    options = ["--container", str(tmp_path / "image.sif"), "--options=--model dgm24 --phase-sign positive"]
    assert main(["slurm", str(dataset), str(out), *options]) == 0
    submit = capsys.readouterr().out.splitlines()[-2:]
    assert submit[0] == f"job=$(sbatch --parsable {out}/logs/slurm/participant.sh)"
    assert "#SBATCH --array=1-2\n" in (out / "logs" / "slurm" / "participant.sh").read_text()
    words = run_script(out / "logs" / "slurm" / "participant.sh", "apptainer", tmp_path)
    assert [f"{path}:{path}:ro" in words for path in (dataset, tmp_path / "store")] == [True, True]
    assert words[words.index("participant") - 2 :][:5] == [
        str(dataset),
        str(out),
        "participant",
        "--participant-label",
        "02",
    ]
    assert words[-4:] == ["--model", "dgm24", "--phase-sign", "positive"]
    assert not list(tmp_path.glob("tmp.*"))


def test_invalid_option_is_rejected_before_anything_is_written(tmp_path, dataset, capsys):
    assert main(["slurm", str(dataset), str(tmp_path / "out"), "--options=--measures mean_ppm"]) == 2
    assert "--measures is only valid at the group level" in capsys.readouterr().err
    assert main(["slurm", str(dataset), str(tmp_path / "out"), "--container", "none.sif"]) == 2
    assert "none.sif: no such image; check --container" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
