"""The review page on this computer: a server that only serves it, and writes ``qc_decisions.tsv``.

It listens on the loopback interface alone. Its address has a random token, without which nothing is served or written,
and requests from pages of other sites are refused. Participants' pages are shown without their scripts.
"""

from __future__ import annotations

import json
import re
import secrets
import threading
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pandas as pd

from bids_dgmseg.bids.entities import split_entities
from bids_dgmseg.errors import InputError
from bids_dgmseg.io.files import read_tsv, write_tsv
from bids_dgmseg.report.review_page import DECISIONS_FILE, PAGE, ReviewScan, rated_nuclei
from bids_dgmseg.study.qc_decisions import COLUMNS, DECISIONS, WHOLE_SCAN

HOST = "127.0.0.1"

_MAX_BYTES = 2000
"""Of a decision in a request, with a note of 500 characters."""

_MAX_TEXT = {"rater": 60, "note": 500, "date": 40}
_SERVED = re.compile(r"review\.html|sub-[0-9a-zA-Z+]+\.html|figures/[^/\\]+\.(?:png|svg)")
_TYPES = {".html": "text/html; charset=utf-8", ".png": "image/png", ".svg": "image/svg+xml"}

_REVIEW_POLICY = (
    "default-src 'none'; img-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_OTHER_POLICY = "sandbox; default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'"
"""Of participants' pages and images, which may come from elsewhere: no scripts, and no access to the server."""


class ReviewServer(ThreadingHTTPServer):
    """Serves the review page of one output folder.

    Parameters
    ----------
    output_dir : Path
    page : bytes
        The review page, which is never read from the folder.
    scans : sequence of ReviewScan
        Decisions on others are refused.
    port : int
        By default a free one.
    """

    daemon_threads = True

    def __init__(self, output_dir: Path, page: bytes, scans: Sequence[ReviewScan], *, port: int = 0) -> None:
        super().__init__((HOST, port), _Handler)
        self.output_dir, self.page = output_dir, page
        self.model = scans[0].model
        nuclei = {WHOLE_SCAN, *(one.abbreviation for one in rated_nuclei(scans))}
        self.known = {scan.name: nuclei for scan in scans}
        self.labels = {scan.name: scan.labels for scan in scans}
        self.max_bytes = _MAX_BYTES * (1 + sum(map(len, self.known.values())))
        self.token = secrets.token_urlsafe(24)
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        """Address of the page."""
        return f"http://{HOST}:{self.server_port}/{self.token}/{PAGE}"

    @property
    def decisions(self) -> Path:
        """File that is written."""
        return self.output_dir / DECISIONS_FILE

    def read(self) -> pd.DataFrame:
        """Read all decisions."""
        if not self.decisions.is_file():
            return pd.DataFrame(columns=list(COLUMNS), dtype=object)
        table = read_tsv(self.decisions, dtype=object)
        return table.reindex(columns=list(dict.fromkeys([*COLUMNS, *table.columns])))

    def is_shown(self, table: pd.DataFrame, rater: str) -> pd.Series:
        """Return whether each decision is one of a rater on a scan and nucleus that the page shows."""
        own = (table["rater"] == rater) & (table["model"].isna() | (table["model"] == self.model))
        pairs = zip(table["scan"], table["nucleus"], strict=True)
        return own & pd.Series([nucleus in self.known.get(scan, ()) for scan, nucleus in pairs], table.index, bool)

    def save(self, rater: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Replace the decisions of a rater on what the page shows; all others stay.

        Raises
        ------
        InputError
            If a decision is not valid.
        """
        rater = _one_line(rater, "rater")
        if not rater:
            raise InputError("no rater")
        records = [self._check(row, rater) for row in rows]
        with self.lock:
            table = self.read()
            new = pd.DataFrame(records, columns=list(COLUMNS), dtype=object)
            is_shown = self.is_shown(table, rater)
            kept = pd.concat([table[~is_shown], self._for_other_models(table[is_shown & table["model"].isna()])])
            write_tsv(pd.concat([kept, new], ignore_index=True) if len(kept) else new, self.decisions)

    def _for_other_models(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Return decisions on a scan by any model as decisions on its results by the other models."""
        names = {scan: self.labels[scan].name.replace(f"_seg-{self.model}", "_seg-*") for scan in rows["scan"]}
        found = {scan: sorted(self.labels[scan].parent.glob(name)) for scan, name in names.items()}
        models = {scan: [split_entities(path.name)["seg"] for path in paths] for scan, paths in found.items()}
        others = rows.assign(model=rows["scan"].map(models)).explode("model")
        return others[others["model"] != self.model].dropna(subset=["model"])

    def _check(self, row: Mapping[str, Any], rater: str) -> dict[str, Any]:
        scan, nucleus, decision = (row.get(key) for key in ("scan", "nucleus", "decision"))
        if scan not in self.known:
            raise InputError(f"unknown scan {scan!r}")
        if not isinstance(nucleus, str) or nucleus not in self.known[scan]:
            raise InputError(f"unknown nucleus {nucleus!r}")
        if decision not in (*DECISIONS, "", None):
            raise InputError(f"unknown decision {decision!r}")
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S")
        return {
            "scan": scan,
            "model": self.model,
            "nucleus": nucleus,
            "decision": decision or None,
            "note": _one_line(row.get("note"), "note") or None,
            "rater": rater,
            "date": _one_line(row.get("date"), "date") or now,
        }


def _one_line(value: Any, name: str) -> str:
    return " ".join(str(value or "").split())[: _MAX_TEXT[name]]


class _Handler(BaseHTTPRequestHandler):
    """Requests of the review page."""

    server: ReviewServer
    server_version, sys_version = "dgmseg", ""

    def do_GET(self) -> None:
        """Serve the page, its images and the rater's decisions."""
        path, query = self._path()
        if path is None:
            return
        if path == "decisions":
            rater = _one_line(parse_qs(query).get("rater", [""])[0], "rater")  # as it is written
            try:
                table = self.server.read()
            except (InputError, OSError) as error:
                self._answer(HTTPStatus.BAD_REQUEST, str(error).encode())
                return
            own = table.loc[self.server.is_shown(table, rater), ["scan", "nucleus", "decision", "note", "date"]]
            own = own.astype(object)
            records = own.where(own.notna(), "").to_dict("records")
            self._answer(HTTPStatus.OK, json.dumps(records).encode(), "application/json")
        elif path == PAGE:
            self._answer(HTTPStatus.OK, self.server.page, _TYPES[".html"], policy=_REVIEW_POLICY)
        elif (file := self._find(path)) is not None:
            self._answer(HTTPStatus.OK, file.read_bytes(), _TYPES[file.suffix])
        else:
            self._answer(HTTPStatus.NOT_FOUND, b"not found")

    def do_POST(self) -> None:
        """Write a rater's decisions."""
        path, _ = self._path()
        if path is None:
            return
        length = self.headers.get("Content-Length", "")
        is_json = self.headers.get("Content-Type", "").partition(";")[0].strip() == "application/json"
        if path != "decisions" or not is_json or not length.isdecimal() or int(length) > self.server.max_bytes:
            self._answer(HTTPStatus.BAD_REQUEST, b"expected decisions as JSON")
            return
        try:
            content = json.loads(self.rfile.read(int(length)))
            if not isinstance(content, dict) or not isinstance(content.get("rows"), list):
                raise InputError("no rows")
            if not all(isinstance(row, dict) for row in content["rows"]):
                raise InputError("rows are not objects")
            self.server.save(str(content.get("rater") or ""), content["rows"])
        except (InputError, ValueError, RecursionError) as error:
            self._answer(HTTPStatus.BAD_REQUEST, str(error).encode())
        except OSError as error:
            self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, str(error.strerror).encode())
        else:
            self._answer(HTTPStatus.OK, b"saved")

    def _path(self) -> tuple[str | None, str]:
        """Return the path below the token and the query; None, and an answer, if the request is not allowed."""
        names = {f"{host}:{self.server.server_port}" for host in (HOST, "localhost")}
        origin = self.headers.get("Origin")
        parts = urlsplit(self.path)
        token, _, path = parts.path.lstrip("/").partition("/")
        is_ours = self.headers.get("Host") in names and (origin is None or urlsplit(origin).netloc in names)
        if not is_ours or not secrets.compare_digest(token.encode(), self.server.token.encode()):
            self._answer(HTTPStatus.FORBIDDEN, b"forbidden")
            return None, ""
        return unquote(path), parts.query

    def _find(self, path: str) -> Path | None:
        """Return a file that may be served; None if there is none."""
        if not _SERVED.fullmatch(path):
            return None
        folder = self.server.output_dir.resolve()
        file = (folder / path).resolve()
        return file if file.is_file() and file.is_relative_to(folder) and file.suffix in _TYPES else None

    def _answer(
        self, status: HTTPStatus, content: bytes, kind: str = "text/plain; charset=utf-8", *, policy: str = ""
    ) -> None:
        self.send_response(status)
        headers = {
            "Content-Type": kind,
            "Content-Length": str(len(content)),
            "Content-Security-Policy": policy or _OTHER_POLICY,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
        }
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Write no log: the address has the token."""
