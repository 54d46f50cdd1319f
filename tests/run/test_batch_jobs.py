"""Scripts for clusters, rendered and run in bash; what Slurm itself does was tried on a cluster."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from bids_dgmseg.cli.main import main
from bids_dgmseg.run.batch_jobs import find_mounts, find_tasks


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    root = tmp_path / "my 'data'"
    for name in ("sub-01/ses-1/anat/sub-01_ses-1", "sub-01/ses-2/anat/sub-01_ses-2", "sub-02/anat/sub-02"):
        chi = root / f"{name}_Chimap.nii.gz"
        chi.parent.mkdir(parents=True)
        chi.touch()
    (root / "dataset_description.json").write_text(json.dumps({"Name": "x", "BIDSVersion": "1.10.0"}))
    return root


@pytest.fixture
def programs(tmp_path: Path, monkeypatch) -> Path:
    """Folder at the start of PATH; `squeue` prints the file ``queue`` in it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "queue").touch()
    (folder / "squeue").write_text(f"#!/bin/bash\ncat {folder}/queue\n")
    (folder / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def write(tmp_path: Path, dataset: Path, *options: str) -> Path:
    """Run `dgmseg slurm` and return the new folder of scripts."""
    before = set((tmp_path / "out").glob("logs/jobs-*"))
    assert main(["slurm", str(dataset), str(tmp_path / "out"), *options]) == 0
    (folder,) = set((tmp_path / "out").glob("logs/jobs-*")) - before
    return folder


def run_task(folder: Path, tmp_path: Path, *, program: str, **variables: str) -> tuple[int, list[str], Path]:
    """Run ``participant.sh`` with another program instead of Python; return exit code, its arguments and scratch."""
    fake, scratch, script = tmp_path / "program", tmp_path / "scratch", folder / "participant.sh"
    fake.write_text(f'#!/bin/bash\nprintf "%s\\0" "$@" >"{tmp_path}/arguments"\n{program}\n')
    fake.chmod(0o755)
    text = re.sub(r"^\S+ -P -m bids_dgmseg", f"{fake} -P -m bids_dgmseg", script.read_text(), flags=re.MULTILINE)
    script.write_text(text)
    environment = {"PATH": os.environ["PATH"], "TMPDIR": str(scratch), **variables}
    done = subprocess.run(["bash", script], env=environment, capture_output=True, text=True, check=False)
    arguments = tmp_path / "arguments"
    return done.returncode, arguments.read_text().split("\0")[:-1] if arguments.exists() else [], scratch


def test_task_runs_its_participants_with_every_option(tmp_path, dataset, programs):
    condition = 'group == "HC" and age > 40; $(touch x)'
    options = ["--no-masks", "--derivatives", str(dataset), "--control-filter", condition, "--cpus", "4"]
    folder = write(tmp_path, dataset, *options, "--mem", "10G", "--max-tasks", "1")
    code, words, scratch = run_task(folder, tmp_path, program="exit 3", SLURM_ARRAY_TASK_ID="1")
    assert code == 3
    assert words[:7] == [
        "-P",
        "-m",
        "bids_dgmseg",
        str(dataset),
        str(tmp_path / "out"),
        "participant",
        "--participant-label",
    ]
    assert words[7:10] == ["01", "02", "--skip-bids-validation"]
    assert words[10:12] == ["-w", words[11]]
    assert words[12:] == ["--nprocs", "4", "--mem-gb", "9.7", "--derivatives", str(dataset), "--no-masks"]  # 10 GiB
    assert Path(words[11]).parent == scratch
    assert list(scratch.iterdir()) == []
    group = (folder / "group.sh").read_text()
    assert "out group " in group.replace("/out'", "/out")
    assert shlex.quote(f"--control-filter={condition}") in group


def test_line_without_participants_fails(tmp_path, dataset, programs):
    folder = write(tmp_path, dataset)
    code, words, _ = run_task(folder, tmp_path, program="", SLURM_ARRAY_TASK_ID="3")
    assert (code != 0, words) == (True, [])


def test_signal_leaves_the_files_to_the_program(tmp_path, dataset, programs):
    """The program gets the signal as well, and finds its folder until it ends."""
    folder = write(tmp_path, dataset)
    program = 'trap "ls -d $TMPDIR/* >$TMPDIR.seen; exit 130" TERM\nkill -TERM $PPID\nsleep 0.5 &\nkill -TERM $$\nwait'
    code, _, scratch = run_task(folder, tmp_path, program=program, SLURM_ARRAY_TASK_ID="1")
    assert code == 130
    assert Path(f"{scratch}.seen").read_text().startswith(f"{scratch}/bids_dgmseg.")
    assert list(scratch.iterdir()) == []


def test_participants_in_the_queue_are_not_submitted_again(tmp_path, dataset, programs, capsys):
    folder = write(tmp_path, dataset)
    name = f"dgmseg-{folder.name[-8:]}"
    (programs / "queue").write_text(f"{name}|2\n")
    second = write(tmp_path, dataset)
    assert (second / "participants.txt").read_text() == "01\n"
    (programs / "queue").write_text(f"{name}|1\n{name}|2\n")
    capsys.readouterr()
    assert main(["slurm", str(dataset), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.startswith("nothing to submit: ")
    done = subprocess.run(["bash", folder / "submit.sh"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, f"submit.sh: job {name} is in the queue already\n")


def test_silent_queue_submits_nothing(tmp_path, dataset, programs, capsys):
    write(tmp_path, dataset)
    (programs / "squeue").write_text("#!/bin/bash\necho 'cannot reach the controller' >&2\nexit 1\n")
    assert main(["slurm", str(dataset), str(tmp_path / "out")]) == 2
    assert "squeue: cannot reach the controller" in capsys.readouterr().err


def test_submission_prints_the_jobs(tmp_path, dataset, programs, capsys):
    (programs / "sbatch").write_text('#!/bin/bash\necho "$@" >>"$0.log"; echo "41;cluster"\n')
    (programs / "sbatch").chmod(0o755)
    folder = write(tmp_path, dataset, "--submit")
    assert capsys.readouterr().out.splitlines()[-1] == "array job 41, group level in job 41"
    calls = (programs / "sbatch.log").read_text().splitlines()
    assert calls == [
        f"--parsable {folder}/participant.sh",
        f"--parsable --dependency=afterany:41,singleton {folder}/group.sh",
    ]


def test_directives_follow_the_options(tmp_path, dataset, programs):
    given = ["--account", "lab", "--partition", "a,b", "--time", "1-12", "--mem", "1T", "--at-once", "7"]
    text = (write(tmp_path, dataset, *given) / "participant.sh").read_text()
    directives = re.findall(r"^#SBATCH (.*)", text, re.MULTILINE)
    assert {"--array=1-2%7", "--mem=1048576M", "--time=36:00:00", "--account=lab", "--partition=a,b"} <= set(directives)


@pytest.mark.parametrize(
    ("option", "value"),
    [("--mem", "8 GB"), ("--time", "soon"), ("--time", "0"), ("--account", "a; rm"), ("--cpus", "0")],
)
def test_invalid_resources_are_rejected(tmp_path, dataset, option, value):
    with pytest.raises(SystemExit):
        main(["slurm", str(dataset), str(tmp_path / "out"), option, value])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "none"], "none"),
        (["--container", "no.sif"], "no such image"),
        (["--reference-mask", "nowhere", "--reference", "csf"], "nowhere"),
    ],
)
def test_what_the_jobs_would_reject_is_rejected(tmp_path, dataset, options, message, capsys):
    assert main(["slurm", str(dataset), str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("out/logs/jobs-*"))


def test_mounts_cover_links_and_their_targets(tmp_path):
    """A link to the dataset, derivatives on another disk, an image in an archive, and names with commas."""
    disk, archive, given = tmp_path / "disk, 1", tmp_path / "archive" / "x", tmp_path / "given"
    for folder in (disk / "ds" / "sub-01", archive, tmp_path / "scratch" / "out"):
        folder.mkdir(parents=True)
    given.symlink_to(disk / "ds")
    (disk / "ds" / "derivatives").symlink_to(tmp_path / "scratch")
    (archive / "chi.nii").touch()
    image = given / "sub-01" / "chi.nii"
    image.symlink_to(archive / "chi.nii")
    mounts = find_mounts([given], [given / "derivatives" / "out"], [image])
    assert mounts == [
        f"type=bind,src={given},dst={given},ro",
        f'type=bind,"src={disk}/ds","dst={disk}/ds",ro',
        f"type=bind,src={archive},dst={archive},ro",
        f"type=bind,src={tmp_path}/scratch/out,dst={tmp_path}/scratch/out",
    ]


def test_output_inside_the_dataset_is_writable(tmp_path):
    out = tmp_path / "ds" / "derivatives" / "out"
    out.mkdir(parents=True)
    ds = tmp_path / "ds"
    assert find_mounts([ds], [out]) == [f"type=bind,src={ds},dst={ds},ro", f"type=bind,src={out},dst={out}"]


def test_norms_reach_both_levels(tmp_path, dataset, programs):
    (tmp_path / "norms.json").touch()
    folder = write(tmp_path, dataset, "--norms", str(tmp_path / "norms.json"), "--model", "dgm24")
    for job in ("participant", "group"):
        text = (folder / f"{job}.sh").read_text()
        assert f"--norms={tmp_path}/norms.json" in text
        assert "--model=dgm24" in text
    assert "--model" not in (write(tmp_path, dataset, "--model", "dgm24") / "group.sh").read_text()


def test_container_can_write_the_files_of_the_group_level(tmp_path, dataset, programs):
    """A file that does not exist cannot be mounted; its folder is."""
    (tmp_path / "image.sif").touch()
    saved = tmp_path / "models" / "norms.json"
    options = ["--container", str(tmp_path / "image.sif"), "--control-filter", "age > 18", "--norms-save", str(saved)]
    text = (write(tmp_path, dataset, *options) / "group.sh").read_text()
    assert f"--norms-save={saved}" in text
    assert f"type=bind,src={saved.parent},dst={saved.parent} " in text  # without ro
    assert f"src={saved}," not in text
    assert saved.parent.is_dir()


def test_rejected_output_directory_stays_as_it_is(dataset, capsys):
    assert main(["slurm", str(dataset), str(dataset / "out")]) == 2
    assert "output directory inside the input's raw data" in capsys.readouterr().err
    assert not (dataset / "out").exists()


def test_status_shows_the_queue_before_the_first_task(tmp_path, dataset, programs, capsys):
    folder = write(tmp_path, dataset)
    (programs / "queue").write_text(f"dgmseg-{folder.name[-8:]}|2\n")
    capsys.readouterr()
    assert main(["status", str(tmp_path / "out")]) == 1
    assert "sub-02  missing      in the queue\n" in capsys.readouterr().out


def test_container_sees_the_files_of_the_options(tmp_path, dataset, programs):
    (tmp_path / "image.sif").touch()
    (tmp_path / "filter.json").write_text('{"chimap": {}}')
    options = ["--container", str(tmp_path / "image.sif"), "--bids-filter-file", str(tmp_path / "filter.json")]
    text = (write(tmp_path, dataset, *options) / "participant.sh").read_text()
    for path in (dataset, tmp_path / "filter.json"):
        assert shlex.quote(f"type=bind,src={path},dst={path},ro") in text
    assert shlex.quote(f"type=bind,src={tmp_path}/out,dst={tmp_path}/out") in text
    assert '--mount "type=bind,src=$work,dst=$work"' in text
    assert f"{tmp_path}/image.sif bids_dgmseg " in text


def test_container_sees_the_targets_of_maps_and_masks(tmp_path, dataset, programs):
    """Links to three archives: of a further map, a mask of lesions, and a mask of the reference region."""
    (tmp_path / "image.sif").touch()
    anat, masks = dataset / "sub-02" / "anat", tmp_path / "masks" / "sub-02" / "anat"
    masks.mkdir(parents=True)
    names = {
        anat / "sub-02_R2starmap.nii.gz": "a",
        masks / "sub-02_label-lesion_mask.nii.gz": "b",
        masks / "sub-02_label-CSF_mask.nii.gz": "c",
    }
    for path, archive in names.items():
        (tmp_path / "store" / archive).mkdir(parents=True)
        target = tmp_path / "store" / archive / path.name
        target.touch()
        path.symlink_to(target)
    options = ["--participant-label", "02", "--container", str(tmp_path / "image.sif"), "--sample", "R2starmap"]
    options += ["--exclude-mask", str(tmp_path / "masks"), "--reference", "csf"]
    folder = write(tmp_path, dataset, *options, "--reference-mask", str(tmp_path / "masks"))
    text = (folder / "participant.sh").read_text()
    assert f"type=bind,src={tmp_path}/store,dst={tmp_path}/store,ro" in text


def test_selected_sessions_reach_both_levels(tmp_path, dataset, programs):
    folder = write(tmp_path, dataset, "--session-label", "1")
    for job in ("participant", "group"):
        text = (folder / f"{job}.sh").read_text()
        assert "--session-label 1" in text


def test_last_line_of_a_log_explains_a_missing_result(tmp_path, dataset, programs):
    folder = write(tmp_path, dataset)
    (folder / "2.log").write_text("sub-02: segment\nslurmstepd: error: JOB 1 CANCELLED DUE TO TIME LIMIT\n\n")
    tasks = find_tasks(tmp_path / "out")
    assert (
        tasks["02"].describe_end()
        == f"its task ended: slurmstepd: error: JOB 1 CANCELLED DUE TO TIME LIMIT; see {folder}/2.log"
    )
    assert "no log" in tasks["01"].describe_end()
