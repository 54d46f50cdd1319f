"""Accuracy and cost of the methods that reconstruct chi maps, and accuracy of segmentations on these maps.

    python benchmarks/reconstruction.py --template LABELS.nii.gz [--heads N] [--seed S] [--spacing MM] [--out FILE.tsv]
    python benchmarks/reconstruction.py --dataset BIDS_DIR [--tissues DIR] [--masks true]
    python benchmarks/reconstruction.py --template LABELS.nii.gz --spacing 1 --export DIR
    python benchmarks/reconstruction.py --invivo FOLDER [--snr 60]
    python benchmarks/reconstruction.py --memory

Simulates echoes of heads at 3 T and reconstructs them. The table gives means over
heads, in the mask of the map: correlation with the true susceptibility, NRMSE, HFEN (NRMSE of the Laplacian of
Gaussian) and XSIM; slope of the contrast of nuclei to their surroundings against the true one, mean and largest error
of a contrast; Dice with the true labels (``--dice``, also on the true map); CPU seconds. A second table gives the
errors of each nucleus.
``--invivo`` reads a real head (see ``invivo.py``), and makes echoes of its measured field, without and with a
background of 0.15 ppm; with ``--dice``, volumes of nuclei in all its maps, also those of other methods of inversion.
``--memory`` compares the peak memory of processes with the estimate.

``--dataset`` reads heads of another forward model, whose truth is sampled at the centres of voxels; with ``--tissues``
it is averaged over voxels as the signal is, by cropping its spectrum. ``--export`` writes the tissues of the heads as
qsm-forward (GPL, in an environment of its own) reads them, one folder per head:

    qsm-forward head DIR/1 BIDS_DIR --subject 1 --B0 3 --TEs 0.005 0.01 0.015 0.02 --voxel-size 2 2 2 --peak-snr 100

Its field is computed on the finer grid of the export, and its echoes are cropped in k-space to larger voxels.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from invivo import compare_volumes, draw_real_echoes, invert_measured_field, read_head, score_real_map
from numpy.typing import NDArray
from reporting import markdown
from scipy import ndimage, signal
from skimage.metrics import structural_similarity

from bids_dgmseg.arguments import positive_float, positive_int, seed
from bids_dgmseg.errors import InputError, run_command
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.lab.simulate.acquisition import Echoes, draw_echoes, draw_tissues
from bids_dgmseg.lab.simulate.sample import draw_head, nuclei_labels, read_training_head
from bids_dgmseg.lab.simulate.simulated_dataset import scanner_grid, whole_head_view
from bids_dgmseg.models.registry import get_model
from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.qsm.inversion import Acquisition, Methods
from bids_dgmseg.qsm.reconstruct import Reconstruction, estimate_memory_gb, reconstruct_chi
from bids_dgmseg.segmentation.segment import segment_map
from bids_dgmseg.stats.overlap import dice

_FIRST_SEED = 4 * 10**13
"""Of heads not used in training."""
_SURROUNDINGS_MM = 4.0
_MIN_TISSUE = 0.5
"""A contrast counts if at least this fraction of the surroundings is tissue, not nuclei or background."""

SIZES = (
    ((64, 192, 128), (1.0, 1.0, 1.0), 4),
    ((160, 192, 128), (1.0, 1.0, 1.0), 2),
    ((160, 192, 128), (1.0, 1.0, 1.0), 8),
    ((256, 256, 160), (0.9, 0.9, 1.0), 4),
    ((256, 256, 48), (0.9, 0.9, 3.0), 5),
)
"""Shape, voxel size in mm and number of echoes."""

Inputs = Callable[[Echoes, NDArray[np.bool_], Sequence[float]], Mapping[str, Any]]
"""Map echoes, the true brain mask and the voxel size in mm to arguments of `reconstruct_chi`."""

Case = tuple[Echoes, Volume]
"""Echoes of a head with its true susceptibility, and its labels."""


def main(argv: Sequence[str] | None = None) -> int:
    """Compare reconstructions, or measured and estimated memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--template", type=Path, help="label template from workflows/make_template")
    what.add_argument("--dataset", type=Path, help="dataset of qsm-forward")
    what.add_argument("--invivo", type=Path, help="folder of a real head with a measured field")
    what.add_argument("--memory", action="store_true", help="compare measured and estimated memory")
    parser.add_argument("--heads", type=positive_int, default=4, help="number of heads (default: %(default)s)")
    parser.add_argument("--seed", type=seed, default=1)
    parser.add_argument("--spacing", type=positive_float, default=1.0, help="voxel size in mm (default: %(default)s)")
    parser.add_argument("--snr", type=positive_float, default=60.0, help="with --invivo (default: %(default)s)")
    parser.add_argument(
        "--outside",
        nargs="+",
        type=float,
        default=[0.0, 0.15],
        metavar="PPM",
        help="with --invivo: SD in the brain of the field of sources outside (default: 0 0.15)",
    )
    parser.add_argument("--export", type=Path, help="write the tissues of the heads for qsm-forward into this folder")
    parser.add_argument("--tissues", type=Path, help="the folder of --export from which --dataset was made")
    parser.add_argument("--masks", nargs="+", choices=INPUTS, help="inputs (default: all; with --invivo: true)")
    parser.add_argument(
        "--weights", nargs="+", type=positive_float, default=[1.0], help="multiples of the default λ (default: 1)"
    )
    parser.add_argument("--dice", action="store_true", help="segment every map with the shipped model")
    parser.add_argument("--out", type=Path, help="write all results as TSV")
    args = parser.parse_args(argv)
    return run_command("reconstruction", lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    if args.memory:
        return _compare_memory()
    if args.invivo:
        return _run_real_head(args)
    if args.export:
        return _export(args)
    rows = []
    for head, (echoes, truth) in enumerate(
        read_cases(args.dataset, args.tissues) if args.dataset else _draw_cases(args), 1
    ):
        if args.dice:
            true_chi = echoes.chi.numpy()
            scores = score(truth.with_array(true_chi), truth.array > 0, true_chi, truth, segmented=True)
            rows.append({"head": head, "mask": "true map", "weight": "", **scores, "cpu_s": 0.0})
        for mask in args.masks or INPUTS:
            options = INPUTS[mask](echoes, truth.array > 0, truth.voxel_size_mm)
            for weight, result, seconds in _vary_weight(options, Methods(), args.weights):
                result_ppm = truth.with_array(result.chi_ppm)
                scores = score(result_ppm, result.mask, echoes.chi.numpy(), truth, segmented=args.dice)
                rows.append({"head": head, "mask": mask, "weight": weight, **scores, "cpu_s": seconds})
                sys.stderr.write(f"head {head}: {mask}, {weight}\n")
                if args.out:
                    pd.DataFrame(rows).to_csv(args.out, sep="\t", index=False)
    print(*as_markdown(pd.DataFrame(rows)), sep="\n\n")
    return 0


def _run_real_head(args: argparse.Namespace) -> int:
    head, rows = read_head(args.invivo), []
    maps = {**head.maps, **(invert_measured_field(head) if args.dice else {})}
    for background_ppm in args.outside:
        echoes = draw_real_echoes(head, snr=args.snr, background_ppm=background_ppm, seed=args.seed)
        for mask in args.masks or ["true"]:
            methods = Methods(phase_sign="positive")
            options = INPUTS[mask](echoes, head.brain, head.field.voxel_size_mm)
            for weight, result, seconds in _vary_weight(options, methods, args.weights):
                rows.append(
                    {
                        "field outside, ppm": background_ppm,
                        "mask": mask,
                        "weight": weight,
                        **score_real_map(result.chi_ppm, result.mask, head),
                        "misfit / noise": result.misfit_ppm / result.noise_ppm,
                        "CPU s": seconds,
                    }
                )
                maps[f"reconstruct: {mask} mask, {weight:g} λ, {background_ppm:g} ppm outside"] = result.chi_ppm
                sys.stderr.write(f"{rows[-1]}\n")
                if args.out:
                    pd.DataFrame(rows).to_csv(args.out, sep="\t", index=False)
    if args.dice:
        print(markdown(compare_volumes(head, maps), 1), end="\n\n")
    table = pd.DataFrame(rows)
    digits = {name: 1 if name.endswith(("%", "ppb")) else 0 if name == "CPU s" else 2 for name in map(str, table)}
    print(markdown(table, {**digits, "COSMOS: r": 3, "chi33: r": 3}))
    return 0


def _vary_weight(
    options: Mapping[str, Any], methods: Methods, weights: Sequence[float]
) -> Iterator[tuple[float, Reconstruction, float]]:
    """Reconstruct with multiples of the default weight; yield the multiple, the result and CPU seconds."""
    default = None
    for weight in weights:
        if weight != 1 and default is None:
            default = reconstruct_chi(**options, methods=methods).regularization
        started = time.process_time()
        fixed = None if weight == 1 or not default else weight * default
        result = reconstruct_chi(**options, methods=replace(methods, regularization=fixed))
        default = result.regularization if weight == 1 else default
        yield weight, result, time.process_time() - started


def _draw_brains(args: argparse.Namespace) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Generator]]:
    head, view = read_training_head(args.template), whole_head_view(args.spacing)
    for number in range(args.heads):
        generator = torch.Generator().manual_seed(_FIRST_SEED + 1_000_000 * args.seed + number)
        yield *draw_head([(head, 1.0)], view, generator), generator


