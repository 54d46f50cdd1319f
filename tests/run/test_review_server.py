"""The local server of the review page."""

import http.client
import json
import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.report.review_page import ReviewScan
from bids_dgmseg.run.review_server import HOST, ReviewServer
from bids_dgmseg.study.qc_decisions import read_decisions

SCANS = [
    ReviewScan(name, "dgm16", Path("x"), None, "", {"all": "green", "CN_L": "green"}) for name in ("sub-1", "sub-2")
]
ROW = {"scan": "sub-1", "nucleus": "CN_L", "decision": "fail", "note": "leaks\n=1+1", "date": "2026-11-25T10:00:00"}


@contextmanager
def serve(out, scans=SCANS):
    server = ReviewServer(out, b"<p>review", scans)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "out"
    (folder / "figures").mkdir(parents=True)
    (folder / "sub-1.html").write_text("<script>alert(1)</script>")
    (folder / "figures" / "review_CN_L.png").write_bytes(b"png")
    (folder / "figures" / "sub-1_viewer.html").write_text("viewer")
    (tmp_path / "secret.html").write_text("secret")
    (folder / "sub-9.html").symlink_to(tmp_path / "secret.html")
    return folder


def ask(server, path, *, method="GET", body=None, token=None, **headers):
    """Return status, content and policy of an answer."""
    connection = http.client.HTTPConnection(HOST, server.server_port, timeout=20)
    text = None if body is None else json.dumps(body)
    extra = {"Content-Type": "application/json"} if body is not None else {}
    connection.request(method, f"/{token or server.token}/{path}", text, {**extra, **headers})
    answer = connection.getresponse()
    return answer.status, answer.read(), answer.headers["Content-Security-Policy"]


def test_only_pages_and_figures_are_served(out):
    with serve(out) as server:
        assert server.server_address[0] == "127.0.0.1"
        assert ask(server, "review.html")[:2] == (200, b"<p>review")
        assert ask(server, "figures/review_CN_L.png")[:2] == (200, b"png")
        status, _, policy = ask(server, "sub-1.html")
        assert status == 200
        assert policy.startswith("sandbox; default-src 'none'")  # its scripts do not run
        for path in ("secret.html", "../secret.html", "%2e%2e/secret.html", "sub-9.html", "figures/sub-1_viewer.html"):
            assert ask(server, path)[0] == 404
        assert ask(server, "review.html", token="guess")[0] == 403
        assert ask(server, "review.html", Host="evil.example")[0] == 403
        assert ask(server, "review.html", Origin="https://evil.example")[0] == 403


def test_decisions_are_written_and_read_again(out):
    with serve(out) as server:
        assert ask(server, "decisions", method="POST", body={"rater": "AB", "rows": [ROW]})[:2] == (200, b"saved")
        other = ROW | {"scan": "sub-2", "nucleus": "all", "decision": "pass", "note": ""}
        ask(server, "decisions", method="POST", body={"rater": "CD", "rows": [other]})
        _, found, _ = ask(server, "decisions?rater=AB")
        assert json.loads(found) == [ROW | {"note": "leaks =1+1"}]
        table = read_decisions([out / "qc_decisions.tsv"])
        assert table[["scan", "model", "nucleus", "decision", "rater"]].to_numpy().tolist() == [
            ["sub-1", "dgm16", "CN_L", "fail", "AB"],
            ["sub-2", "dgm16", "all", "pass", "CD"],
        ]
        ask(server, "decisions", method="POST", body={"rater": "AB", "rows": []})  # taken back
        assert read_decisions([out / "qc_decisions.tsv"])["rater"].tolist() == ["CD"]


def test_decisions_on_many_scans_are_saved(out):
    """All of them are sent each time: 3,200 of 1,600 bytes are more than 5 MB, as are 40,000 without notes."""
    nuclei = [one.abbreviation for one in STRUCTURES]
    scans = [replace(SCANS[0], name=f"sub-{number}", ratings=dict.fromkeys(nuclei, "red")) for number in range(200)]
    note = "\N{GREEK SMALL LETTER CHI}" * 250  # six bytes each in this request
    rows = [ROW | {"scan": scan.name, "nucleus": nucleus, "note": note} for scan in scans for nucleus in nuclei]
    with serve(out, scans) as server:
        assert ask(server, "decisions", method="POST", body={"rater": "AB", "rows": rows})[:2] == (200, b"saved")
    assert len(read_decisions([out / "qc_decisions.tsv"])) == 3200


