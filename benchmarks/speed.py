"""Time and memory per scan, compared with nnU-Net with a network for the same task; start and steadiness of a study.

    python benchmarks/speed.py [--weights FOLDER] [--map FILE] [--repeats N] [--mirroring]
    python benchmarks/speed.py --participants 100 1000 [--scans N] [--map FILE]
    python benchmarks/speed.py --convolutions [--map FILE]

Segments one simulated head at 1 mm (anatomy of the phantom), unless a map is given. For comparison,
``nnUNetv2_predict_from_modelfolder`` with the network that nnU-Net plans by default for a 3D task at 1 mm (31 million
parameters, patches of 128³, 17 classes), untrained, since weights do not affect the speed; one fold, without mirroring
unless requested. This program also runs that network. Each runs in a separate process; times are medians. Compute
time excludes imports.

With ``--participants``: datasets of N participants, all with links to one map, of which the first scans are
processed, with one process and with the default number: seconds from the command to the first scan and from scan to
scan, compute time per scan and resident memory of the main process. A map of zeros fails at once, which leaves
the work of the program itself.

With ``--convolutions``: CPU time of `segment_map` and of the app for one scan, with its pages, beside that of the
convolutions of the networks, on one thread and after a first run that imports the libraries.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
from reporting import markdown, measure

from bids_dgmseg.arguments import positive_int
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.lab.simulate.simulated_dataset import simulate_dataset

_OURS = """
import sys
from pathlib import Path
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.resources import keep_freed_memory
from bids_dgmseg.models.registry import get_model
from bids_dgmseg.segmentation.segment import segment_map
import nibabel, numpy, scipy.ndimage, torch
keep_freed_memory()
if sys.argv[1] != "imports":
    weights = Path(sys.argv[3]) if sys.argv[3] else None
    chi, model = Volume.read(Path(sys.argv[1])), get_model("default")
    nibabel.Nifti1Image(segment_map(chi, model, weights=weights).labels, chi.affine).to_filename(sys.argv[2])
"""
_OURS_SAME = """
import sys
from pathlib import Path
import nibabel, numpy
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.models.nnunet_folder import read_folder
from bids_dgmseg.resources import keep_freed_memory
from bids_dgmseg.segmentation.engines import NnunetNetwork
from nnunetv2.inference import export_prediction, predict_from_raw_data
keep_freed_memory()
if sys.argv[1] != "imports":
    chi, trained = Volume.read(Path(sys.argv[1])), read_folder(Path(sys.argv[3]))
    labels = NnunetNetwork(trained, device="cpu", sided=False)(chi).argmax(axis=0).astype(numpy.uint8)
    nibabel.Nifti1Image(labels, chi.affine).to_filename(sys.argv[2])
"""
_PEER = """
import sys
from nnunetv2.inference.predict_from_raw_data import predict_entry_point_modelfolder
if __name__ == "__main__" and sys.argv[1] != "imports":
    predict_entry_point_modelfolder()