def _draw_cases(args: argparse.Namespace) -> Iterator[Case]:
    affine = scanner_grid(whole_head_view(args.spacing)).affine
    for chi, labels, generator in _draw_brains(args):
        echoes = draw_echoes(chi, labels, voxel_size_mm=(args.spacing,) * 3, generator=generator)
        yield echoes, Volume(labels.numpy(), affine)


def _export(args: argparse.Namespace) -> int:
    """Write the tissues of each head under the names that qsm-forward expects."""
    affine = np.diag([args.spacing] * 3 + [1.0])  # it writes the truth on a grid that starts at the origin
    for number, (chi, labels, generator) in enumerate(_draw_brains(args), 1):
        tissues = draw_tissues(chi, labels, voxel_size_mm=(args.spacing,) * 3, generator=generator)
        maps = {
            "chimodel/ChiModelMIX.nii": tissues.chi,
            "maps/M0.nii.gz": tissues.density,
            "maps/R1.nii.gz": torch.ones_like(chi),
            "maps/R2star.nii.gz": tissues.r2star,
            "masks/BrainMask.nii.gz": (labels > 0).to(torch.uint8),
            "masks/SegmentedModel.nii.gz": labels,
        }
        for name, image in maps.items():
            path = args.export / str(number) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            nib.Nifti1Image(image.numpy(), affine).to_filename(path)
    return 0


