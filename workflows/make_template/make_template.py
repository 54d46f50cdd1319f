"""Build the label template for simulated maps from public atlas files.

Usage: python workflows/make_template/make_template.py ALLEN MIDBRAIN MASK OUT [--people FOLDER] [--bigbrain FILE]
       [--7tami FILE]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from anatomies import read_anatomy, write_anatomy
from label_template import write_template
from people import find_heads, write_warps

from bids_dgmseg.errors import InputError


def main(argv: Sequence[str] | None = None) -> int:
    """Build the template and write it with a table of its labels."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("allen", type=Path, help="Allen Human Reference Atlas 3D 2020 (see README.md)")
    parser.add_argument("midbrain", type=Path, help="CIT168 probabilities (4D), with a .tsv (volume, name)")
    parser.add_argument("mask", type=Path, help="ICBM152 2009 symmetric T1w without skull, or its brain mask")
    parser.add_argument("out", type=Path, help="label template to write (.nii.gz)")
    parser.add_argument("--midbrain-t1w", type=Path, help="T1w without skull in the space of MIDBRAIN, if not of ALLEN")
    parser.add_argument("--people", type=Path, help="labelled heads of the Harvard-Oxford Atlas 2.0")
    parser.add_argument("--bigbrain", type=Path, help="labels of BigBrain, with a .tsv (index, name)")
    parser.add_argument("--7tami", dest="tami", type=Path, help="labels of 7TAMIBrain, with a .tsv (index, name)")
    args = parser.parse_args(argv)
    try:
        heads = find_heads(args.people) if args.people else []
        files = {"BigBrain": args.bigbrain, "7TAMIBrain": args.tami}
        others = {name: read_anatomy(path, name) for name, path in files.items() if path}
        for line in write_template(args.allen, args.midbrain, args.mask, args.out, midbrain_t1w=args.midbrain_t1w):
            print(line)
        for name, other in others.items():
            print(write_anatomy(args.out, other, name), flush=True)
        for line in write_warps(args.out, heads) if heads else ["without --people, all heads have this anatomy"]:
            print(line, flush=True)
    except InputError as error:
        print(f"make_template: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
