"""Accuracy on maps that have nothing but people's labels in common with the simulation of the training.

    python benchmarks/plain_heads.py HEADS [--model MODEL] [--weights FOLDER] [--heads N] [--accumbens RATIO] [--seed S]

``HEADS`` is the folder of labelled heads of `workflows/make_template`; half of the maps are drawn from the heads with
the smallest lateral ventricles, half from those with the largest. Each structure has one susceptibility; the field gets
white noise and is divided in k-space by a truncated dipole kernel, at 1 mm. Networks can take the accumbens for the
caudate: ``--accumbens`` is the ratio of their susceptibilities.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from reporting import markdown
from scipy import fft, ndimage

from bids_dgmseg.arguments import non_negative_float, positive_int
from bids_dgmseg.errors import InputError, run_command
from bids_dgmseg.image.grids import box_of_mask, resample, world_grid
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.models.registry import Model, get_model
from bids_dgmseg.models.structures import STRUCTURES, join_parts
from bids_dgmseg.segmentation.segment import segment_map
from bids_dgmseg.stats.agreement import dice

_LATERAL_VENTRICLES = (1, 2, 18, 19)

_LABELS_OF = {"CN": (9, 10), "PUT": (11, 12), "GP": (13, 14), "NAC": (7, 8), "THA": (16, 17)}
"""Nucleus → left and right label of a head."""

_PPM = {"CN": 0.045, "PUT": 0.055, "GP": 0.13, "THA": 0.005}
_FLUID_PPM, _BRAINSTEM_PPM, _CORTEX_PPM, _WHITE_MATTER_PPM = 0.0, -0.01, 0.01, -0.03
_FLUID, _BRAINSTEM = (*_LATERAL_VENTRICLES, 3, 4, 5, 6), (15, 24, 25, 26, 27, 28)
_GREY_MATTER, _CEREBELLAR_WHITE_MATTER = (20, 21, 22, 23, 29, 30), (31, 32)

_BRAIN_MARGIN_MM, _ROUNDING_MM, _CORTEX_MM, _AIR_MM = 30, 5, 4, 40
_TEXTURE_PPM, _TEXTURE_MM, _FIELD_NOISE_PPM = 0.006, 1.5, 0.0015
_THRESHOLD = 0.19
"""Smallest absolute value of the truncated dipole kernel."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the Dice of each map."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="HEADS", type=Path)
    parser.add_argument("--model", default="default")
    parser.add_argument("--weights", type=Path, help="weights folder (default: those shipped with the model)")
    parser.add_argument("--heads", type=positive_int, default=8, help="number of heads (default: 8)")
    parser.add_argument(
        "--accumbens", type=non_negative_float, default=0.8, metavar="RATIO", help="relative to CN (default: 0.8)"
    )
    parser.add_argument("--seed", type=int, default=1, help="random seed (default: 1)")
    args = parser.parse_args(argv)
    return run_command("plain_heads", lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    model, rows = get_model(args.model), []
    fluid_ml = {path: ventricles_ml(Volume.read(path)) for path in sorted(args.folder.glob("*.nii*"))}
    if not fluid_ml:
        raise InputError(f"{args.folder}: contains no NIfTI files; pass the folder of the labelled heads")
    paths = sorted(fluid_ml, key=lambda path: fluid_ml[path])
    n_heads = min(args.heads, len(paths))
    n_wide = n_heads // 2
    for index, path in enumerate([*paths[: n_heads - n_wide], *paths[len(paths) - n_wide :]]):
        head, generator = Volume.read(path), np.random.default_rng([args.seed, index])
        chi, truth = draw_map(head, {**_PPM, "NAC": args.accumbens * _PPM["CN"]}, generator)
        scores = score(chi, truth, model, args.weights)
        rows.append({"head": path.name.split("_")[0], "ventricles, ml": fluid_ml[path], **scores})
    table = pd.DataFrame(rows).set_index("head")
    table.loc["**mean**"] = table.mean()
    print(markdown(table.rename_axis("Dice"), {"ventricles, ml": 1, "accumbens labelled CN, ml": 2}))
    return 0


def ventricles_ml(head: Volume) -> float:
    """Return the volume of the lateral ventricles."""
    return head.volume_ml(np.isin(head.array, _LATERAL_VENTRICLES))


def draw_map(
    head: Volume, ppm: Mapping[str, float], generator: np.random.Generator
) -> tuple[Volume, NDArray[np.uint8]]:
    """Draw a map in ppm with voxels of 1 mm, and its true labels, numbered as in structures.tsv."""
    box = box_of_mask(head.with_array(head.array > 0)).expanded(_AIR_MM)
    labels_mm = resample(head, world_grid(box, (1.0, 1.0, 1.0)), order=0)
    labels = labels_mm.array.astype(np.uint8)
    brain = _brain(labels > 0)
    chi = np.where(brain, _WHITE_MATTER_PPM, 0.0)
    chi[brain & (ndimage.distance_transform_edt(brain) < _CORTEX_MM)] = _CORTEX_PPM
    gain = generator.uniform(0.7, 1.3)  # iron
    values: dict[tuple[int, ...], float] = {
        _FLUID: _FLUID_PPM,
        _BRAINSTEM: _BRAINSTEM_PPM,
        _GREY_MATTER: _CORTEX_PPM,
        _CEREBELLAR_WHITE_MATTER: _WHITE_MATTER_PPM,
        **{_LABELS_OF[name]: gain * value for name, value in ppm.items()},
    }
    for numbers, value in values.items():
        chi[np.isin(labels, numbers)] = value
    texture = ndimage.gaussian_filter(generator.standard_normal(chi.shape), _TEXTURE_MM)
    chi += brain * _TEXTURE_PPM * texture / texture.std()
    truth = np.zeros_like(labels)
    for name, numbers in _LABELS_OF.items():
        for structure, value in zip(_numbers(name), numbers, strict=True):
            truth[labels == value] = structure
    return labels_mm.with_array(_invert_field(chi, brain, generator).astype(np.float32)), truth


def _brain(labelled: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return a smooth brain mask around the labels, which end below the cortex."""
    around = ndimage.distance_transform_edt(~labelled) < _BRAIN_MARGIN_MM + _ROUNDING_MM
    brain: NDArray[np.bool_] = ndimage.distance_transform_edt(around) > _ROUNDING_MM
    return brain


def _invert_field(
    chi: NDArray[np.float64], brain: NDArray[np.bool_], generator: np.random.Generator
) -> NDArray[np.float64]:
    """Compute the field of a susceptibility (ppm) with noise, and divide it by the truncated kernel (Shmueli 2009)."""
    x, y, z = np.meshgrid(*(fft.fftfreq(size) for size in chi.shape[:2]), fft.rfftfreq(chi.shape[2]), indexing="ij")
    squared = x**2 + y**2 + z**2
    kernel = 1 / 3 - np.divide(z**2, squared, out=np.full_like(squared, 1 / 3), where=squared > 0)
    field = fft.irfftn(fft.rfftn(chi) * kernel, chi.shape) + generator.normal(0, _FIELD_NOISE_PPM, chi.shape)
    truncated = np.where(kernel < 0, -1, 1) * np.maximum(np.abs(kernel), _THRESHOLD)
    chi_map: NDArray[np.float64] = fft.irfftn(fft.rfftn(field * brain) / truncated, chi.shape) * brain
    return chi_map


def score(chi: Volume, truth: NDArray[np.uint8], model: Model, weights: Path | None) -> dict[str, float]:
    """Segment a map; return the Dice of each nucleus, mean of left and right, and the accumbens labelled as caudate."""
    labels = join_parts(segment_map(chi, model, weights=weights).labels)
    nuclei = [structure for structure in model.with_whole_nuclei().structures if structure.nucleus in _LABELS_OF]
    table = dice(truth, labels, structures=nuclei)
    caudate, accumbens = (np.isin(array, _numbers(name)) for array, name in ((labels, "CN"), (truth, "NAC")))
    return {
        **{
            str(name): rows.mean()
            for name, rows in table["dice"].groupby([structure.nucleus for structure in nuclei], sort=False)
        },
        "accumbens labelled CN, ml": chi.volume_ml(caudate & accumbens),
    }


def _numbers(nucleus: str) -> list[int]:
    return [structure.index for structure in STRUCTURES.both_sides([nucleus])]


if __name__ == "__main__":
    raise SystemExit(main())
