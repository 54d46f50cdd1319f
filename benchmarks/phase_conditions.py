"""Reconstruction of chi maps under the conditions of real scanners: accuracy, and what the program says.

    python benchmarks/phase_conditions.py FOLDER [--labels DSEG.nii.gz] [--cases REGEX] [--seed S] [--out FILE.tsv]

FOLDER is that of a real head (see ``invivo.py``). Its COSMOS map, in a head with three balls of air (9.4 ppm) and air
around it, gives the field on the grid of the map; the complex signal is averaged over 2 x 2 x 2 voxels. Scores are
those of the map against the averaged COSMOS map where both are known: r, NRMSE, and the mean absolute error of the
contrasts of seven nuclei (labels of the COSMOS map, by default from the default model) with the tissue more than 10 mm
deep.
``error / SD`` is that of the means of all nuclei over the SD that the program states, from noise and from choices.
The last column gives problems (the map is refused), errors and warnings; cases are *good* (nothing should be said),
*hard* (should be as good as can be) or *bad* (something must be said).
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from invivo import read_head
from numpy.typing import NDArray
from reporting import markdown
from scipy import ndimage

from bids_dgmseg.arguments import seed
from bids_dgmseg.errors import InputError, run_command
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.measurement.nuclei import measure_nuclei, measure_uncertainty
from bids_dgmseg.models.registry import get_model
from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.qsm.field import GYROMAGNETIC_MHZ_PER_T, dipole_field
from bids_dgmseg.qsm.inversion import Acquisition, Methods, noise_of_mean
from bids_dgmseg.qsm.reconstruct import Reconstruction, describe_reconstruction, list_warnings, reconstruct_chi
from bids_dgmseg.segmentation.segment import segment_map

AIR_PPM, SKULL_MM, SCALP_MM, R2STAR_HZ = 9.4, 6.0, 15.0, 20.0
_BALLS = ((12.0, (0, 60, -25)), (8.0, (62, -8, -40)), (8.0, (-62, -8, -40)))
"""Radius in mm, and direction from the centre of the brain, near whose border the ball lies."""
_GAP_MM = 7.0
_SOURCE_MM = (22.0, 18.0, 22.0)
"""Position of a haemorrhage or calcification from the centre of the brain."""
_NUCLEI = ("CN", "PUT", "GP", "RN", "SN", "DN", "STN")
_SPACING = 6.0
_MIN_VOXELS = 8

Echoes = NDArray[np.complex64]
Change = Callable[["Scan"], Echoes]


@dataclass(frozen=True)
class Condition:
    """One way to scan and to reconstruct the head."""

    name: str
    kind: str
    times_ms: Sequence[float] = (6, 12, 18, 24)
    b0_tesla: float = 3.0
    snr: float = 60.0
    block: tuple[int, int, int] = (2, 2, 2)
    tilt_deg: tuple[float, float] = (0, 0)
    """Angle of B0 to the third axis, and azimuth."""
    assumed_tilt_deg: tuple[float, float] | None = None
    source: tuple[float, float] = (0, 0)
    """Diameter in mm and susceptibility in ppm of a strong source."""
    changes: Sequence[Change] = ()
    mask_mm: float = 0.0
    sampling: str = "average"
    """How voxels arise: ``average`` over blocks, ``crop`` of k-space as in scanners, or field on the ``same`` grid."""


@dataclass(frozen=True)
class Scan:
    """Complex echoes (E, X, Y, Z) before a change of the condition."""

    echoes: Echoes
    brain: NDArray[np.bool_]
    size_mm: tuple[float, ...]
    seed: int

    def smooth(self, sigma_mm: float, stream: int) -> NDArray[np.float32]:
        """Draw a smooth map with mean 0 and SD 1 in the brain."""
        noise = np.random.default_rng((self.seed, stream)).normal(size=self.brain.shape)
        values = ndimage.gaussian_filter(noise, [sigma_mm / step for step in self.size_mm], mode="reflect")
        return ((values - values[self.brain].mean()) / values[self.brain].std()).astype(np.float32)

    def positions(self) -> list[NDArray[np.float64]]:
        """Return coordinates of the axes from the centre of the brain, in mm."""
        centre = ndimage.center_of_mass(self.brain)
        parts = zip(np.indices(self.brain.shape), centre, self.size_mm, strict=True)
        return [(index - middle) * step for index, middle, step in parts]


def add_phase(*, only: int | None = None, line: bool = False, **options: float) -> Change:
    """Return a change that adds a smooth phase (SD, scale in mm), common or per echo, or a singular line."""

    def change(scan: Scan) -> Echoes:
        x, y, _ = scan.positions()
        turned = scan.echoes.copy()
        for number, echo in enumerate(turned):
            stream = number if options.get("per_echo") else 0
            if line:
                angle: Any = np.arctan2(y - 20, x - 30)
            elif options.get("scale_mm"):
                angle = options["sd"] * scan.smooth(options["scale_mm"], stream)
            else:
                angle = options["sd"] * np.random.default_rng((scan.seed, stream)).normal()
            if only in (None, number + 1):
                echo *= np.exp(1j * angle)
        return turned

    return change


def bipolar(linear_rad: float, quadratic_rad: float = 0.0) -> Change:
    """Return a change that alternates a phase along the second axis, of given range in the brain."""

    def change(scan: Scan) -> Echoes:
        y = scan.positions()[1]
        y = y / np.abs(y[scan.brain]).max()
        angle = linear_rad * y / 2 + quadratic_rad * y**2
        return np.stack([echo * np.exp(1j * (-1) ** n * angle) for n, echo in enumerate(scan.echoes)])

    return change


def high_pass(scan: Scan) -> Echoes:
    """Divide the phase by that of the low frequencies of k-space, as for susceptibility-weighted images."""
    slow = ndimage.gaussian_filter(scan.echoes.real, (0, 4, 4, 0)) + 1j * ndimage.gaussian_filter(
        scan.echoes.imag, (0, 4, 4, 0)
    )
    return scan.echoes * np.exp(-1j * np.angle(slow))


def reorder(*order: int) -> Change:
    """Return a change of the order of the echoes."""
    return lambda scan: scan.echoes[list(order)]


def conjugate(echoes: Callable[[int], bool]) -> Change:
    """Return a change of the sign of the phase of some echoes."""
    return lambda scan: np.stack([echo.conj() if echoes(n) else echo for n, echo in enumerate(scan.echoes)])


def magnitude_one(scan: Scan) -> Echoes:
    """Return the phase with a magnitude of 1."""
    return scan.echoes / np.abs(scan.echoes).clip(1e-6)


def list_conditions() -> list[Condition]:
    """Return all conditions."""
    evenly = {n: [_SPACING * k for k in range(1, n + 1)] for n in (2, 3, 8)}
    common = {"37 mm": 37.0, "21 mm": 21.0}
    return [
        Condition("base", "good"),
        *(Condition(f"SNR {snr}", "good", snr=snr) for snr in (20, 150)),
        Condition("1.5 T", "good", b0_tesla=1.5),
        *(Condition(f"7 T, 4 x {te} ms", "good", b0_tesla=7, times_ms=[te * n for n in range(1, 5)]) for te in (4, 6)),
        *(Condition(f"{n} echoes", "good", times_ms=times) for n, times in evenly.items()),
        Condition("2 echoes 2.4 4.8", "good", times_ms=(2.4, 4.8)),
        Condition("2 echoes 12 24", "good", times_ms=(12, 24)),
        Condition("3 echoes 4", "good", times_ms=(4, 8, 12)),
        Condition("8 echoes 3", "good", times_ms=[3 * n for n in range(1, 9)]),
        Condition("uneven", "good", times_ms=(4, 9, 17, 27)),
        *(
            Condition("voxels " + "x".join(f"{1.06 * n:.1f}" for n in block), "good", block=block)
            for block in ((1, 1, 3), (3, 1, 1), (2, 2, 3), (3, 3, 3))
        ),
        *(Condition(f"tilt {t} az {a}", "good", tilt_deg=(t, a)) for t, a in ((30, 0), (30, 53), (15, 53))),
        *(
            Condition(f"{sampling}, tilt {t} az {a}", "good", tilt_deg=(t, a), sampling=sampling)
            for sampling in ("crop", "same")
            for t, a in ((0, 0), (30, 53))
        ),
        Condition("opposite sign", "good", changes=[conjugate(lambda _: True)]),
        Condition("mask -3", "good", mask_mm=-3),
        Condition("bipolar 1", "good", changes=[bipolar(1)]),
        Condition("bipolar 3", "good", changes=[bipolar(3)]),
        Condition("bipolar 2 echoes", "good", times_ms=evenly[2], changes=[bipolar(1)]),
        Condition("constant offset per echo", "good", changes=[add_phase(sd=2, per_echo=1)]),
        Condition("magnitude 1", "good", changes=[magnitude_one]),
        Condition("line in all echoes", "good", changes=[add_phase(line=True)]),
        Condition("calcification 8", "good", source=(8, -1)),
        Condition("haemorrhage 8", "good", source=(8, 1.5)),
        *(Condition(f"offset {n}", "hard", changes=[add_phase(sd=2, scale_mm=mm)]) for n, mm in common.items()),
        Condition("mask +3", "hard", mask_mm=3),
        Condition("1 echo 20", "hard", times_ms=[20]),
        Condition("1 echo 8", "hard", times_ms=[8]),
        Condition("7 T, 1 echo 14", "hard", times_ms=[14], b0_tesla=7),
        Condition("1 echo, line", "hard", times_ms=[20], changes=[add_phase(line=True)]),
        Condition("haemorrhage 16", "hard", source=(16, 1.5)),
        Condition("bipolar quadratic", "hard", changes=[bipolar(1, 0.5)]),
        Condition("bipolar uneven", "bad", times_ms=(4, 9, 17, 27), changes=[bipolar(1)]),
        Condition("mask +6", "bad", mask_mm=6),
        Condition("offset per echo", "bad", changes=[add_phase(sd=0.3, scale_mm=21, per_echo=1)]),
        Condition("high-pass", "bad", changes=[high_pass]),
        *(Condition(f"line in echo {n}", "bad", changes=[add_phase(line=True, only=n)]) for n in (1, 2, 3, 4)),
        Condition("echo 3 opposite", "bad", changes=[conjugate(lambda echo: echo == 2)]),
        Condition("echoes 2 3 exchanged", "bad", changes=[reorder(0, 2, 1, 3)]),
        Condition("tilt 30 az 53 taken as z", "bad", tilt_deg=(30, 53), assumed_tilt_deg=(0, 0)),
    ]


class Head:
    """Tissue, air and labels on the fine grid."""

    def __init__(self, folder: Path, labels: Path | None) -> None:
        head = read_head(folder)
        self.size_mm = head.field.voxel_size_mm
        grid = head.field
        nuclei = Volume.read(labels).array if labels else None
        if nuclei is None:
            nuclei = segment_map(grid.with_array(head.maps["COSMOS"]), get_model("default")).labels
        margin = round(SCALP_MM / self.size_mm[0] / 6 + 1) * 6  # whole blocks of 1, 2 and 3 voxels

        def pad(array: NDArray[Any]) -> NDArray[Any]:
            sizes = [(margin, margin + -(size + 2 * margin) % 6) for size in array.shape]
            return np.pad(array, sizes)

        self.brain = pad(head.brain)
        self.chi = pad(np.where(head.brain, head.maps["COSMOS"], np.float32(0)))
        self.nuclei = pad(np.rint(nuclei).astype(np.int16))
        distance_mm = ndimage.distance_transform_edt(~self.brain, sampling=self.size_mm)
        self.tissue = distance_mm <= SCALP_MM
        magnitude = pad(head.magnitude) / np.median(head.magnitude[head.brain])
        self.magnitude = np.where(self.brain, magnitude, 0.5 * self.tissue * (distance_mm > SKULL_MM))
        self.axes = [
            (index - middle) * step
            for index, middle, step in zip(
                np.indices(self.brain.shape, np.float32), ndimage.center_of_mass(self.brain), self.size_mm, strict=True
            )
        ]
        for radius_mm, direction in _BALLS:
            shell = (distance_mm > radius_mm + _GAP_MM) & (distance_mm < radius_mm + _GAP_MM + 1.5)
            away = sum((axis - part) ** 2 for axis, part in zip(self.axes, direction, strict=True))
            centre = np.unravel_index(np.argmin(np.where(shell, away, np.inf)), shell.shape)
            self.tissue &= self.ball(radius_mm, [axis[centre] for axis in self.axes], outside=True)
        self.magnitude = (self.magnitude * self.tissue).astype(np.float32)

    def ball(self, radius_mm: float, centre: Sequence[float], *, outside: bool = False) -> NDArray[np.bool_]:
        """Return the voxels of a ball, or those outside."""
        inside = sum((axis - part) ** 2 for axis, part in zip(self.axes, centre, strict=True)) <= radius_mm**2
        return ~inside if outside else inside

    @lru_cache(maxsize=4)  # noqa: B019 (one head per run)
    def field_ppm(self, direction: tuple[float, float, float], source: tuple[float, float]) -> NDArray[np.float32]:
        """Return the field of all sources."""
        chi = self.chi + np.where(self.ball(source[0] / 2, _SOURCE_MM), source[1], 0) - AIR_PPM * self.tissue
        sources = torch.from_numpy(chi.astype(np.float32))
        total = dipole_field(sources, voxel_size_mm=self.size_mm, b0_direction=direction, padding=1.5).numpy()
        return total - total[self.brain].mean()

    def coarse_field_ppm(self, direction: tuple[float, float, float], block: Sequence[int]) -> NDArray[np.float32]:
        """Return the field that the program's own kernel gives for the averaged sources, repeated over the blocks."""
        sources = torch.from_numpy(average(self.chi - AIR_PPM * self.tissue, block).astype(np.float32))
        size_mm = [step * n for step, n in zip(self.size_mm, block, strict=True)]
        total = dipole_field(sources, voxel_size_mm=size_mm, b0_direction=direction).numpy()
        for axis, n in enumerate(block):
            total = total.repeat(n, axis)
        return total - total[self.brain].mean()


