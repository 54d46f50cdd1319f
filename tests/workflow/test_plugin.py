from __future__ import annotations

from multiprocessing import Pipe

from bids_dgmseg.workflow import plugin as workers


def test_a_worker_whose_run_was_interrupted_ends_without_a_word(monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(workers, "run_node", lambda *arguments: {"result": None})
    monkeypatch.chdir(tmp_path)  # a worker leaves the directory it was started in; go back there afterwards
    receiver, sender = Pipe(duplex=False)
    receiver.close()
    workers._work(sender, None, False, 1, tmp_path)
    assert capfd.readouterr() == ("", "")