def read_cases(dataset: Path, tissues: Path | None = None) -> Iterator[Case]:
    """Read the echoes and the truth of a dataset of qsm-forward; B0 is along z.

    With `tissues`, the truth is the exported susceptibility in the brain, averaged over voxels by cropping its
    spectrum.
    """
    folders = sorted(dataset.glob("sub-*/anat"))
    if not folders:
        raise InputError(f"{dataset}: no sub-*/anat folders; pass a dataset that qsm-forward wrote")
    for folder in folders:
        phases = sorted(folder.glob("*_part-phase_MEGRE.nii"))
        sidecars = [json.loads(path.with_suffix(".json").read_text()) for path in phases]
        images = [[Volume.read(str(path).replace("phase", part)) for path in phases] for part in ("phase", "mag")]
        phase, magnitude = (torch.from_numpy(np.stack([image.array for image in part])) for part in images)
        truth = dataset / "derivatives" / "qsm-forward" / folder.parent.name / "anat"
        chi, labels, mask = (Volume.read(next(truth.glob(f"*_{name}.nii"))) for name in ("Chimap", "dseg", "mask"))
        brain = mask.array > 0.5
        times_s = tuple(float(sidecar["EchoTime"]) for sidecar in sidecars)
        b0_tesla = float(sidecars[0]["MagneticFieldStrength"])
        true_chi = chi.array
        if tissues:
            fine = tissues / folder.parent.name.removeprefix("sub-")
            inner = Volume.read(fine / "masks" / "BrainMask.nii.gz").array > 0
            true_chi = np.where(inner, Volume.read(fine / "chimodel" / "ChiModelMIX.nii").array, np.float32(0))
            for axis, size in enumerate(brain.shape):
                true_chi = signal.resample(true_chi, size, axis=axis).astype(np.float32)
        yield (
            Echoes(phase, magnitude, times_s, b0_tesla, torch.from_numpy(np.where(brain, true_chi, np.float32(0)))),
            labels.with_array(np.where(brain, np.rint(labels.array), 0).astype(np.uint8)),
        )


