"""Interface that measures the nuclei of a scan, also in further maps, and takes the scan to a standard space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from nipype.interfaces.base import File, InputMultiPath, TraitedSpec, isdefined, traits
from numpy.typing import NDArray
from scipy import ndimage

from bids_dgmseg.config import ReferenceRegion
from bids_dgmseg.errors import InputError
from bids_dgmseg.interfaces.step import (
    FileInterface,
    StepInputSpec,
    read_dseg,
    read_report,
    write_report,
)

if TYPE_CHECKING:
    import pandas as pd

    from bids_dgmseg.image.volume import Volume
    from bids_dgmseg.measurement.segmented_scan import Reference, SegmentedScan
    from bids_dgmseg.models.registry import Model
    from bids_dgmseg.models.structures import Structure
    from bids_dgmseg.segmentation.localize import Localization


class _MeasureInputSpec(StepInputSpec):
    in_chi = File(exists=True, mandatory=True, desc="susceptibility map in ppm, NaN where not valid (LocalizeNuclei)")
    in_location = File(exists=True, mandatory=True, desc="box and masks of head regions (LocalizeNuclei)")
    in_dseg = File(exists=True, mandatory=True, desc="labels on the same grid (SegmentNuclei)")
    in_probseg = File(
        exists=True, mandatory=True, desc="probabilities on the same grid, or in a block of it (out_probseg_box)"
    )
    segmentation_report = File(exists=True, mandatory=True, desc="report of SegmentNuclei")
    map_report = File(exists=True, desc="report of LocalizeNuclei: region whose susceptibility is 0 in the map")
    reconstruction_report = File(exists=True, desc="report of ReconstructQSM: number of failed plausibility checks")
    in_r2star = File(exists=True, desc="R2* in 1/s on the same grid")
    in_changes = File(exists=True, desc="out_changes of ReconstructQSM: changes of the map with other choices")
    reference = traits.Str(
        "none", usedefault=True, desc="whole-brain, csf, or a nucleus such as CN or CN_L, whose mean is subtracted"
    )
    reference_mask = File(exists=True, desc="mask for the reference csf; by default the ventricles in in_location")
    needs_reference_mask = traits.Bool(
        False, usedefault=True, desc="whether the reference is n/a without reference_mask"
    )
    in_lesion_masks = InputMultiPath(
        File(exists=True), desc="masks of voxels that are left out of all measures, in the space of the map"
    )
    bilateral = traits.Bool(False, usedefault=True, desc="add a row per nucleus with left and right combined")
    in_maps = traits.List(traits.Str, desc="further maps in the space of the chi map, on any grid")
    map_names = traits.List(traits.Str, usedefault=True, desc="name of each map in columns, such as R2starmap")
    map_units = traits.List(traits.Str, usedefault=True, desc="unit of each; empty: that of its sidecar or suffix")
    age = traits.Float(desc="age in years; outside the model's training range, the rating is amber")
    output_space = traits.Str(desc="standard space, with resolution in mm, such as MNI152NLin2009cAsym:res-2")


class _MeasureOutputSpec(TraitedSpec):
    out_stats = File(exists=True, desc="tab-separated table, one row per nucleus; columns in mm3, ppm and 1/s")
    out_map_figures = traits.List(
        File(exists=True), desc="PNG of each further map that was measured, named after the map"
    )
    out_standard = traits.List(
        File(exists=True), desc="map, labels, probabilities and transforms in standard space, if asked for"
    )
    out_report = File(
        exists=True,
        desc="measures (rating, quality of the map, reference region), maps, normalization, warnings (JSON)",
    )


class MeasureNuclei(FileInterface):
    """Measure and rate the nuclei of a map; see `bids_dgmseg.measurement.scan_measures.measure_scan`.

    Further maps are measured by `bids_dgmseg.measurement.further_maps.measure_further_maps`; for the standard space see
    `bids_dgmseg.registration.mni.normalize_files`.

    Examples
    --------
    >>> step = MeasureNuclei(in_chi="chi.nii", in_dseg="dseg.nii.gz", in_probseg="probseg_box.nii")  # doctest: +SKIP
    """

    input_spec = _MeasureInputSpec
    output_spec = _MeasureOutputSpec

    def run_step(self, folder: Path) -> Mapping[str, Any]:
        """Measure the nuclei."""
        from bids_dgmseg.image.volume import Volume
        from bids_dgmseg.io.files import write_tsv
        from bids_dgmseg.measurement.scan_measures import describe_measures, measure_scan
        from bids_dgmseg.models.registry import get_model
        from bids_dgmseg.models.structures import with_pairs, with_wholes
        from bids_dgmseg.segmentation.localize import Localization

        inputs = self.inputs
        segmentation = read_report(inputs.segmentation_report, "model", "labels", "detected", "edits")
        model, chi = get_model(segmentation["model"], segmentation["labels"]), Volume.read(inputs.in_chi)
        located = Localization.read(Path(inputs.in_location), chi)
        scan = self._read_scan(chi, model, segmentation, located)
        reference = self._find_reference(scan, model, located)
        brain = located.regions.get("brain")
        structures = with_wholes(model.structures)
        structures = with_pairs(structures) if inputs.bilateral else structures
        facts = {} if brain is None else {"brain_volume_ml": chi.volume_ml(brain)}
        if reconstruction := self.path("reconstruction_report"):
            facts["failed_checks"] = read_report(reconstruction, "n_failed_checks")["n_failed_checks"]
        if isdefined(inputs.age):
            facts["years_beyond_training"] = model.years_beyond_training(inputs.age)
        measures = measure_scan(
            scan,
            structures,
            reference=reference,
            map_reference=read_report(self.path("map_report"), "input").get("input", {}).get("reference", "not stated"),
            facts=facts,
        )
        values = describe_measures(measures, reference)
        if scan.lesions is not None:
            volume_mm3 = float(np.count_nonzero(scan.lesions) * np.prod(chi.voxel_size_mm))
            names = [path.name for path in self.paths("in_lesion_masks")]
            values["excluded"] = {"files": names, "volume_mm3": round(volume_mm3, 3)}
        warnings = [*measures.warnings, *([reference.problem] if reference and reference.problem else [])]
        stats, report = measures.stats, dict[str, Any]()
        figures, standard = list[Path](), list[Path]()
        if self.paths("in_maps"):
            stats, figures, report["maps"] = self._measure_maps(scan, structures, stats, brain, warnings, folder)
        if isdefined(inputs.output_space) and inputs.output_space:
            standard, report["normalization"] = self._normalize(located, warnings, folder)
        return {
            "out_stats": write_tsv(stats, folder / "stats.tsv"),
            "out_map_figures": figures,
            "out_standard": standard,
            "out_report": write_report(folder, measures=values, **report, warnings=warnings),
        }

    def _read_scan(
        self, chi: Volume, model: Model, segmentation: Mapping[str, Any], located: Localization
    ) -> SegmentedScan:
        """Read the labels, probabilities, R2* and lesion masks."""
        import pandas as pd

        from bids_dgmseg.image.grids import check_grid
        from bids_dgmseg.image.volume import Volume, read_block
        from bids_dgmseg.measurement.segmented_scan import SegmentedScan, read_lesion_masks

        dseg, path = read_dseg(self.inputs.in_dseg, model, chi), Path(self.inputs.in_probseg)
        probabilities, block = _enclose_labels(*read_block(path, chi), dseg)
        if len(probabilities) != len(model.structures):
            raise InputError(
                f"{path.name}: has {len(probabilities)} volumes, {model.name} has {len(model.structures)} nuclei; pass "
                "the report of its SegmentNuclei"
            )
        r2star = None
        if r2star_path := self.path("in_r2star"):
            r2star = Volume.read(r2star_path)
            check_grid(r2star_path, r2star, chi)
        edits, proof = segmentation["edits"], segmentation.get("proof")
        return SegmentedScan(
            chi=chi,
            dseg=dseg,
            probseg=probabilities,
            block=block,
            structures=model.structures,
            labelled=segmentation["detected"],
            r2star_per_s=r2star.array if r2star else None,
            **(self._describe_errors(chi, r2star.array) if r2star else {}),
            edited=edits["edited"] if edits else None,
            session_volumes=located.space.volumes if located.space else None,
            lesions=read_lesion_masks(self.paths("in_lesion_masks"), chi),
            proof=pd.DataFrame(proof).T.apply(pd.to_numeric, errors="coerce") if proof else None,
        )

    def _describe_errors(self, chi: Volume, r2star_per_s: NDArray[np.float32]) -> dict[str, Any]:
        """Return the parts of a reconstructed map, and what determines the uncertainty of its means."""
        from bids_dgmseg.image.volume import read_block
        from bids_dgmseg.qsm.field import separate_sources
        from bids_dgmseg.qsm.inversion import noise_of_mean

        steps = read_report(self.path("reconstruction_report")).get("reconstruction")
        if not steps:
            return {}
        parts = separate_sources(chi.array, r2star_per_s, b0_tesla=steps["MagneticFieldStrength"])
        changes = self.path("in_changes")
        return {
            "parts_ppm": parts,
            "changes_ppm": read_block(changes, chi)[0] if changes else None,
            "noise_sd": partial(noise_of_mean, steps=steps, voxel_size_mm=chi.voxel_size_mm),
        }

    def _find_reference(self, scan: SegmentedScan, model: Model, located: Localization) -> Reference | None:
        """Measure the reference region, without the voxels of lesions."""
        from bids_dgmseg.measurement.segmented_scan import check_reference, find_reference

        inputs, mask = self.inputs, self.path("reference_mask")
        wanted = ReferenceRegion(
            region=inputs.reference,
            masks=mask or (Path("masks") if inputs.needs_reference_mask else None),
        )
        check_reference(wanted, model)
        if wanted.region == "csf" and not wanted.masks and "ventricles" not in located.regions:
            raise InputError(
                "`reference` csf: no ventricles in `in_location`; set `find_ventricles` of LocalizeNuclei, or "
                "`reference_mask`"
            )
        is_usable = np.ones(scan.chi.shape, bool) if scan.lesions is None else ~scan.lesions
        chi = scan.chi.with_array(np.where(is_usable, scan.chi.array, np.float32(np.nan)))
        return find_reference(wanted, replace(scan, chi=chi), mask=mask, regions=located.regions, model=model)

    def _measure_maps(
        self,
        scan: SegmentedScan,
        structures: Sequence[Structure],
        stats: pd.DataFrame,
        brain: NDArray[np.bool_] | None,
        warnings: list[str],
        folder: Path,
    ) -> tuple[pd.DataFrame, list[Path], dict[str, Any]]:
        """Add the columns of further maps to the table and draw the maps; return also what the report says of each."""
        from bids_dgmseg.measurement.further_maps import join_measures, measure_further_maps, name_maps
        from bids_dgmseg.report.mosaic import draw_map

        paths, units = self.paths("in_maps"), self.inputs.map_units
        names = list(self.inputs.map_names) or name_maps(paths)
        for field, values in (("map_names", names), ("map_units", units or names)):
            if len(values) != len(paths):
                raise InputError(f"`{field}`: {len(values)} for {len(paths)} maps; pass one per map, or none")
        result = measure_further_maps(
            dict(zip(names, paths, strict=True)),
            scan.chi,
            scan.dseg,
            structures,
            units=dict(zip(names, units, strict=False)),
            brain=brain,
            lesions=scan.lesions,
        )
        warnings += result.warnings
        if result.measured:
            joined = join_measures(result.measured).drop(
                columns=["index", "name", "hemisphere", "n_voxels", "volume_mm3"]
            )
            stats = stats.reset_index(drop=True)
            columns = stats[["abbreviation"]].merge(joined, on="abbreviation", how="left").drop(columns="abbreviation")
            stats = stats.join(columns.mask(stats["n_voxels"].isna()))  # missing nuclei have no value of any map
        drawn = [structure for structure in scan.structures if (scan.dseg.array == structure.index).any()]
        figures = [draw_map(item, scan.dseg, folder / f"{item.name}.png", structures=drawn) for item in result.measured]
        return stats, figures, {name: dict(facts) for name, facts in result.report.items()}

    def _normalize(self, located: Localization, warnings: list[str], folder: Path) -> tuple[list[Path], dict[str, Any]]:
        """Resample the scan to standard space; return the files and what the report says."""
        from bids_dgmseg.registration.mni import normalize_files

        inputs = self.inputs
        files, report, doubts = normalize_files(
            Path(inputs.in_chi),
            Path(inputs.in_dseg),
            Path(inputs.in_probseg),
            located.regions,
            output_space=inputs.output_space,
            folder=folder,
        )
        warnings += doubts
        return files, report


def _enclose_labels(
    probabilities: NDArray[np.float32], block: tuple[slice, slice, slice], dseg: Volume
) -> tuple[NDArray[np.float32], tuple[slice, slice, slice]]:
    """Extend probabilities (C, x, y, z) by 0 to a block that contains all labels, also those of a person."""
    labels = ndimage.find_objects((dseg.array > 0).astype(np.uint8))
    if not labels:
        return probabilities, block
    x, y, z = (slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in zip(block, labels[0], strict=True))
    margins = [(old.start - new.start, new.stop - old.stop) for old, new in zip(block, (x, y, z), strict=True)]
    return np.pad(probabilities, [(0, 0), *margins]), (x, y, z)
