"""Compare models on one labelled dataset; each model and scan is a node of a Nipype workflow, in its own process.

    python workflows/compare_models.py DATASET OUT --models dgm16 dcnnet=FOLDER attunet25d=FOLDER
                                       [--atlases LABELLED_DATASET] [--label-map FILE] [--split SEED|FILE]
                                       [--choose ENTITY ...]
                                       [--nprocs N] [--threads N] [--device cpu]

DATASET is a BIDS dataset with `_Chimap` and manual `_dseg` files (or one of `dgmseg simulate`). With --atlases, a
multi-atlas segmentation is added as a baseline: key multiatlas, or multiatlasjoint if ANTsPy is installed. Open
OUT/compare.html. Earlier results with the same map, weights and version are reused. Copy this file to add steps.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from nipype import Merge, Node, Workflow
from nipype.interfaces.base import (
    BaseInterfaceInputSpec,
    Bunch,
    File,
    InputMultiObject,
    SimpleInterface,
    TraitedSpec,
    traits,
)

from bids_dgmseg.arguments import absolute_path, entity, positive_int
from bids_dgmseg.errors import InputError, list_some, run_command
from bids_dgmseg.io.files import write_tsv
from bids_dgmseg.lab.evaluate.benchmark import (
    Candidate,
    TestSet,
    benchmark,
    check_candidates,
    find_test_set,
    parse_candidates,
    segment_scan,
    select_test_part,
)
from bids_dgmseg.lab.evaluate.timed_segmentation import BASELINES


class _SegmentInputSpec(BaseInterfaceInputSpec):
    # not hashed: the results know what they were made from
    candidate = traits.Any(mandatory=True, nohash=True, desc="model")
    scan = traits.Any(mandatory=True, nohash=True, desc="map")
    out_folder = traits.Str(mandatory=True, desc="folder of the benchmark")
    device = traits.Enum("cpu", "cuda", "auto", usedefault=True, desc="where the networks run")
    threads = traits.Range(low=1, value=1, usedefault=True, desc="threads of a process")


class _SegmentOutputSpec(TraitedSpec):
    out_cost = File(exists=True, desc="JSON: time and memory, or why the scan could not be segmented")


class Segment(SimpleInterface):
    """Segment one scan with one model; a scan that fails does not affect the others."""

    input_spec = _SegmentInputSpec
    output_spec = _SegmentOutputSpec
    always_run = True
    """Nipype's cache would not notice new weights; `segment_scan` reuses results that are up to date."""

    def _run_interface(self, runtime: Bunch) -> Bunch:
        given = self.inputs
        cost = segment_scan(
            given.candidate, given.scan, Path(given.out_folder), device=given.device, threads=given.threads
        )
        self._results["out_cost"] = str(cost)
        return runtime


class _CompareInputSpec(BaseInterfaceInputSpec):
    in_costs = InputMultiObject(File(exists=True), mandatory=True, desc="time and memory of each model and scan")
    candidates = traits.Any(mandatory=True, nohash=True, desc="models")
    test_set = traits.Any(mandatory=True, nohash=True, desc="labelled scans")
    out_folder = traits.Str(mandatory=True, desc="folder of the benchmark")


class _CompareOutputSpec(TraitedSpec):
    out_page = File(exists=True, desc="page, next to its tables and figures")
    failures = traits.List(traits.Str, desc="one line each")


class Compare(SimpleInterface):
    """Compare all segmentations with the labels, and write tables, figures and the page."""

    input_spec = _CompareInputSpec
    output_spec = _CompareOutputSpec
    always_run = True

    def _run_interface(self, runtime: Bunch) -> Bunch:
        given, out = self.inputs, Path(self.inputs.out_folder)
        failures = benchmark(given.candidates, given.test_set, [Path(path) for path in given.in_costs], out)
        self._results["out_page"] = str(out / "compare.html")
        self._results["failures"] = failures
        return runtime


