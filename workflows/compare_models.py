"""Compare models on one labelled dataset; each model and scan is a node of a Nipype workflow, in a process of its own.

    python workflows/compare_models.py DATASET OUT --models dgm16 dcnnet=FOLDER attunet25d=FOLDER
                                       [--atlases LABELLED_DATASET] [--label-map FILE] [--choose ENTITY ...]
                                       [--nprocs N] [--threads N] [--device cpu]

DATASET is a BIDS dataset with `_Chimap` and manual `_dseg` files (or one of `dgmseg simulate`). With --atlases a
multi-atlas segmentation takes part as a baseline: key multiatlas, or multiatlasjoint where ANTsPy is installed. Open
OUT/compare.html. What was segmented before with the same map, weights and version is kept. Copy this file to add steps.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Sequence
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

from bids_dgmseg.cli.options import absolute_path, entity, positive_int
from bids_dgmseg.errors import InputError, run_command
from bids_dgmseg.evaluate.benchmark import Contender, Field, check_contenders, compare, find_field, name_contenders
from bids_dgmseg.evaluate.benchmark import segment_scan as segment_alone


class _SegmentInputSpec(BaseInterfaceInputSpec):
    # Not hashed: the results carry what they were made of.
    contender = traits.Any(mandatory=True, nohash=True, desc="the model")
    scan = traits.Any(mandatory=True, nohash=True, desc="the map")
    out_folder = traits.Str(mandatory=True, desc="folder of the comparison")
    device = traits.Enum("cpu", "cuda", "auto", usedefault=True, desc="where networks run")
    threads = traits.Range(low=1, value=1, usedefault=True, desc="threads of a process")


class _SegmentOutputSpec(TraitedSpec):
    out_cost = File(exists=True, desc="JSON: seconds and memory, or why the scan could not be segmented")


class Segment(SimpleInterface):
    """Segment one scan by one model; a scan that the model cannot segment leaves the others alone."""

    input_spec = _SegmentInputSpec
    output_spec = _SegmentOutputSpec
    always_run = True
    """The results know what they were made of; a cache of ours would not see new weights."""

    def _run_interface(self, runtime: Bunch) -> Bunch:
        given = self.inputs
        cost = segment_alone(
            given.contender, given.scan, Path(given.out_folder), device=given.device, threads=given.threads
        )
        self._results["out_cost"] = str(cost)
        return runtime


class _CompareInputSpec(BaseInterfaceInputSpec):
    in_costs = InputMultiObject(File(exists=True), mandatory=True, desc="what each model and scan cost")
    contenders = traits.Any(mandatory=True, nohash=True, desc="the models")
    ground = traits.Any(mandatory=True, nohash=True, desc="the labelled scans")
    out_folder = traits.Str(mandatory=True, desc="folder of the comparison")


class _CompareOutputSpec(TraitedSpec):
    out_page = File(exists=True, desc="the page; tables and figures lie beside it")
    failures = traits.List(traits.Str, desc="a line each")


class Compare(SimpleInterface):
    """Measure all segmentations against the labels, and write tables, figures and the page."""

    input_spec = _CompareInputSpec
    output_spec = _CompareOutputSpec
    always_run = True

    def _run_interface(self, runtime: Bunch) -> Bunch:
        given, out = self.inputs, Path(self.inputs.out_folder)
        outcome = compare(given.contenders, given.ground, [Path(path) for path in given.in_costs], out)
        self._results["out_page"] = str(out / "compare.html")
        self._results["failures"] = outcome.failures
        return runtime


def init_compare_models_wf(
    *,
    contenders: Sequence[Contender],
    ground: Field,
    out: Path,
    device: str = "cpu",
    threads: int = 1,
    name: str = "compare_models_wf",
) -> Workflow:
    """Connect the segmentation of each scan by each model with the comparison of all.

    Parameters
    ----------
    contenders : sequence of Contender
        The models.
    ground : Field
        The labelled scans.
    out : path
        Gets ``predictions``, ``evaluation``, tables, figures and ``compare.html``.
    device : {"cpu", "cuda", "auto"}
        Where networks run.
    threads : int
        Threads of each process.
    name : str
        What the logs and the working directory call it.

    Outputs
    -------
    compare.out_page
        The page.
    """
    pairs = [(contender, scan) for scan in ground.scans for contender in contenders]
    gather = Node(Merge(len(pairs)), name="gather")
    compare_all = Node(Compare(contenders=list(contenders), ground=ground, out_folder=str(out)), name="compare")
    workflow = Workflow(name=name)
    for place, (contender, scan) in enumerate(pairs, start=1):
        interface = Segment(contender=contender, scan=scan, out_folder=str(out), device=device, threads=threads)
        node_name = f"segment_{contender.name}_{scan.name.replace('-', '')}"
        segment = Node(interface, name=node_name, n_procs=1, mem_gb=contender.registered.memory_gb)
        workflow.connect(segment, "out_cost", gather, f"in{place}")
    workflow.connect(gather, "out", compare_all, "in_costs")
    return workflow


def main(argv: Sequence[str] | None = None) -> int:
    """Compare; the exit code is 1 where a scan could not be segmented or compared, 2 where nothing can be begun."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=absolute_path)
    parser.add_argument("out", type=absolute_path)
    parser.add_argument(
        "--models",
        nargs="+",
        default=["dgm16"],
        metavar="KEY[=FOLDER]",
        help="keys of the registry, with the weights that ship or with those of a folder; a key may "
        "come again with another folder (default: dgm16)",
    )
    parser.add_argument(
        "--atlases",
        type=absolute_path,
        metavar="LABELLED_DATASET",
        help="atlases of the multi-atlas baseline; maps of the target's own participant are left out",
    )
    parser.add_argument(
        "--label-map",
        type=absolute_path,
        metavar="FILE",
        help="which labels of nnunet2step folders are which nuclei, a table as bids_dgmseg takes it",
    )
    parser.add_argument(
        "--choose",
        nargs="+",
        action="extend",
        default=[],
        metavar="ENTITY",
        type=entity,
        help="where a scan or an atlas has several segmentations, its labels are those with one of these entities",
    )
    parser.add_argument("--device", choices=("cpu", "cuda", "auto"), default="cpu")
    parser.add_argument("--threads", type=positive_int, default=1, help="of each process (default: %(default)s)")
    parser.add_argument(
        "--nprocs",
        type=positive_int,
        default=1,
        help="processes at a time; take 1 for times that mean something (default: %(default)s)",
    )
    parser.add_argument("--work-dir", type=absolute_path, help="for logs (default: a temporary folder)")
    args = parser.parse_args(argv)
    return run_command("compare_models", lambda: _run(args))


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")


