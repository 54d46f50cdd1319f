"""``dgmseg review``: the page on which raters decide about scans and nuclei."""

from __future__ import annotations

import argparse
import webbrowser

from bids_dgmseg.arguments import absolute_path, number
from bids_dgmseg.cli.options import Verb, option
from bids_dgmseg.console import StatusLine
from bids_dgmseg.errors import InputError, count, for_terminal


def review(args: argparse.Namespace) -> int:
    """Write the page and serve it until it is interrupted."""
    from bids_dgmseg.report.review_page import find_review_scans, write_review_page

    if not args.out.is_dir():
        raise InputError(f"{args.out}: no such folder; pass an output folder of bids_dgmseg")
    scans = find_review_scans(args.out, bids_dir=args.bids_dir, model=args.model)
    with StatusLine() as status:
        page, warnings = write_review_page(args.out, scans, report=status.update)
    lines = [f"warning: {for_terminal(line)}" for line in warnings]
    print("\n".join([*lines, f"{count(len(scans), 'scan')} on {page}"]), flush=True)
    if args.no_server:
        return 0
    return _serve(args, page.read_bytes(), scans)


def _serve(args: argparse.Namespace, page: bytes, scans: list) -> int:  # type: ignore[type-arg]
    from bids_dgmseg.run.review_server import ReviewServer

    try:
        server = ReviewServer(args.out, page, scans, port=args.port)
    except OSError as error:
        raise InputError(f"port {args.port}: cannot be used ({error.strerror}); choose another with --port") from error
    print(f"open {server.url}\ndecisions are written to {server.decisions}; end with Ctrl+C", flush=True)
    if not args.no_browser:
        webbrowser.open(server.url)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print("ended", flush=True)
    finally:
        server.server_close()
    return 0


VERBS = (
    Verb(
        "review",
        "show a montage per nucleus over all scans, on which raters pass or fail them by keyboard; decisions are "
        "written to qc_decisions.tsv in OUT, for bids_dgmseg group --qc",
        review,
        [
            option("OUT", "output folder of the participant level of bids_dgmseg", absolute_path),
            option(
                "--bids-dir FOLDER",
                "dataset with the maps, if the output folder does not link to it",
                absolute_path,
            ),
            option("--model NAME", "model whose results are shown, if there are several"),
            option("--no-server", "only write review.html, from which decisions are downloaded"),
            option(
                "--port N",
                "port of the local server (default: a free one)",
                lambda text: number(text, low=0, high=65535, expected="a port from 0 to 65535"),
                default=0,
            ),
            option("--no-browser", "do not open a browser; the address is printed"),
        ],
    ),
)