"""
_PRODUCTS = {"aten::mkldnn_convolution", "aten::_convolution", "aten::slow_conv_transpose3d", "aten::addmm", "aten::mm"}
"""Operations that are convolutions."""

_FEATURES = [32, 64, 128, 256, 320, 320]
_N_CLASSES = 17


def main(argv: Sequence[str] | None = None) -> int:
    """Time both programs and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="weights folder (default: those shipped with the model)")
    parser.add_argument("--map", type=Path, help="chi map of 1 mm to segment (default: a simulated head)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--mirroring", action="store_true", help="let nnU-Net mirror, as it does by default")
    parser.add_argument("--participants", type=positive_int, nargs="+", help="sizes of studies to start instead")
    parser.add_argument("--convolutions", action="store_true", help="compare with the convolutions alone")
    parser.add_argument("--scans", type=positive_int, default=20, help="scans to process of each study (default: 20)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if not args.map:
            list(simulate_dataset(root / "heads", n_scans=1, seed=1))
        chi = args.map or next((root / "heads").glob("sub-*/anat/*_Chimap.nii.gz"))
        if args.convolutions:
            print(f"CPU time of one scan, one thread\n\n{markdown(time_convolutions(root / 'study', chi), 2)}")
            return 0
        if args.participants:
            rows = [
                time_study(root / f"{n}_{''.join(options)}", chi, n, options=options, n_scans=args.scans)
                for n in args.participants
                for options in (["--nprocs", "1"], [])
            ]
            print(f"Studies, {os.cpu_count()} cores, load {os.getloadavg()[0]:.0f}\n\n{markdown(pd.DataFrame(rows))}")
            return 0
        peer, peer_imports = _peer_commands(root, chi, mirroring=args.mirroring)
        ours = [sys.executable, "-c", _OURS, str(chi), str(root / "dseg.nii.gz"), str(args.weights or "")]
        same = [sys.executable, "-c", _OURS_SAME, str(chi), str(root / "same.nii.gz"), str(root / "peer")]
        rows = [
            time_command("bids_dgmseg (dgm16)", ours, [*ours[:3], "imports"], repeats=args.repeats),
            time_command("bids_dgmseg (the network of nnU-Net)", same, [*same[:3], "imports"], repeats=args.repeats),
            time_command("nnUNetv2_predict", peer, peer_imports, repeats=args.repeats),
        ]
        labels = [Volume.read(root / name, np.uint8).array for name in ("same.nii.gz", "peer_out/case.nii.gz")]
        n_differing, n_voxels = int((labels[0] != labels[1]).sum()), labels[0].size
    table = pd.DataFrame(rows).set_index("program")
    for name in table.index[:-1]:
        table.loc[f"ratio to {name}"] = table.loc["nnUNetv2_predict"] / table.loc[name]
    print(f"One scan of 1 mm, {os.cpu_count()} cores, median of {args.repeats}\n\n{markdown(table, 2)}")
    print(f"Labels by the same network differ in {n_differing} of {n_voxels} voxels.")
    return 0


def time_command(
    program: str, command: Sequence[str], imports: Sequence[str], *, repeats: int
) -> dict[str, str | float]:
    """Time a command and, separately, its imports."""
    runs = [measure(command) for _ in range(repeats)]
    imports_s = statistics.median(measure(imports).seconds for _ in range(repeats))
    command_s = statistics.median(run.seconds for run in runs)
    return {
        "program": program,
        "command_s": command_s,
        "imports_s": imports_s,
        "compute_s": command_s - imports_s,
        "peak_gb": max(run.peak_gb for run in runs),
    }


def time_study(
    root: Path, chi: Path, n_participants: int, *, options: Sequence[str], n_scans: int
) -> dict[str, str | int | float]:
    """Start a study whose participants share a map, and follow its main process until scan `n_scans` has started.

    For Linux, whose process table is read.
    """
    root.mkdir()
    shutil.copyfile(chi, root / chi.name)
    for number in range(n_participants):
        anat = root / "ds" / f"sub-{number:05d}" / "anat"
        anat.mkdir(parents=True)
        (anat / f"sub-{number:05d}_Chimap.json").write_text('{"Units": "ppm"}', encoding="utf-8")
        os.link(root / chi.name, anat / f"sub-{number:05d}_Chimap.nii.gz")
    (root / "ds" / "dataset_description.json").write_text('{"Name": "One map", "BIDSVersion": "1.10.0"}')
    command = [sys.executable, "-m", "bids_dgmseg", str(root / "ds"), str(root / "out"), "participant", *options]
    started = time.monotonic()
    seen: list[tuple[float, float, float]] = []
    run = subprocess.Popen([*command, "-w", str(root / "work")], stdout=subprocess.PIPE, text=True)
    for line in run.stdout or ():
        if line.endswith(": prepare\n") and len(seen) < n_scans:
            now_s, table = time.monotonic() - started, Path(f"/proc/{run.pid}/stat").read_text().rpartition(")")[2]
            user, system, pages = (int(table.split()[field]) for field in (11, 12, 21))  # proc(5)
            cpu_s, memory = (user + system) / os.sysconf("SC_CLK_TCK"), pages * os.sysconf("SC_PAGE_SIZE")
            seen.append((now_s, cpu_s, memory / 1e9))
            if len(seen) == n_scans < n_participants:
                run.terminate()
    run.wait()
    seconds, used_s, memory_gb = zip(*seen, strict=True)
    return {
        "participants": n_participants,
        "options": " ".join(options) or "default",
        "first_scan_s": seconds[0],
        "scan_s": (seconds[-1] - seconds[0]) / max(len(seen) - 1, 1),
        "scan_cpu_s": (used_s[-1] - used_s[0]) / max(len(seen) - 1, 1),
        "memory_gb": memory_gb[len(seen) // 4],
        "last_memory_gb": memory_gb[-1],
    }


def time_convolutions(root: Path, chi: Path, *, repeats: int = 3) -> pd.DataFrame:
    """Measure CPU seconds of the networks' convolutions, of `segment_map` and of the app for one scan; medians."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from bids_dgmseg.cli.bids_app import main as app
    from bids_dgmseg.models.registry import get_model
    from bids_dgmseg.segmentation.segment import segment_map

    torch.set_num_threads(1)
    anat = root / "sub-01" / "anat"
    anat.mkdir(parents=True)
    shutil.copyfile(chi, anat / f"sub-01_Chimap{''.join(chi.suffixes[-2:])}")
    (root / "dataset_description.json").write_text('{"Name": "One map", "BIDSVersion": "1.10.0"}')
    arguments = [
        str(root),
        str(root / "derivatives" / "dgmseg"),
        "participant",
        "--nprocs",
        "1",
        "--skip-bids-validation",
        "--force",
    ]
    volume, model = Volume.read(chi), get_model("default")

    def cpu_s(run: Callable[[], object]) -> float:
        started = time.process_time()
        run()
        return time.process_time() - started

    def segment() -> None:
        segment_map(volume, model)

    app(arguments)
    seconds = {
        "segment": statistics.median(cpu_s(segment) for _ in range(repeats)),
        "app": statistics.median(cpu_s(lambda: app(arguments)) for _ in range(repeats)),
    }
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        started = time.perf_counter()
        busy_s = cpu_s(segment)
        wall_s = time.perf_counter() - started
    convolutions_s = sum(event.self_cpu_time_total for event in profiled.key_averages() if event.key in _PRODUCTS) / 1e6
    seconds["convolutions"] = convolutions_s * busy_s / wall_s  # the profiler measures wall time
    table = pd.DataFrame({"step": seconds.keys(), "cpu_s": seconds.values()})
    return table.assign(ratio_to_convolutions=table["cpu_s"] / seconds["convolutions"])


def _peer_commands(root: Path, chi: Path, *, mirroring: bool) -> tuple[list[str], list[str]]:
    """Prepare input and model folder of nnU-Net; return its command and one that only imports."""
    images, model, script = root / "images", root / "peer", root / "peer.py"
    images.mkdir()
    nib.save(nib.load(chi), images / "case_0000.nii.gz")
    write_peer(model, mirroring=mirroring)
    script.write_text(_PEER, encoding="utf-8")
    command = [
        sys.executable,
        str(script),
        "-i",
        str(images),
        "-o",
        str(root / "peer_out"),
        "-m",
        str(model),
        "-f",
        "0",
        "-device",
        "cpu",
        "-npp",
        "1",
        "-nps",
        "1",
    ]
    return [*command, *([] if mirroring else ["--disable_tta"])], [*command[:2], "imports"]


def write_peer(folder: Path, *, mirroring: bool) -> None:
    """Write an nnU-Net model folder with an untrained network of the default plan."""
    import torch
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    plans = _plans()
    architecture = plans["configurations"]["3d_fullres"]["architecture"]
    torch.manual_seed(0)
    network = get_network_from_plans(
        architecture["network_class_name"],
        architecture["arch_kwargs"],
        architecture["_kw_requires_import"],
        1,
        _N_CLASSES,
        deep_supervision=False,
    )
    (folder / "fold_0").mkdir(parents=True)
    torch.save(
        {
            "network_weights": network.state_dict(),
            "trainer_name": "nnUNetTrainer",
            "init_args": {"configuration": "3d_fullres"},
            "inference_allowed_mirroring_axes": (0, 1, 2) if mirroring else None,
        },
        folder / "fold_0" / "checkpoint_final.pth",
    )
    labels = {"background": 0, **{f"nucleus {number}": number for number in range(1, _N_CLASSES)}}
    dataset = {"channel_names": {"0": "QSM"}, "labels": labels, "numTraining": 1, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(dataset), encoding="utf-8")
    (folder / "plans.json").write_text(json.dumps(plans), encoding="utf-8")


def _plans() -> dict[str, Any]:
    n_stages = len(_FEATURES)
    resampling = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    configuration = {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": [128, 128, 128],
        "median_image_size_in_voxels": [176, 208, 176],
        "spacing": [1.0, 1.0, 1.0],
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": resampling,
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_seg_kwargs": {**resampling, "is_seg": True, "order": 1},
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": {**resampling, "order": 1},
        "batch_dice": False,
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": {
                "n_stages": n_stages,
                "features_per_stage": _FEATURES,
                "conv_op": "torch.nn.modules.conv.Conv3d",
                "kernel_sizes": [[3, 3, 3]] * n_stages,
                "strides": [[1, 1, 1], *[[2, 2, 2]] * (n_stages - 1)],
                "n_conv_per_stage": [2] * n_stages,
                "n_conv_per_stage_decoder": [2] * (n_stages - 1),
                "conv_bias": True,
                "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
                "norm_op_kwargs": {"eps": 1e-05, "affine": True},
                "dropout_op": None,
                "dropout_op_kwargs": None,
                "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": {"inplace": True},
            },
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
    }
    return {
        "dataset_name": "Dataset001_QSM",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [1.0, 1.0, 1.0],
        "original_median_shape_after_transp": [176, 208, 176],
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {"3d_fullres": configuration},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": {}},
    }


if __name__ == "__main__":
    raise SystemExit(main())