def _run(args: argparse.Namespace) -> int:
    out = args.out
    contenders = name_contenders(args.models, atlases=args.atlases, label_map=args.label_map, choose=args.choose)
    ground = find_field(args.dataset, choose=args.choose, say=_say)
    check_contenders(contenders, ground=ground, device=args.device, say=_say)
    out.mkdir(parents=True, exist_ok=True)
    workflow = init_compare_models_wf(
        contenders=contenders, ground=ground, out=out, device=args.device, threads=args.threads
    )
    workflow.base_dir = str(args.work_dir or tempfile.mkdtemp(prefix="compare_models_"))
    workflow.config["execution"] = {"crashdump_dir": workflow.base_dir, "crashfile_format": "txt"}
    plugin = "Linear" if args.nprocs == 1 else "MultiProc"
    try:
        graph = workflow.run(plugin=plugin, plugin_args={"n_procs": args.nprocs, "raise_insufficient": False})
    except RuntimeError as error:  # Nipype's, with the traceback of the node
        refusals = re.findall(r"bids_dgmseg\.errors\.InputError: (.*)", str(error))
        if not refusals:
            raise
        raise InputError(refusals[-1]) from error
    (failures,) = [node.result.outputs.failures for node in graph.nodes if node.name == "compare"]
    sys.stdout.write((out / "models.tsv").read_text(encoding="utf-8"))
    sys.stdout.write("".join(f"failed: {line}\n" for line in failures) + f"open {out / 'compare.html'}\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