def init_compare_models_wf(
    *,
    candidates: Sequence[Candidate],
    test_set: TestSet,
    out: Path,
    device: str = "cpu",
    threads: int = 1,
    name: str = "compare_models_wf",
) -> Workflow:
    """Build the workflow: segment each scan with each model, then compare all.

    Parameters
    ----------
    candidates : sequence of Candidate
    test_set : TestSet
    out : path
        Folder for ``predictions``, ``evaluation``, tables, figures and ``compare.html``.
    device : {"cpu", "cuda", "auto"}
    threads : int
        Threads of each process.
    name : str
        Name in the logs and the working directory.

    Outputs
    -------
    compare.out_page
        The page.
    """
    pairs = [(candidate, scan) for scan in test_set.scans for candidate in candidates]
    gather = Node(Merge(len(pairs)), name="gather")
    compare = Node(Compare(candidates=list(candidates), test_set=test_set, out_folder=str(out)), name="compare")
    workflow = Workflow(name=name)
    for place, (candidate, scan) in enumerate(pairs, start=1):
        interface = Segment(candidate=candidate, scan=scan, out_folder=str(out), device=device, threads=threads)
        node_name = f"segment_{candidate.name}_{scan.name.replace('-', '')}"
        segment = Node(interface, name=node_name, n_procs=1, mem_gb=candidate.registered.memory_gb)
        workflow.connect(segment, "out_cost", gather, f"in{place}")
    workflow.connect(gather, "out", compare, "in_costs")
    return workflow


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code is 1 if a scan failed, 2 if the benchmark cannot start."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=absolute_path, help="labelled BIDS dataset")
    parser.add_argument("out", type=absolute_path, help="folder for the tables and the page")
    parser.add_argument(
        "--models",
        nargs="+",
        default=["dgm16"],
        metavar="KEY[=FOLDER]",
        help="keys of the registry, with their own weights or those of a folder; a key may be repeated with another "
        "folder (default: dgm16)",
    )
    parser.add_argument(
        "--atlases",
        type=absolute_path,
        metavar="LABELLED_DATASET",
        help="atlases of the multi-atlas baseline; maps of the same participant are left out",
    )
    parser.add_argument(
        "--label-map",
        type=absolute_path,
        metavar="FILE",
        help="table that maps the labels of nnunet2step folders to nuclei, as for bids_dgmseg",
    )
    parser.add_argument(
        "--split",
        metavar="SEED|FILE",
        help="compare only the test part of a split: FILE is the split.tsv of dgmseg train-nnunet (or a table with the "
        "columns participant_id and part), SEED that of its split into 70 %% for training, 10 %% for tuning and 20 %% "
        "for testing, each site in proportion (default: all labelled scans)",
    )
    parser.add_argument(
        "--choose",
        nargs="+",
        action="extend",
        default=[],
        metavar="ENTITY",
        type=entity,
        help="if a scan or an atlas has several segmentations, use those with one of these entities",
    )
    parser.add_argument(
        "--bilateral",
        action="store_true",
        help="add a bilateral row (left and right combined) per nucleus; labels may then be bilateral, too",
    )
    parser.add_argument("--device", choices=("cpu", "cuda", "auto"), default="cpu", help="default: %(default)s")
    parser.add_argument(
        "--threads", type=positive_int, default=1, help="threads of each process (default: %(default)s)"
    )
    parser.add_argument(
        "--nprocs",
        type=positive_int,
        default=1,
        help="processes at a time; use 1 to measure times (default: %(default)s)",
    )
    parser.add_argument("--work-dir", type=absolute_path, help="folder for logs (default: a temporary folder)")
    args = parser.parse_args(argv)
    return run_command("compare_models", lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    candidates = parse_candidates(args.models, atlases=args.atlases, label_map=args.label_map, choose=args.choose)
    test_set = find_test_set(args.dataset, choose=args.choose, bilateral=args.bilateral, warn=_print)
    if args.split:
        test_set, table = select_test_part(test_set, args.dataset, args.split)
        test = tuple(sorted({scan.participant for scan in test_set.scans}))
        found = {path.name.split("_")[0] for path in (args.out / "predictions").rglob("*_dseg.nii.gz")}
        if others := found - {f"sub-{one}" for one in test}:
            raise InputError(
                f"{args.out.name}: has results of {list_some(others)}, not in the test part; use a new OUT"
            )
        candidates = [replace(one, holdout=test) if one.model in BASELINES else one for one in candidates]
        write_tsv(table, args.out / "split.tsv")
        _print(f"test part: sub-{', sub-'.join(test)}")
    check_candidates(candidates, test_set=test_set, device=args.device, warn=_print)
    args.out.mkdir(parents=True, exist_ok=True)
    workflow = init_compare_models_wf(
        candidates=candidates, test_set=test_set, out=args.out, device=args.device, threads=args.threads
    )
    workflow.base_dir = str(args.work_dir or tempfile.mkdtemp(prefix="compare_models_"))
    workflow.config["execution"] = {"crashdump_dir": workflow.base_dir, "crashfile_format": "txt"}
    logging.getLogger("nipype.workflow").setLevel(logging.CRITICAL)  # it would print the traceback of each bad scan
    plugin = "Linear" if args.nprocs == 1 else "MultiProc"
    try:
        graph = workflow.run(plugin=plugin, plugin_args={"n_procs": args.nprocs, "raise_insufficient": False})
    except RuntimeError as error:  # Nipype's, with the traceback of the node
        messages = re.findall(r"bids_dgmseg\.errors\.InputError: (.*)", str(error))
        if not messages:
            raise
        raise InputError(messages[-1]) from error
    (failures,) = [node.result.outputs.failures for node in graph.nodes if node.name == "compare"]
    _print((args.out / "models.tsv").read_text(encoding="utf-8").rstrip("\n"))
    for line in failures:
        _print(f"failed: {line}")
    _print(f"open {args.out / 'compare.html'}")
    return 1 if failures else 0


def _print(line: str) -> None:
    sys.stdout.write(f"{line}\n")


if __name__ == "__main__":
    sys.exit(main())
