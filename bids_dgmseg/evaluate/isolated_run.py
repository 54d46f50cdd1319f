"""Segment one map in a process of its own, and say what that cost.

    python -m bids_dgmseg.evaluate.isolated_run REQUEST.json

The request names the map, its metadata, the model and where the results go; it is written by `Segmentation.run`.
"""

from __future__ import annotations

import contextlib
import json
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bids_dgmseg.bids.entities import split_entities
from bids_dgmseg.bids.output_dataset import label_table
from bids_dgmseg.errors import InputError
from bids_dgmseg.image.units import check_chi
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.io.files import write_json, write_text
from bids_dgmseg.io.nifti import write_like
from bids_dgmseg.models.label_map import choose_labels
from bids_dgmseg.models.registry import get_model
from bids_dgmseg.models.structures import Structure
from bids_dgmseg.models.weights import limit_threads

VOTES, JOINT = "multiatlas", "multiatlasjoint"
"""Keys of the baselines, whose weights are a labelled dataset."""


@dataclass(frozen=True)
class Segmentation:
    """What to segment, and by what.

    Parameters
    ----------
    chi : str
        Susceptibility map.
    sidecar : mapping
        Its metadata.
    model : str
        Key of the registry, `VOTES` or `JOINT`.
    weights : str or None
        Folder in place of the model's own weights; a labelled dataset for the baselines.
    out : str
        Label image to write, ``…_dseg.nii.gz``; its label table lies beside it.
    cost : str
        JSON to write: ``seconds``, ``cpu_seconds``, ``peak_mb``, or ``problem``.
    device : {"auto", "cpu", "cuda"}
    threads : int
    label_map : str or None
        Table that says which label of an nnU-Net folder is which nucleus.
    choose : sequence of str
        Entities that decide where a scan of the atlases has several segmentations.
    """

    chi: str
    sidecar: Mapping[str, Any]
    model: str
    weights: str | None
    out: str
    cost: str
    device: str = "cpu"
    threads: int = 1
    label_map: str | None = None
    choose: Sequence[str] = ()

    def run(self, folder: Path) -> dict[str, Any]:
        """Segment in a new process.

        Parameters
        ----------
        folder : path
            For the request and the process's output.

        Returns
        -------
        dict
            The content of `cost`. A process that ends without writing it has a ``problem`` too.
        """
        cost = Path(self.cost)
        cost.unlink(missing_ok=True)
        request = folder / "request.json"
        write_json(asdict(self), request)
        command = [sys.executable, "-m", "bids_dgmseg.evaluate.isolated_run", str(request)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        (folder / "output.txt").write_text(done.stdout + done.stderr, encoding="utf-8")
        if not cost.is_file():
            last = (done.stderr.strip() or "no message").splitlines()[-1]
            write_json({"problem": f"ended with exit code {done.returncode} ({last})"}, cost)
        found: dict[str, Any] = json.loads(cost.read_text(encoding="utf-8"))
        return found


def main(argv: Sequence[str] | None = None) -> int:
    """Read the request, segment, write; the exit code is 1 where the map cannot be segmented."""
    (path,) = sys.argv[1:] if argv is None else argv
    request = Segmentation(**json.loads(Path(path).read_text(encoding="utf-8")))
    try:
        cost = _segment(request)
    except InputError as error:
        cost = {"problem": str(error)}
    write_json(cost, Path(request.cost))
    return int("problem" in cost)


def _segment(request: Segmentation) -> dict[str, Any]:
    """Segment one map and write its labels; reading and writing the map is not counted, loading weights is."""
    limit_threads(request.threads)
    source = Path(request.chi)
    checked = check_chi(source, request.sidecar).chi_ppm
    chi = checked.with_array(np.nan_to_num(checked.array))
    seconds, cpu_seconds = time.perf_counter(), time.process_time()
    dseg, structures = (_by_atlases if request.model in (VOTES, JOINT) else _by_network)(chi, request)
    seconds, cpu_seconds = time.perf_counter() - seconds, time.process_time() - cpu_seconds
    peak_mb, out = _peak_mb(), Path(request.out)
    write_text(label_table(structures), out.with_name(out.name.replace(".nii.gz", ".tsv")))
    write_like(dseg, source, out)
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_mb": peak_mb}


def _by_network(chi: Volume, request: Segmentation) -> tuple[NDArray[np.uint8], Sequence[Structure]]:
    from bids_dgmseg.segmentation.segment import segment_map

    weights, label_map = (Path(name) if name else None for name in (request.weights, request.label_map))
    model, _ = choose_labels(get_model(request.model), weights, label_map)
    return segment_map(chi, model, weights=weights, device=request.device).labels, model.structures


def _by_atlases(chi: Volume, request: Segmentation) -> tuple[NDArray[np.uint8], Sequence[Structure]]:
    from bids_dgmseg.segmentation.multi_atlas import MULTI_ATLAS, join_labels, segment_by_atlases, vote_locally
    from bids_dgmseg.segmentation.registration import Atlas
    from bids_dgmseg.train.data import drawn_structures, read_labelled_maps

    dataset, person = Path(str(request.weights)), split_entities(Path(request.chi).name.partition(".")[0]).get("sub")
    own = Path(request.chi).is_relative_to(dataset)
    labelled = [
        one
        for one in read_labelled_maps(dataset, MULTI_ATLAS, choose=request.choose, say=lambda line: None)
        if not own or one.participant != person
    ]
    if not labelled:
        raise InputError(f"{dataset.name}: no labelled map of another participant; give more atlases")
    atlases = [Atlas(one.map.name, one.map.chi, one.map.labels) for one in labelled]
    fuse = join_labels if request.model == JOINT else vote_locally
    found = segment_by_atlases(chi, atlases, MULTI_ATLAS, fuse=fuse)
    return found.labels, drawn_structures(labelled, MULTI_ATLAS)


def _peak_mb() -> float:
    """Peak memory of this process; Linux counts that of the one that started it into ``ru_maxrss``."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    unit = 1024 if sys.platform == "darwin" else 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit / 1024


if __name__ == "__main__":
    sys.exit(main())
