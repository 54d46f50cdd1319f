"""``dgmseg view``: open the pages of an output folder."""

from __future__ import annotations

import argparse
import webbrowser
from pathlib import Path

from bids_dgmseg.arguments import absolute_path, participant_label
from bids_dgmseg.cli.options import Verb, option
from bids_dgmseg.errors import InputError, list_some


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
    known = {page.stem.removeprefix("sub-"): page for page in sorted(folder.glob("sub-*.html"))}
    if missing := [label for label in participants if label not in known]:
        have = f"; it has {list_some(known)}" if known else ""
        raise InputError(f"{folder}: no page of {list_some(missing)}{have}; run the participant level first")
    if participants:
        return [known[label] for label in participants]
    if (folder / "group.html").is_file():
        return [folder / "group.html"]
    if not known:
        raise InputError(f"{folder}: no pages; pass the output folder of bids_dgmseg")
    return [next(iter(known.values()))]


VERBS = (
    Verb(
        "view",
        "open the pages of an output folder in the browser",
        open_pages,
        [
            option("OUTPUT_DIR", "output folder of bids_dgmseg", absolute_path),
            option(
                "--participant-label LABEL ...",
                "participants whose pages are opened (default: the group page, if there is one)",
                participant_label,
            ),
            option("--no-browser", "only print the paths of the pages"),
        ],
    ),
)
