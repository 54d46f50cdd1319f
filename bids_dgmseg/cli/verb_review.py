"""``dgmseg view``, ``dgmseg review`` and ``dgmseg corrections``: look at results, rate them and correct labels."""

from __future__ import annotations

import argparse
import webbrowser
from pathlib import Path

from bids_dgmseg.arguments import absolute_path, participant_label
from bids_dgmseg.cli import Verb, option
from bids_dgmseg.console import StatusLine
from bids_dgmseg.errors import InputError, for_terminal, list_some
from bids_dgmseg.models.registry import get_model

OUTPUT_DIR = option("OUTPUT_DIR", "output folder of bids_dgmseg", absolute_path)


def open_pages(args: argparse.Namespace) -> int:
    """Open pages in the browser and print their paths."""
    for page in find_pages(args.output_dir, args.participant_label):
        print(page)
        if not args.no_browser and not webbrowser.open(page.as_uri()):
            print("no browser found; open the page yourself")
    return 0


def find_pages(folder: Path, participants: list[str]) -> list[Path]:
    """Return the pages of participants; without participants the group page or, if there is none, the first page.

    Raises
    ------
    InputError
        If a page does not exist.
    """
    pages = {page.stem.removeprefix("sub-"): page for page in sorted(folder.glob("sub-*.html"))}
    if missing := [label for label in participants if label not in pages]:
        have = f"; it has {list_some(pages)}" if pages else ""
        raise InputError(f"{folder}: no page of {list_some(missing)}{have}; run the participant level first")
    if participants:
        return [pages[label] for label in participants]
    if (folder / "group.html").is_file():
        return [folder / "group.html"]
    if not pages:
        raise InputError(f"{folder}: no pages; pass the output folder of bids_dgmseg")
    return [next(iter(pages.values()))]


def review(args: argparse.Namespace) -> int:
    """Write the page on which raters pass or fail scans and nuclei."""
    from bids_dgmseg.report.review_page import find_review_scans, write_review_page

    if not args.output_dir.is_dir():
        raise InputError(f"{args.output_dir}: no such folder; pass an output folder of bids_dgmseg")
    scans = find_review_scans(args.output_dir, bids_dir=args.bids_dir, model=args.model)
    with StatusLine() as status:
        page, warnings = write_review_page(args.output_dir, scans, report=status.update)
    for line in warnings:
        print(f"warning: {for_terminal(line)}")
    print(f"{len(scans)} scan(s) on {page}")
    return 0


def prepare_corrections(args: argparse.Namespace) -> int:
    """Copy the labels of scans into a dataset in which they can be corrected."""
    from bids_dgmseg.bids import corrections

    model = get_model(args.model)
    written, kept = corrections.prepare_corrections(args.output_dir, args.dir, model, scans=args.scans)
    print("\n".join([*map(str, written), *(f"{path}: exists and is kept" for path in kept)]))
    if written:
        print(f"{len(written)} scan(s) ready; edit, then run bids_dgmseg … participant --corrections {args.dir}")
    return 0


VERBS = (
    Verb(
        "view",
        "open the pages of an output folder in the browser",
        open_pages,
        [
            OUTPUT_DIR,
            option(
                "--participant-label LABEL ...",
                "participants whose pages are opened (default: the group page, if there is one)",
                participant_label,
            ),
            option("--no-browser", "only print the paths of the pages"),
        ],
    ),
    Verb(
        "review",
        "write review.html: a montage per nucleus over all scans, on which raters pass or fail them; the page saves "
        "their decisions as qc_decisions.tsv, for bids_dgmseg group --qc",
        review,
        [
            OUTPUT_DIR,
            option("--bids-dir FOLDER", "dataset with the maps, if OUTPUT_DIR does not link to it", absolute_path),
            option("--model NAME", "model whose results are shown, if there are several"),
        ],
    ),
    Verb(
        "corrections",
        "prepare the labels of scans for manual correction; bids_dgmseg --corrections then measures them",
        prepare_corrections,
        [
            option(
                "ACTION",
                "init: copy the labels of the scans and their label tables to DIR; files that exist are kept",
                choices=("init",),
                metavar=None,
            ),
            OUTPUT_DIR,
            option("DIR", "dataset of corrections, created if it does not exist", absolute_path),
            option("--scans SCAN ...", "scans such as sub-01 or sub-01_ses-1_run-1 (default: all with results)"),
            option("--model NAME", "model whose labels are corrected (default: dgm16)", default="default"),
        ],
    ),
)