def test_rater_is_found_as_written(out):
    with serve(out) as server:
        ask(server, "decisions", method="POST", body={"rater": "Anna  Berg", "rows": [ROW]})
        _, found, _ = ask(server, "decisions?rater=Anna++Berg")
        assert [row["scan"] for row in json.loads(found)] == ["sub-1"]


def test_decisions_of_other_models_stay(out):
    line = {"scan": "sub-1", "model": "dcnnet", "nucleus": "CN_L", "decision": "pass", "rater": "AB"}
    pd.DataFrame([line]).to_csv(out / "qc_decisions.tsv", sep="\t", index=False)
    with serve(out) as server:
        ask(server, "decisions", method="POST", body={"rater": "AB", "rows": [ROW]})
    assert read_decisions([out / "qc_decisions.tsv"])["model"].tolist() == ["dcnnet", "dgm16"]


def test_decision_for_all_models_stays_for_the_others(out):
    anat = out / "sub-1" / "anat"
    anat.mkdir(parents=True)
    for model in ("dgm16", "dcnnet"):
        (anat / f"sub-1_seg-{model}_dseg.nii.gz").touch()
    line = {"scan": "sub-1", "model": "n/a", "nucleus": "CN_L", "decision": "fail", "rater": "AB"}
    pd.DataFrame([line]).to_csv(out / "qc_decisions.tsv", sep="\t", index=False)
    scans = [replace(SCANS[0], labels=anat / "sub-1_seg-dgm16_dseg.nii.gz"), SCANS[1]]
    with serve(out, scans) as server:
        for _ in range(2):
            assert len(json.loads(ask(server, "decisions?rater=AB")[1])) == 1
            body = {"rater": "AB", "rows": [ROW | {"decision": "pass"}]}
            assert ask(server, "decisions", method="POST", body=body)[0] == 200
    table = read_decisions([out / "qc_decisions.tsv"])
    assert table[["scan", "model", "nucleus", "decision"]].to_numpy().tolist() == [
        ["sub-1", "dcnnet", "CN_L", "fail"],
        ["sub-1", "dgm16", "CN_L", "pass"],
    ]


def test_decisions_on_what_the_page_lacks_stay(out):
    rows = [
        {"scan": scan, "model": "dgm16", "nucleus": nucleus, "decision": "fail", "rater": "AB"}
        for scan, nucleus in (("sub-3", "CN_L"), ("sub-1", "CN"), ("sub-1", "CN_L"))
    ]
    pd.DataFrame(rows).to_csv(out / "qc_decisions.tsv", sep="\t", index=False)
    with serve(out) as server:
        shown = json.loads(ask(server, "decisions?rater=AB")[1])
        assert [(row["scan"], row["nucleus"]) for row in shown] == [("sub-1", "CN_L")]
        shown[0]["decision"] = "pass"
        assert ask(server, "decisions", method="POST", body={"rater": "AB", "rows": shown})[0] == 200
    table = read_decisions([out / "qc_decisions.tsv"])
    assert table[["scan", "nucleus", "decision"]].to_numpy().tolist() == [
        ["sub-3", "CN_L", "fail"],
        ["sub-1", "CN", "fail"],
        ["sub-1", "CN_L", "pass"],
    ]


def test_damaged_file_of_decisions_is_one_line(out):
    (out / "qc_decisions.tsv").write_bytes("scan\tnote\nsub-1\tschön".encode("latin-1"))
    with serve(out) as server:
        status, text, _ = ask(server, "decisions?rater=AB")
    assert status == 400
    assert text.startswith(b"qc_decisions.tsv: ")


@pytest.mark.parametrize(
    "body",
    [
        {"rater": "", "rows": [ROW]},
        {"rater": "A", "rows": [ROW | {"scan": "sub-3"}]},
        {"rater": "A", "rows": [ROW | {"nucleus": "../x"}]},
        {"rater": "A", "rows": [ROW | {"decision": "maybe"}]},
        {"rater": "A", "rows": "x"},
        {"rater": "A", "rows": [1]},
        [],
    ],
)
def test_invalid_decisions_are_refused(out, body):
    with serve(out) as server:
        assert ask(server, "decisions", method="POST", body=body)[0] == 400
    assert not (out / "qc_decisions.tsv").exists()


def test_forms_of_other_pages_are_refused(out):
    with serve(out) as server:
        refused = ask(
            server, "decisions", method="POST", body={"rater": "A", "rows": []}, **{"Content-Type": "text/plain"}
        )
        assert refused[0] == 400
