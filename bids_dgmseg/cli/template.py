"""``dgmseg template``: the label template, built from public atlases."""

from __future__ import annotations

import argparse
from pathlib import Path

from bids_dgmseg.errors import InputError

HELP = "build the label template for simulated maps from public atlas files"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    parser.add_argument(
        "allen",
        metavar="ALLEN",
        type=Path,
        help="Allen Human Reference Atlas 3D 2020: NIfTI with the labels 0 to 141, and a .json of the same name with "
        'the symbols of the structures under "labels"',
    )
    parser.add_argument(
        "midbrain",
        metavar="MIDBRAIN",
        type=Path,
        help="CIT168 probabilities (4D) registered to the Allen atlas, and a .tsv of the same name with the columns "
        "volume and name, which include SNc and SNr",
    )
    parser.add_argument(
        "mask", metavar="MASK", type=Path, help="ICBM152 2009 symmetric T1w without skull, or its brain mask"
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="label template to write (.nii.gz)")


def run(args: argparse.Namespace) -> int:
    """Build the template and write it with a table of its labels."""
    if not args.out.name.endswith((".nii.gz", ".nii")):
        raise InputError(f"{args.out.name}: not a NIfTI file name; use a name that ends in .nii.gz")
    if not args.out.absolute().parent.is_dir():
        raise InputError(f"{args.out.parent}: no such folder; create it first")
    from bids_dgmseg.simulate.template import write_template

    for line in write_template(args.allen, args.midbrain, args.mask, args.out):
        print(line)
    return 0
