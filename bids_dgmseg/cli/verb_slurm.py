"""``dgmseg slurm``: scripts that run the BIDS App on a Slurm cluster, to be edited by the user."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path

from bids_dgmseg.arguments import absolute_path
from bids_dgmseg.cli import Verb, option
from bids_dgmseg.cli.bids_app import CONFIG_PARTS, read_config
from bids_dgmseg.config import RunConfig
from bids_dgmseg.errors import OK, InputError
from bids_dgmseg.io.files import write_text

SCRIPTS = files("bids_dgmseg").joinpath("data", "slurm")
"""``participant.sh``, one task per participant, and ``group.sh``; values stand for words between ``@``."""


def write_scripts(args: argparse.Namespace) -> int:
    """Write ``participants.txt`` and the scripts of both levels, and print how to submit them."""
    from bids_dgmseg.bids.dataset import open_inputs
    from bids_dgmseg.bids.scans import find_scans
    from bids_dgmseg.run.plan import check_folders

    if args.container and not args.container.exists():
        raise InputError(f"{args.container}: no such image; check --container")
    config = read_config([str(args.bids_dir), str(args.output_dir), "participant", *args.options])
    scans = find_scans(open_inputs(config.bids_dir, config.selection, output_dir=config.output_dir), echoes=True)
    check_folders(config)
    folder = config.output_dir / "logs" / "slurm"
    images = [path for scan in scans for path in scan.files]
    participants = list(dict.fromkeys(scan.participant for scan in scans))
    values = {
        "FOLDER": shlex.quote(str(folder)),
        "N_PARTICIPANTS": str(len(participants)),
        "COMMAND": _spell_command(config, args.container, images),
        "OPTIONS": "".join(f" \\\n    {shlex.quote(word)}" for word in args.options),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_text("\n".join(participants) + "\n", folder / "participants.txt")
    print(f"scripts for {len(participants)} participant(s) in {folder}; edit them, then run:")
    for name in ("participant.sh", "group.sh"):
        template = SCRIPTS.joinpath(name).read_text(encoding="utf-8")
        script = re.sub("@([A-Z_]+)@", lambda word: values[word[1]], template)
        write_text(script, folder / name).chmod(0o755)
        print("".join(f"{line.removeprefix('#   ')}\n" for line in script.splitlines() if line[:4] == "#   "), end="")
    return OK


def _spell_command(config: RunConfig, container: Path | None, images: Iterable[Path]) -> str:
    """Return the command of a job up to the output directory, as shell code."""
    folders = [str(config.bids_dir), str(config.output_dir)]
    if container is None:
        return shlex.join([sys.executable, "-m", "bids_dgmseg", *folders])
    mounts = [f"--bind {shlex.quote(f'{path}:{path}:ro')}" for path in find_mounts(config, images)]
    mounts += [f"--bind {shlex.quote(folders[1])}", '--bind "$work"']
    return " \\\n    ".join(["apptainer run --cleanenv", *mounts, shlex.join([str(container), *folders])])


def find_mounts(config: RunConfig, images: Iterable[Path]) -> list[Path]:
    """Return the folders that a container must see: the dataset, the files of options, and the targets of links."""
    values = [value for part in CONFIG_PARTS for value in vars(getattr(config, part.name)).values()]
    several = [value if isinstance(value, tuple) else (value,) for value in values]
    paths = [config.bids_dir, *(path for group in several for path in group if isinstance(path, Path))]
    paths += [path.resolve().parent for path in (*paths, *images) if path.resolve() != path]
    mounts: list[Path] = []
    for path in sorted(path for path in dict.fromkeys(paths) if path.exists()):
        if not any(path.is_relative_to(mount) for mount in mounts):
            mounts.append(path)
    return mounts


VERBS = (
    Verb(
        "slurm",
        "write scripts that run bids_dgmseg on a Slurm cluster: one task per participant, then the group level",
        write_scripts,
        [
            option("BIDS_DIR", "root folder of the BIDS dataset", absolute_path),
            option("OUTPUT_DIR", "folder for the results; the scripts are written to its logs/slurm", absolute_path),
            option("--container IMAGE", "image for Apptainer (default: this installation)", absolute_path),
            option(
                "--options TEXT",
                "options of the participant level, in quotes after an equals sign: --options='--model dcnnet'",
                shlex.split,
                default=[],
            ),
        ],
    ),
)
