"""Segmentation of one map in its own process, to measure its time and memory.

    python -m bids_dgmseg.lab.evaluate.timed_segmentation REQUEST.json

`SegmentationJob.run` writes the request, which names the map, its metadata, the model and the output files.
"""

from __future__ import annotations

import contextlib
import math
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
from bids_dgmseg.image.masks import fill_holes
from bids_dgmseg.image.units import check_chi
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.io.files import read_json, write_json, write_text
from bids_dgmseg.io.nifti import write_like
from bids_dgmseg.models.model_folder import find_learned_folds, limit_threads
from bids_dgmseg.models.registry import get_model
from bids_dgmseg.models.structures import Structure
from bids_dgmseg.segmentation.engine import choose_labels

LOCAL_VOTING, JOINT_FUSION = "multiatlas", "multiatlasjoint"

BASELINES = (LOCAL_VOTING, JOINT_FUSION)
"""Multi-atlas methods, whose weights are a labelled dataset."""


@dataclass(frozen=True)
class SegmentationJob:
    """Map to segment, model and output files."""

    chi: str
    sidecar: Mapping[str, Any]
    model: str
    """Key of the registry, or one of `BASELINES`."""
    weights: str | None
    """Model folder to use instead of the weights in the package; a labelled dataset for the baselines."""
    out: str
    """Label image to write, ``…_dseg.nii.gz``, with its label table beside it."""
    cost: str
    """JSON to write: ``seconds``, ``cpu_seconds``, ``peak_mb``, or ``problem``."""
    device: str = "cpu"
    threads: int = 1
    label_map: str | None = None
    """Table that maps the labels of an nnU-Net folder to nuclei."""
    choose: Sequence[str] = ()
    """Entities that decide if a scan of the atlases has several segmentations."""
    holdout: Sequence[str] = ()
    """Participants, without ``sub-``, whose maps are not used as atlases if they are in the dataset of the map."""

    def run(self, folder: Path) -> dict[str, Any]:
        """Segment in a new process, with its request in `folder`, and return the content of `cost`.

        A process that ends without writing it has a ``problem``.
        """
        cost = Path(self.cost)
        cost.unlink(missing_ok=True)
        request = write_json(asdict(self), folder / "request.json")
        command = [sys.executable, "-P", "-m", "bids_dgmseg.lab.evaluate.timed_segmentation", str(request)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if not cost.is_file():
            last = (done.stderr.strip() or "no message").splitlines()[-1]
            write_json({"problem": f"ended with exit code {done.returncode} ({last})"}, cost)
        return read_json(cost)


def main(argv: Sequence[str] | None = None) -> int:
    """Read the request, segment, write; the exit code is 1 if the map cannot be segmented."""
    (path,) = sys.argv[1:] if argv is None else argv
    job = SegmentationJob(**read_json(Path(path)))
    try:
        cost = _segment(job)
    except InputError as error:
        cost = {"problem": str(error)}
    write_json(cost, Path(job.cost))
    return int("problem" in cost)


def _segment(job: SegmentationJob) -> dict[str, Any]:
    """Segment one map and write its labels; the time includes loading weights, but not reading or writing images."""
    limit_threads(job.threads)
    checked = check_chi(job.chi, job.sidecar).chi_ppm
    chi = checked.with_array(fill_holes(checked.array, checked.voxel_size_mm))
    seconds, cpu_seconds = time.perf_counter(), time.process_time()
    if job.model in BASELINES:
        labels, structures = _segment_by_atlases(chi, job)
    else:
        from bids_dgmseg.segmentation.segment import segment_map

        folds: tuple[int, ...] = ()
        weights, label_map = (Path(name) if name else None for name in (job.weights, job.label_map))
        model, _ = choose_labels(get_model(job.model), weights, label_map)
        learned = find_learned_folds(weights, Path(job.chi)) if weights else {}
        if any(learned.values()):
            folds = tuple(fold for fold in learned if not learned[fold])
            if not folds:
                raise InputError(f"{weights}: all of its networks were trained on this map; use dgmseg cross-validate")
        segmented = segment_map(chi, model, weights=weights, device=job.device, folds=folds)
        labels, structures = segmented.labels, model.structures
    seconds, cpu_seconds = time.perf_counter() - seconds, time.process_time() - cpu_seconds
    cost = {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_mb": _peak_mb()}
    out = Path(job.out)
    write_text(label_table(structures), out.with_name(out.name.replace(".nii.gz", ".tsv")))
    write_like(labels, job.chi, out)
    return cost


def _segment_by_atlases(chi: Volume, job: SegmentationJob) -> tuple[NDArray[np.uint8], Sequence[Structure]]:
    from bids_dgmseg.bids.labelled_scans import labelled_structures, read_labelled_maps
    from bids_dgmseg.lab.evaluate.multi_atlas import MULTI_ATLAS, join_labels, segment_by_atlases, vote_locally
    from bids_dgmseg.registration.linear import Atlas

    dataset, path = Path(str(job.weights)), Path(job.chi)
    # a map of the dataset itself, even if it is a link out of it, is not segmented by atlases of the same participant
    own = {split_entities(path.name.partition(".")[0]).get("sub"), *job.holdout}
    folders = {*path.resolve().parents, *(folder.resolve() for folder in path.absolute().parents)}
    excluded = own if dataset.resolve() in folders else set()
    labelled = [
        one
        for one in read_labelled_maps(dataset, MULTI_ATLAS, choose=job.choose, warn=lambda line: None)
        if one.participant not in excluded
    ]
    if not labelled:
        raise InputError(f"{dataset.name}: no labelled map of another participant; add atlases")
    atlases = [Atlas(one.name, one.chi, one.channel_map) for one in labelled]
    fuse = join_labels if job.model == JOINT_FUSION else vote_locally
    return segment_by_atlases(chi, atlases, MULTI_ATLAS, fuse=fuse).labels, labelled_structures(labelled, MULTI_ATLAS)


def _peak_mb() -> float:
    """Return the peak memory of this process; on Linux ``ru_maxrss`` would include that of its parent."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    unit = 1024 if sys.platform == "darwin" else 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit / 1024


if __name__ == "__main__":
    sys.exit(main())
