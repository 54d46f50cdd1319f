"""Process the datasets of several sites, here or with Slurm, and analyse them together.

    python workflows/multi_site/multi_site.py SITES.tsv OUT [--slurm] [--group="--controls HC"]

SITES.tsv has one row per site: ``site``, ``bids_dir``, and if wanted ``container`` (an Apptainer image), ``partition``
(of Slurm) and ``options`` (of the participant level). Results of a site are in OUT/SITE, those of all in OUT. Run the
same command again to process what is missing. A site that fails does not stop the others; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

COLUMNS = ("site", "bids_dir", "container", "partition", "options")


def main(argv: Sequence[str] | None = None) -> int:
    """Run or submit all sites, then the group level."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sites", metavar="SITES.tsv", type=Path)
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument("--slurm", action="store_true", help="submit jobs (default: run here, one site after another)")
    parser.add_argument("--group", metavar="OPTIONS", default="", help="options of the group level, in quotes")
    parser.add_argument("--only-group", action="store_true", help="the group level only, of the sites with results")
    args = parser.parse_args(argv)
    sites, out = read_sites(args.sites), args.out.resolve()
    failed, jobs = [], []
    for row in [] if args.only_group else sites:
        try:
            jobs.append(submit(row, out / row["site"]) if args.slurm else run(row, out / row["site"]))
        except subprocess.CalledProcessError as error:
            failed.append(row["site"])
            print(f"{row['site']}: failed (exit code {error.returncode}); the other sites go on", file=sys.stderr)
    if args.slurm and jobs:
        again = [sys.executable, __file__, str(args.sites.resolve()), str(out), "--only-group", f"--group={args.group}"]
        logs = f"--output={out}/group.log"
        call(["sbatch", f"--dependency=afterany:{':'.join(jobs)}", logs, "--wrap", shlex.join(again)])
    elif not args.slurm:
        failed += [row["site"] for row in sites if not any((out / row["site"]).glob("sub-*/**/*_stats.tsv"))]
        results = [str(out / row["site"]) for row in sites if row["site"] not in failed]
        if not results:
            raise SystemExit("no site has results")
        try:
            call([*PROGRAM, results[0], str(out), "group", "--merge", *results, *shlex.split(args.group)])
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"the group level failed (exit code {error.returncode})") from None
    if failed:
        print(f"without results of {', '.join(sorted({*failed}))}", file=sys.stderr)
    return int(bool(failed))


PROGRAM = [sys.executable, "-m", "bids_dgmseg"]


def read_sites(path: Path) -> list[dict[str, str]]:
    """Read the table of sites; relative paths start at its folder."""
    table = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False).replace("n/a", "")
    if missing := [name for name in COLUMNS[:2] if name not in table]:
        raise SystemExit(f"{path}: no column {missing[0]}; expected {', '.join(COLUMNS)}")
    if table["site"].duplicated().any() or not table["site"].str.fullmatch("[0-9a-zA-Z]+").all():
        raise SystemExit(f"{path}: the names of sites must differ, of letters and digits; rename them")
    rows = table.reindex(columns=list(COLUMNS), fill_value="").to_dict("records")
    return [
        {**row, **{name: str((path.parent / row[name]).resolve()) for name in ("bids_dir", "container") if row[name]}}
        for row in rows
    ]


def run(site: Mapping[str, str], out: Path) -> str:
    """Process a site on this machine."""
    program = PROGRAM
    if site["container"]:
        mounts = ["--bind", f"{site['bids_dir']}:{site['bids_dir']}:ro", "--bind", str(out)]
        out.mkdir(parents=True, exist_ok=True)
        program = ["apptainer", "run", "--cleanenv", *mounts, site["container"]]
    call([*program, site["bids_dir"], str(out), "participant", *shlex.split(site["options"])])
    return ""


def submit(site: Mapping[str, str], out: Path) -> str:
    """Submit a site to Slurm, one task per participant; return the number of the job."""
    verb = [sys.executable, "-m", "bids_dgmseg.cli.main", "slurm", site["bids_dir"], str(out)]
    container = ["--container", site["container"]] if site["container"] else []
    call([*verb, *container, f"--options={site['options']}"])
    partition = [f"--partition={site['partition']}"] if site["partition"] else []
    return call(["sbatch", "--parsable", *partition, str(out / "logs" / "slurm" / "participant.sh")]).split(";")[0]


def call(command: Sequence[str]) -> str:
    """Run a command, show its output, and return it."""
    print(f"$ {shlex.join(command)}", flush=True)
    output = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout.strip()
    print(output, flush=True)
    return output


if __name__ == "__main__":
    sys.exit(main())