def _compare_memory() -> int:
    rows = []
    for shape, edges_mm, n_echoes in SIZES:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
            cost = fresh.submit(measure_ellipsoid, shape, edges_mm, n_echoes).result()
        rows.append(
            {
                "voxels": " × ".join(map(str, shape)),
                "voxel size, mm": " × ".join(map(str, edges_mm)),
                "echoes": n_echoes,
                "estimated, GB": estimate_memory_gb(shape, edges_mm, n_echoes=n_echoes),
                "measured, GB": cost["peak_gb"],
                "CPU s": cost["cpu_s"],
            }
        )
        sys.stderr.write(f"{rows[-1]}\n")
    print(markdown(pd.DataFrame(rows), 1))
    return 0


def measure_ellipsoid(
    shape: tuple[int, int, int], edges_mm: tuple[float, float, float], n_echoes: int
) -> dict[str, float]:
    """Reconstruct an ellipsoid with a linear field and noise; return the cost of the process."""
    random = np.random.default_rng(0)
    sides = (np.linspace(-1.15, 1.15, size, dtype=np.float32) for size in shape)
    x, y, z = np.meshgrid(*sides, indexing="ij", sparse=True)
    inside = x**2 + y**2 + z**2 < 1
    rate = 4 * z + 0.05 * random.standard_normal(shape, np.float32)
    phase, magnitude = (np.empty((n_echoes, *shape), np.float32) for _ in range(2))
    for echo in range(n_echoes):
        phase[echo] = np.remainder(rate * (echo + 1) + math.pi, 2 * math.pi) - math.pi
        magnitude[echo] = 100 * inside + random.random(shape, np.float32)
    del rate
    times_s = [0.005 * (echo + 1) for echo in range(n_echoes)]
    started = time.process_time()
    reconstruct_chi(phase, magnitude, Acquisition(times_s, 3.0, edges_mm), mask=inside)
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return {"peak_gb": peak_gb, "cpu_s": time.process_time() - started}


def _all_echoes(echoes: Echoes, brain: NDArray[np.bool_], size_mm: Sequence[float]) -> dict[str, Any]:
    return _some_echoes(echoes, range(len(echoes.echo_times_s)), size_mm)


def _true_mask(echoes: Echoes, brain: NDArray[np.bool_], size_mm: Sequence[float]) -> dict[str, Any]:
    return {**_all_echoes(echoes, brain, size_mm), "mask": brain}


def _last_echo(echoes: Echoes, brain: NDArray[np.bool_], size_mm: Sequence[float]) -> dict[str, Any]:
    return _some_echoes(echoes, [len(echoes.echo_times_s) - 1], size_mm)


def _some_echoes(echoes: Echoes, which: Sequence[int], size_mm: Sequence[float]) -> dict[str, Any]:
    return {
        "phase": echoes.phase[list(which)].numpy(),
        "magnitude": echoes.magnitude[list(which)].numpy(),
        "acquisition": Acquisition([echoes.echo_times_s[echo] for echo in which], echoes.b0_tesla, size_mm),
    }


INPUTS: Mapping[str, Inputs] = {"found": _all_echoes, "true": _true_mask, "last-echo": _last_echo}
"""All echoes with the mask found in the magnitude or the true one; the last echo only, with a mask that is found."""


