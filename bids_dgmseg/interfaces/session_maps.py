"""Interface that measures further maps of a session in the nuclei of a scan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from nipype.interfaces.base import File, TraitedSpec, traits

from bids_dgmseg.errors import InputError
from bids_dgmseg.image.grids import check_grid
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.interfaces.base import FileInterface, HashedSidecarsInputSpec, find_model, read_dseg
from bids_dgmseg.io.files import sidecar_path


class _SampleInputSpec(HashedSidecarsInputSpec):
    in_chi = File(exists=True, mandatory=True, desc="susceptibility map in ppm, NaN where not valid")
    in_dseg = File(exists=True, mandatory=True, desc="labels on the same grid, indices of structures.tsv")
    in_stats = File(exists=True, mandatory=True, desc="table of MeasureNuclei, to which columns are added")
    in_maps = traits.List(traits.Str, usedefault=True, desc="further maps in the space of the chi map, on any grid")
    names = traits.List(traits.Str, usedefault=True, desc="name of each in columns, such as R2starmap")
    units = traits.List(traits.Str, usedefault=True, desc="unit of each; empty: that of its sidecar or suffix")
    in_regions = traits.Dict(traits.Str, File(exists=True), desc="masks of head regions (LocalizeNuclei.out_regions)")
    in_exclude = traits.List(File(exists=True), usedefault=True, desc="masks of voxels that are not measured")
    model = traits.Str("default", usedefault=True, desc="model that made the labels")
    labels = traits.List(traits.Str, desc="its nuclei; by default those of the registry")
    bilateral = traits.Bool(False, usedefault=True, desc="whether the table has rows with left and right combined")
    figures = traits.Bool(False, usedefault=True, desc="draw each map with the outlines of the nuclei")

    def sidecars(self) -> Sequence[Path]:
        """Return the JSON files next to the maps."""
        return [sidecar_path(Path(path)) for path in self.in_maps or []]


class _SampleOutputSpec(TraitedSpec):
    out_stats = File(exists=True, desc="the table with columns such as R2starmap_mean_per_s")
    out_figures = traits.Dict(traits.Str, File(exists=True), desc="name of each map that was measured to PNG")
    report = traits.Dict(desc="per map: file, unit, why it was refused")
    warnings = traits.List(traits.Str, desc="maps that were refused")


class SampleMaps(FileInterface):
    """Measure further maps in the nuclei; see `bids_dgmseg.measurement.further_maps.measure_further_maps`.

    Examples
    --------
    >>> step = SampleMaps(in_chi="chi.nii", in_dseg="dseg.nii.gz", in_maps=["sub-01_R2starmap.nii"])  # doctest: +SKIP
    """

    input_spec = _SampleInputSpec
    output_spec = _SampleOutputSpec

    def run_step(self, folder: Path) -> Mapping[str, Any]:
        """Measure the maps."""
        from bids_dgmseg.io.files import read_tsv, write_tsv
        from bids_dgmseg.measurement.exclusion import read_exclusion
        from bids_dgmseg.measurement.further_maps import measure_further_maps
        from bids_dgmseg.measurement.labelled_maps import join_measures, name_maps

        given = self.inputs
        model = find_model(given.model, given.labels)
        chi, dseg = Volume.read(given.in_chi), read_dseg(given.in_dseg, model)
        check_grid(given.in_dseg, dseg, chi, what="labels")
        paths = [Path(path) for path in given.in_maps]
        names = list(given.names) or name_maps(paths)
        for field, values in (("names", names), ("units", given.units or names)):
            if len(values) != len(paths):
                raise InputError(f"`{field}`: {len(values)} for {len(paths)} maps; pass one per map, or none")
        region = None
        if brain := (given.in_regions or {}).get("brain"):
            region = Volume.read(brain, np.uint8)
            check_grid(brain, region, chi)
        found = measure_further_maps(
            dict(zip(names, paths, strict=True)),
            chi,
            dseg,
            model.structures,
            units=dict(zip(names, given.units, strict=False)),
            brain=region.array > 0 if region else None,
            exclude=read_exclusion([Path(path) for path in given.in_exclude], chi),
            bilateral=given.bilateral,
        )
        stats = read_tsv(Path(given.in_stats), dtype=str, na_filter=False)
        if "abbreviation" not in stats:
            raise InputError(f"{Path(given.in_stats).name}: no column abbreviation; pass out_stats of MeasureNuclei")
        if found.measured:
            joined = join_measures(found.measured).drop(
                columns=["index", "name", "hemisphere", "n_voxels", "volume_mm3"]
            )
            sampled = stats[["abbreviation"]].merge(joined, on="abbreviation", how="left").drop(columns="abbreviation")
            if "n_voxels" in stats:  # missing nuclei, also of both sides together if one is, have no values of any map
                sampled = sampled.mask(stats["n_voxels"] == "n/a")
            stats = stats.drop(columns=sampled.columns, errors="ignore").join(sampled)
        write_tsv(stats, folder / "stats.tsv")
        figures = {}
        if given.figures:
            from bids_dgmseg.report.mosaic import draw_map

            drawn = [one for one in model.structures if (dseg.array == one.index).any()]
            for number, one in enumerate(found.measured):
                figures[one.name] = str(draw_map(one, dseg, folder / f"map_{number}.png", structures=drawn))
        return {
            "out_stats": str(folder / "stats.tsv"),
            "out_figures": figures,
            "report": {name: dict(about) for name, about in found.report.items()},
            "warnings": list(found.warnings),
        }