def direction(tilt_deg: tuple[float, float]) -> tuple[float, float, float]:
    """Return the unit vector of an angle to the third axis and an azimuth."""
    angle, azimuth = np.radians(tilt_deg)
    return (float(np.sin(angle) * np.cos(azimuth)), float(np.sin(angle) * np.sin(azimuth)), float(np.cos(angle)))


def average(array: NDArray[Any], block: Sequence[int]) -> NDArray[Any]:
    """Average over blocks."""
    x, y, z = (size // n for size, n in zip(array.shape, block, strict=True))
    return array.reshape(x, block[0], y, block[1], z, block[2]).mean(axis=(1, 3, 5))


def crop(array: NDArray[np.complex64], block: Sequence[int]) -> NDArray[np.complex64]:
    """Crop k-space to the frequencies of blocks, whose centres are the positions of the result."""
    spectrum = np.fft.fftn(array)
    for axis, (size, n) in enumerate(zip(array.shape, block, strict=True)):
        k = np.fft.fftfreq(size // n, n)
        spectrum = np.moveaxis(np.take(spectrum, np.round(k * size).astype(int) % size, axis), axis, -1)
        spectrum = np.moveaxis(spectrum * np.exp(1j * np.pi * k * (n - 1)), -1, axis)
    return np.asarray(np.fft.ifftn(spectrum) / np.prod(block), np.complex64)


def measure(head: Head, condition: Condition, seed: int) -> Scan:
    """Draw the echoes of a condition."""
    total = head.field_ppm(direction(condition.tilt_deg), condition.source)
    if condition.sampling == "same":
        total = head.coarse_field_ppm(direction(condition.tilt_deg), condition.block)
    random = np.random.default_rng(seed)
    echoes = []
    for time_s in np.array(condition.times_ms) / 1000:
        turns = (GYROMAGNETIC_MHZ_PER_T * condition.b0_tesla * time_s) * total
        fine = head.magnitude * np.exp(-time_s * R2STAR_HZ) * np.exp(2j * np.pi * turns).astype(np.complex64)
        coarse = crop(fine, condition.block) if condition.sampling == "crop" else average(fine, condition.block)
        noise = random.normal(scale=1 / condition.snr, size=(2, *coarse.shape))
        echoes.append(coarse + noise[0] + 1j * noise[1])
    brain = average(head.brain, condition.block) > 0.5
    size_mm = tuple(step * n for step, n in zip(head.size_mm, condition.block, strict=True))
    scan = Scan(np.array(echoes, np.complex64), brain, size_mm, seed)
    for change in condition.changes:
        scan = Scan(change(scan).astype(np.complex64), brain, size_mm, seed)
    return scan


def reconstruct(scan: Scan, condition: Condition) -> Reconstruction:
    """Reconstruct the map of a scan with the mask of a condition."""
    mask = scan.brain
    if condition.mask_mm:
        outer, inner = (ndimage.distance_transform_edt(part, sampling=scan.size_mm) for part in (~mask, mask))
        mask = outer <= condition.mask_mm if condition.mask_mm > 0 else inner > -condition.mask_mm
    tilt_deg = condition.assumed_tilt_deg or condition.tilt_deg
    times_s = [time_ms / 1000 for time_ms in condition.times_ms]
    acquisition = Acquisition(times_s, condition.b0_tesla, scan.size_mm, direction(tilt_deg))
    return reconstruct_chi(np.angle(scan.echoes), np.abs(scan.echoes), acquisition, mask=mask, methods=Methods())


def score(result: Reconstruction, scan: Scan, head: Head, condition: Condition) -> dict[str, float]:
    """Compare the map with the truth, outside the shell of 4 mm around a strong source."""
    truth = average(head.chi, condition.block)
    inside = result.mask & scan.brain
    if condition.source[0]:
        inside &= ~(average(head.ball(condition.source[0] / 2 + 4, _SOURCE_MM), condition.block) > 0)
    ours, true = (chi[inside] - chi[inside].mean() for chi in (result.chi_ppm, truth))
    depth_mm = ndimage.distance_transform_edt(scan.brain, sampling=scan.size_mm)
    deep = inside & (depth_mm > 10) & (average(head.nuclei > 0, condition.block) == 0)
    ratios, errors = {}, []
    for name in _NUCLEI:
        labels = [row.index for row in STRUCTURES if row.abbreviation.startswith(f"{name}_")]
        nucleus = inside & (average(np.isin(head.nuclei, labels), condition.block) > 0.5)
        contrasts = [chi[nucleus].mean() - chi[deep].mean() for chi in (result.chi_ppm, truth)]
        ratios[name] = float(contrasts[0] / contrasts[1])
        errors.append(abs(contrasts[0] - contrasts[1]))
    return {
        "r": float(np.corrcoef(ours, true)[0, 1]),
        "NRMSE, %": float(100 * np.linalg.norm(ours - true) / np.linalg.norm(true)),
        "error, ppb": float(1000 * np.mean(errors)),
        **ratios,
        **compare_errors(result, truth, head, condition),
        "kept": float(inside.sum() / scan.brain.sum()),
        "misfit / noise": result.misfit_ppm / max(result.noise_ppm, 1e-9),
        "thermal, ppb": 1000 * (result.thermal_noise_ppm or 0),
        "noise, ppb": 1000 * result.noise_ppm,
    }


def compare_errors(
    result: Reconstruction, truth: NDArray[np.float32], head: Head, condition: Condition
) -> dict[str, float]:
    """Compare the errors of the means of nuclei with their stated SDs: root mean squares over the nuclei."""
    if result.changes_ppm is None or result.r2star_per_s is None:
        return {}
    grid = Volume(result.chi_ppm, np.diag([*result.acquisition.voxel_size_mm, 1]))
    labels = np.zeros(grid.shape, np.int16)
    for row in STRUCTURES:
        labels[(average(head.nuclei == row.index, condition.block) > 0.5) & result.mask] = row.index
    noise_sd = partial(noise_of_mean, steps=describe_reconstruction(result, grid), voxel_size_mm=grid.voxel_size_mm)
    options: dict[str, Any] = {"structures": STRUCTURES}
    sds = measure_uncertainty(result.changes_ppm, noise_sd, result.r2star_per_s, grid.array, labels, **options)
    means = [measure_nuclei(chi, labels, voxel_size_mm=grid.voxel_size_mm, **options) for chi in (grid.array, truth)]
    errors = means[0]["mean_ppm"] - means[1]["mean_ppm"] + truth[result.mask].mean()
    table = pd.DataFrame({"SD noise, ppb": sds["mean_sd_noise_ppm"], "SD choices, ppb": sds["mean_sd_choices_ppm"]})
    table = 1000 * table.assign(error=errors)[means[0]["n_voxels"] >= _MIN_VOXELS]
    table["error / SD"] = table["error"] / np.hypot(table["SD noise, ppb"], table["SD choices, ppb"])
    return dict(table.drop(columns="error").pow(2).mean().pow(0.5))


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table of conditions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of a real head with a COSMOS map")
    parser.add_argument("--labels", type=Path, help="labels on the COSMOS map (default: segmented)")
    parser.add_argument("--cases", default="", metavar="REGEX", help="only cases whose name or kind contains this")
    parser.add_argument("--seed", type=seed, default=1)
    parser.add_argument("--out", type=Path, metavar="TSV")
    args = parser.parse_args(argv)
    return run_command(parser.prog, lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    head, rows = Head(args.folder, args.labels), []
    for condition in list_conditions():
        if not re.search(args.cases, f"{condition.name} {condition.kind}"):
            continue
        scan, started = measure(head, condition, args.seed), time.process_time()
        row: dict[str, Any] = {"case": condition.name, "kind": condition.kind}
        try:
            result = reconstruct(scan, condition)
            says = [f"REFUSED: {text}" for text in result.problems] + list_warnings(result)
            row |= {**score(result, scan, head, condition), "says": " | ".join(says)}
        except (ValueError, InputError) as error:
            row |= {"says": f"ERROR: {error}"}
        rows.append({**row, "CPU s": time.process_time() - started})
        sys.stderr.write(f"{rows[-1]}\n")
        if args.out:
            pd.DataFrame(rows).to_csv(args.out, sep="\t", index=False)
    table = pd.DataFrame(rows)
    for kind, cases in table.dropna(subset="error / SD").groupby("kind"):
        rms = (cases["error / SD"] ** 2).mean() ** 0.5
        print(f"error of the means over their stated SD, {len(cases)} {kind} case(s): root mean square {rms:.2f}")
    print(markdown(table, {"r": 3, "NRMSE, %": 1, "error, ppb": 1, "CPU s": 0}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