def score(
    result_ppm: Volume, mask: NDArray[np.bool_], chi: NDArray[np.float32], truth: Volume, *, segmented: bool = False
) -> dict[str, float]:
    """Compare a map with the truth, where both are known; with `segmented` also the model's labels on it."""
    inside = mask & (truth.array > 0)
    true, map_ppm = (np.where(inside, image - image[inside].mean(), np.float32(0)) for image in (chi, result_ppm.array))
    contrasts = contrasts_ppm(truth, (chi, result_ppm.array))
    pairs = np.array(list(contrasts.values()))
    errors = pairs[:, 1] - pairs[:, 0]
    edges, true_edges = (ndimage.gaussian_laplace(image, 1.5) for image in (map_ppm, true))
    scores = {
        "correlation": float(np.corrcoef(true[inside], map_ppm[inside])[0, 1]),
        "nrmse_percent": relative_error_percent(map_ppm, true, inside),
        "hfen_percent": relative_error_percent(edges, true_edges, inside),
        "xsim": xsim(map_ppm, true, inside),
        "slope": float(np.polyfit(pairs[:, 0], pairs[:, 1], 1)[0]),
        "mean_error_ppb": 1000 * float(np.abs(errors).mean()),
        "largest_error_ppb": 1000 * float(np.abs(errors).max()),
    }
    if segmented:
        model, nuclei = get_model("default"), truth.with_array(nuclei_labels(torch.from_numpy(truth.array)).numpy())
        overlap = dice(nuclei.array, segment_map(result_ppm, model).labels, structures=model.structures)
        scores["dice"] = float(overlap["dice"].mean())
    for name, error in zip(contrasts, errors, strict=True):
        scores[f"error_{name}_ppb"] = 1000 * float(error)
    return scores


def relative_error_percent(
    result_ppm: NDArray[np.float32], true: NDArray[np.float32], inside: NDArray[np.bool_]
) -> float:
    """Norm of the difference in a mask, relative to that of the truth, in percent."""
    return float(100 * np.linalg.norm((result_ppm - true)[inside]) / np.linalg.norm(true[inside]))


def xsim(result_ppm: NDArray[np.float32], true: NDArray[np.float32], inside: NDArray[np.bool_]) -> float:
    """Structural similarity of maps in ppm in a mask, with constants for susceptibility.

    Its constants are (0.01 ppm)² and (0.001 ppm)², its window is a Gaussian of 1.5 voxels, 7 voxels wide.

    References
    ----------
    Milovic C, et al. XSIM: A structural similarity index measure optimized for MRI QSM. Magn Reson Med (2024).
    doi:10.1002/mrm.30271
    """
    options = {"gaussian_weights": True, "sigma": 1.5, "truncate": 2.0, "use_sample_covariance": False}
    _, similarity = structural_similarity(result_ppm, true, data_range=1.0, K1=0.01, K2=0.001, full=True, **options)
    return float(similarity[inside].mean())


def contrasts_ppm(truth: Volume, maps: Sequence[NDArray[np.float32]]) -> dict[str, tuple[float, ...]]:
    """Measure the contrast of each nucleus to the tissue within 4 mm, in each of several maps."""
    contrasts = {}
    for structure in STRUCTURES:
        nucleus = truth.array == structure.index
        near = ndimage.distance_transform_edt(~nucleus, sampling=truth.voxel_size_mm) <= _SURROUNDINGS_MM
        around = near & (truth.array > len(STRUCTURES))
        if nucleus.any() and around.sum() > _MIN_TISSUE * (near & ~nucleus).sum():
            values = tuple(float(chi[nucleus].mean() - chi[around].mean()) for chi in maps)
            contrasts[structure.abbreviation] = values
    return contrasts


def as_markdown(table: pd.DataFrame) -> tuple[str, str]:
    """Format the means over heads, one row per method: all scores, and the errors of nuclei, both sides averaged."""
    methods = ["mask", "weight"]
    means = table.drop(columns="head").groupby(methods, sort=False).mean().reset_index()
    scores = means.filter(regex="^(?!error_)")
    digits = {"slope": 2, "cpu_s": 0, **dict.fromkeys(map(str, scores.filter(regex="_(percent|ppb)$")), 1)}
    errors = means.filter(regex="^error_").rename(columns=lambda name: name.split("_")[1])
    nuclei = errors.T.groupby(level=0, sort=False).mean().T
    return markdown(scores, digits), markdown(pd.concat([means[methods], nuclei], axis=1), 1)


if __name__ == "__main__":
    raise SystemExit(main())
