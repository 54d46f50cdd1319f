"""``dgmseg demo``, ``dgmseg simulate`` and ``dgmseg template``: simulated datasets, and their anatomy."""

from __future__ import annotations

import argparse
import shlex
from functools import partial
from pathlib import Path

from bids_dgmseg.arguments import absolute_path, number, seed
from bids_dgmseg.cli.options import Verb, option
from bids_dgmseg.errors import InputError

NEW_FOLDER = option(
    "DIR",
    "folder to create; new or empty (a command that was interrupted is continued by repeating it)",
    absolute_path,
)


def write_demo_dataset(args: argparse.Namespace) -> int:
    """Write a small dataset and print how to process it."""
    from bids_dgmseg.phantom.demo import write_demo

    for scan in write_demo(args.dir):
        print(scan, flush=True)
    print(f"next: bids_dgmseg {shlex.join([str(args.dir), f'{args.dir}-out'])} participant")
    return 0


def write_simulated_dataset(args: argparse.Namespace) -> int:
    """Write a dataset of simulated maps."""
    if args.labels is not None and not args.labels.is_file():
        raise InputError(f"{args.labels}: no such label template; build one with `dgmseg template`")
    from bids_dgmseg.lab.simulate.simulated_dataset import simulate_dataset

    scans = simulate_dataset(
        args.dir,
        n_scans=args.scans,
        seed=args.seed,
        template=args.labels,
        spacing_mm=args.spacing_mm,
        echoes=args.echoes,
        typical=args.typical,
    )
    for scan in scans:
        print(scan, flush=True)
    return 0


def build_template(args: argparse.Namespace) -> int:
    """Build the label template and write it with a table of its labels."""
    if not args.out.name.endswith((".nii.gz", ".nii")):
        raise InputError(f"{args.out.name}: not a NIfTI file name; use a name that ends in .nii.gz")
    if not args.out.absolute().parent.is_dir():
        raise InputError(f"{args.out.parent}: no such folder; create it first")
    from bids_dgmseg.lab.simulate.bigbrain import read_bigbrain, write_bigbrain
    from bids_dgmseg.lab.simulate.label_template import write_template
    from bids_dgmseg.lab.simulate.people import find_heads, write_warps

    heads = find_heads(args.people) if args.people else []
    bigbrain = read_bigbrain(args.bigbrain) if args.bigbrain else None
    for line in write_template(args.allen, args.midbrain, args.mask, args.out, midbrain_t1w=args.midbrain_t1w):
        print(line)
    if bigbrain is not None:
        print(write_bigbrain(args.out, bigbrain, name=args.bigbrain.name), flush=True)
    alone = ["without --people, all simulated heads will have the anatomy of this template"]
    for line in write_warps(args.out, heads) if heads else alone:
        print(line, flush=True)
    return 0


VERBS = (
    Verb(
        "demo",
        "write a small BIDS study of phantoms with their true labels and values",
        write_demo_dataset,
        [NEW_FOLDER],
    ),
    Verb(
        "simulate",
        "write a labelled BIDS dataset of simulated susceptibility maps",
        write_simulated_dataset,
        [
            NEW_FOLDER,
            option(
                "--scans N",
                "number of participants, one scan per participant",
                partial(number, low=1, high=99_999, expected="an integer from 1 to 99999"),
                required=True,
            ),
            option("--seed S", "the same seed gives the same maps (default: %(default)s)", seed, default=0),
            option(
                "--labels TEMPLATE",
                "label template from `dgmseg template` (default: the anatomy of the phantom)",
                Path,
            ),
            option(
                "--spacing-mm MM",
                "voxel size in mm, 0.4 to 4 (default: %(default)g)",
                partial(number, convert=float, low=0.4, high=4, expected="a voxel size from 0.4 to 4 mm"),
                default=1.0,
            ),
            option("--echoes", "write multi-echo GRE (magnitude and phase of four echoes) instead of chi maps"),
            option(
                "--typical",
                "typical 3 T scans of healthy subjects only: the middle half of the ranges of age, artefacts and "
                "reconstruction, half the rotations, no slices thicker than the voxels",
            ),
        ],
    ),
    Verb(
        "template",
        "build the label template for simulated maps from public atlas files",
        build_template,
        [
            option(
                "ALLEN",
                "Allen Human Reference Atlas 3D 2020: its annotation_full.nii.gz, with voxel_count.csv in the same "
                'folder; or numbered 0 to 141, with a .json of the same name that lists the acronyms under "labels"',
                Path,
            ),
            option(
                "MIDBRAIN",
                "CIT168 probabilities (4D), and a .tsv of the same name with the columns volume (from 0) and name, "
                "which include SNc and SNr",
                Path,
            ),
            option("MASK", "ICBM152 2009 symmetric T1w without skull, or its brain mask", Path),
            option("OUT", "label template to write (.nii.gz)", Path),
            option(
                "--midbrain-t1w FILE",
                "T1w without skull in the space of MIDBRAIN, to register it to MASK, which then is the T1w (default: "
                "MIDBRAIN is in the space of ALLEN)",
                Path,
            ),
            option(
                "--people FOLDER",
                "labelled heads of the Harvard-Oxford Atlas 2.0, to which the template is deformed; writes "
                "OUT_warps.nii.gz, which is used wherever OUT is (half a minute per head)",
                Path,
            ),
            option(
                "--bigbrain FILE",
                "labels of BigBrain (Xiao et al. 2019), and a .tsv of the same name with the columns index and name, "
                "such as Left-red-nucleus; writes OUT_bigbrain.nii.gz, the template with BigBrain's red nucleus, "
                "nigra, subthalamic nucleus and border within the pallidum, which a third of the heads drawn from OUT "
                "have",
                Path,
            ),
        ],
    ),
)
