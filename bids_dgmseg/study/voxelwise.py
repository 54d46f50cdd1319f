"""Voxelwise comparison of chi maps in standard space, within the nuclei, by permutation tests of nilearn."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bids_dgmseg.bids.entities import ScanName, join_entities
from bids_dgmseg.bids.standard_space import standard_paths
from bids_dgmseg.config import MNI, parse_output_space
from bids_dgmseg.errors import InputError, count, list_some
from bids_dgmseg.io.files import atomic_write, write_json
from bids_dgmseg.io.nifti import load_image, read_data
from bids_dgmseg.models.registry import get_model
from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.normalization.standard_space import nucleus_shape, standard_grid
from bids_dgmseg.stats.long_table import Floats, covariate_matrix
from bids_dgmseg.study.group_comparisons import first_site_only, without_contradictions
from bids_dgmseg.study.study import Study, covariate_name
from bids_dgmseg.study.tabular_files import Analysis, ResultTable

N_PEOPLE = 10
"""Minimum number of participants."""

SEED = 1
"""Of the permutations, so that the same maps give the same results."""

FOLDER = "voxelwise"

_CLUSTER_P = 0.01
"""Of a voxel, above which clusters are formed."""

_COLUMNS = (
    *("contrast", "model", "abbreviation", "n", "n_voxels", "n_significant", "p_min", "peak_t", "peak_effect"),
    *("peak_x_mm", "peak_y_mm", "peak_z_mm", "mean_effect"),
)

Correction = Literal["tfce", "cluster"]


@dataclass(frozen=True)
class VoxelMap:
    """A map to be written, below the folder of the tables."""

    name: str
    """Relative path without extension."""
    image: nib.Nifti1Image
    sidecar: Mapping[str, Any]


def infer_voxels(
    values: Floats,
    design: pd.DataFrame,
    contrast: str,
    mask: nib.Nifti1Image,
    *,
    n_permutations: int,
    correction: Correction = "tfce",
    rng_seed: int = SEED,
) -> dict[str, nib.Nifti1Image]:
    """Test one column of a linear model in each voxel, two-sided, with the family-wise error controlled.

    Parameters
    ----------
    values : ndarray of shape (participants, voxels)
        In the order of the voxels of the mask.
    design : DataFrame of shape (participants, columns)
        With an intercept; columns other than the contrast are nuisance effects (Freedman-Lane).
    contrast : str
        Column to test.
    mask : Nifti1Image
    n_permutations : int
    correction : {'tfce', 'cluster'}
        Threshold-free cluster enhancement, or the mass of clusters of voxels with p < 0.01.
    rng_seed : int

    Returns
    -------
    dict
        ``effect`` (the coefficient), ``t`` and ``z`` of nilearn's `SecondLevelModel`, and ``logp``, minus the decimal
        logarithm of the corrected p value.
    """
    from nilearn.glm.second_level import SecondLevelModel, non_parametric_inference  # slow to import

    full = np.asarray(mask.dataobj) > 0
    places = np.argwhere(full)
    start, stop = places.min(axis=0), places.max(axis=0) + 1
    block = tuple(slice(int(a), int(b)) for a, b in zip(start, stop, strict=True))  # clusters are found faster in it
    inside, affine = np.pad(full[block], 1), mask.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ (start - 1)
    whole, mask = mask, nib.Nifti1Image(inside.astype(np.uint8), affine)
    maps = []
    for row in values:
        image = np.zeros(inside.shape, np.float64)
        image[inside] = row
        maps.append(nib.Nifti1Image(image, affine))
    model = SecondLevelModel(mask_img=mask, minimize_memory=True).fit(maps, design_matrix=design)
    one_hot = (np.array(list(design.columns)) == contrast).astype(float)
    parametric = model.compute_contrast(one_hot, output_type="all")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Data array used to create a new image contains 64-bit ints")
        found = non_parametric_inference(
            maps,
            design_matrix=design,
            second_level_contrast=one_hot,
            mask=mask,
            model_intercept=False,  # the design has one
            n_perm=n_permutations,
            two_sided_test=True,
            random_state=rng_seed,
            n_jobs=1,
            tfce=correction == "tfce",
            threshold=None if correction == "tfce" else _CLUSTER_P,
        )
    results = {
        "effect": parametric["effect_size"],
        "t": parametric["stat"],
        "z": parametric["z_score"],
        "logp": found["logp_max_tfce" if correction == "tfce" else "logp_max_mass"],
    }
    images = {}
    for name, result in results.items():
        image = np.zeros(full.shape, np.float64)
        image[full] = np.asarray(result.dataobj).reshape(inside.shape)[inside]
        if name == "logp" and correction == "cluster":
            # nilearn 0.14 counts the permutations without the data themselves, and at least one
            image[full] = -np.log10((n_permutations * 10 ** -image[full] + 1) / (n_permutations + 1))
        images[name] = nib.Nifti1Image(image, whole.affine)
    return images


def analyse_voxels(study: Study, folders: Sequence[Path]) -> tuple[Analysis, list[VoxelMap]]:
    """Test differences between groups, clinical variables or age in each voxel of the nuclei (``group_voxelwise``).

    Parameters
    ----------
    study : Study
    folders : sequence of path
        Output folders of the participant level, in the order of the study's datasets.

    Raises
    ------
    InputError
        If no scan has a map in standard space.
    """
    consistent, lines = without_contradictions(study, ("group",), where="group_voxelwise")
    study, parts, maps, contrasts = replace(study, table=consistent), [], [], []
    for key, rows in study.strata():
        scans = rows.drop_duplicates("scan").set_index("scan")
        paths, space = _find_maps(study, folders, scans.index.to_numpy(int), str(key["model"]))
        missing = [name for name, path in paths.items() if path is None]
        if missing:
            verb = "has" if len(missing) == 1 else "have"
            lines.append(
                f"group_voxelwise.tsv: {count(len(missing), 'scan')} {verb} no map in {space} and "
                f"{'is' if len(missing) == 1 else 'are'} left out: {list_some(missing)}; run the participant level "
                "with `output_space`"
            )
        kept = np.array([path is not None for path in paths.values()])
        nuclei = [str(name) for name in rows["abbreviation"].unique()]
        prepared = _load_scans(scans[kept], [path for path in paths.values() if path], nuclei, space)
        lines += prepared.lines
        for contrast, column, known in _contrasts(study, prepared.scans):
            people, values = _average_scans(known, prepared.values)
            label = f"{contrast}{study.stratum_name(key) and ' ' + study.stratum_name(key)}"
            design, problem = _design(study, people, column)
            if problem:
                lines.append(f"group_voxelwise.tsv: {label}: not tested: {problem}")
                continue
            images = infer_voxels(
                values,
                design,
                column,
                prepared.mask,
                n_permutations=study.options.permutations,
                correction=study.options.voxelwise_correction,
            )
            about = {
                "Contrast": contrast,
                "Participants": len(people),
                "Design": list(design.columns),
                "Permutations": study.options.permutations,
                "Correction": study.options.voxelwise_correction,
                "Space": space,
            }
            own = _name_maps(images, key, contrast, space, about)
            maps += own
            contrasts.append({**about, **key, "Maps": [one.name + ".nii.gz" for one in own]})
            summary = _summarize(images, prepared, nuclei)
            parts.append(summary.assign(contrast=contrast, n=len(people), **key))
    columns = [*_COLUMNS[:1], *study.cohort.strata, *_COLUMNS[2:]]
    found = pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)
    why = "" if parts else "; ".join(lines) or "no group, clinical variable or age to test"
    facts = {"Contrasts": contrasts, "VoxelP": _CLUSTER_P if study.options.voxelwise_correction == "cluster" else None}
    table = ResultTable("group_voxelwise", found, facts, tuple(lines), why)
    return Analysis((table,), tuple(lines)), maps


def write_voxel_maps(folder: Path, maps: Sequence[VoxelMap], *, is_wanted: bool = True) -> list[Path]:
    """Write the maps with their sidecars; maps of an earlier run are removed, and its table unless it `is_wanted`."""
    tables = [] if is_wanted else [folder / f"group_voxelwise{ending}" for ending in (".tsv", ".json")]
    for old in (*(folder / FOLDER).glob("*_statmap.*"), *tables):
        old.unlink(missing_ok=True)
    paths = []
    for one in maps:
        path = folder / f"{one.name}.nii.gz"
        with atomic_write(path) as temporary:
            nib.save(one.image, temporary)
        paths += [path, write_json(one.sidecar, path.with_name(path.name.replace(".nii.gz", ".json")))]
    return paths


@dataclass(frozen=True)
class _Prepared:
    """Maps of the scans."""

    values: Floats
    """One row per scan in ppm."""
    scans: pd.DataFrame
    """Covariates, group and clinical variables of the scans at each participant's first site; index of `values`."""
    mask: nib.Nifti1Image
    shapes: Mapping[str, NDArray[np.bool_]]
    """Nucleus → its voxels among those of the mask."""
    lines: tuple[str, ...]


def _find_maps(
    study: Study, folders: Sequence[Path], scans: NDArray[np.intp], model: str
) -> tuple[dict[str, Path | None], str]:
    """Return the map of each scan in the space and resolution that most scans have, and that space."""
    by_name = dict(zip(study.cohort.settings["Datasets"], folders, strict=True))
    keys, entities = study.cohort.keys, study.cohort.scans.drop(columns="seg").to_dict("records")
    found: dict[str, dict[str, Path]] = {}
    names = {}
    for scan in scans.tolist():
        own = {str(key): value for key, value in entities[scan].items() if isinstance(value, str)}
        name = ScanName.of(own)
        folder = by_name[keys["dataset"].iloc[scan]] if "dataset" in keys else folders[0]
        shown = join_entities(own) + (f" ({keys['dataset'].iloc[scan]})" if "dataset" in keys else "")
        names[shown] = scan
        for space in (MNI, f"{MNI}:res-1", f"{MNI}:res-2"):
            path = standard_paths(folder, name, get_model(model), space)["out_chi"]
            if path.is_file():
                found.setdefault(space, {})[shown] = path
    if not found:
        raise InputError(
            f"`voxelwise`: no scan has a map in {MNI} (such as …_space-{MNI}_desc-{model}_Chimap.nii.gz); run the "
            f"participant level with `output_space` {MNI}"
        )
    space = max(found, key=lambda one: len(found[one]))
    return {name: found[space].get(name) for name in names}, space


def _load_scans(scans: pd.DataFrame, paths: Sequence[Path], nuclei: Sequence[str], space: str) -> _Prepared:
    """Load the maps within the nuclei."""
    grid = standard_grid(parse_output_space(space)[1])
    known = {one.abbreviation for one in STRUCTURES}  # parts, accumbens and thalamus have no shape
    drawn = {name: nucleus_shape(name, grid) >= 0.5 for name in nuclei if name in known}
    union = np.any(list(drawn.values()), axis=0)
    values, lines, usable = [], [], np.full(len(paths), True)
    for place, path in enumerate(paths):
        try:
            image = load_image(path)
            if image.shape != grid.shape or not np.allclose(image.affine, grid.affine, atol=1e-3):
                raise InputError(f"{path.name}: is not on the grid of {space}; run the participant level with `force`")
            values.append(read_data(image, path, np.float64)[union])
        except InputError as error:
            usable[place] = False
            lines.append(f"group_voxelwise.tsv: a map is left out: {error}")
    scans = scans[usable]
    chi = np.array(values).reshape(len(scans), int(union.sum()))
    measured = (np.isfinite(chi) & (chi != 0)).all(axis=0)  # 0 where not measured
    if not len(scans) or not measured.any():
        raise InputError("`voxelwise`: no voxel of the nuclei is measured in all maps; check those in standard space")
    if (lost := 1 - measured.mean()) > 0.01:
        lines.append(
            f"group_voxelwise.tsv: {lost:.0%} of the voxels of the nuclei are not measured in all maps; left out"
        )
    inside = np.zeros(grid.shape, np.uint8)
    inside[union] = measured
    shapes = {name: shape[union][measured] for name, shape in drawn.items()}
    scans, _ = first_site_only(scans.reset_index(drop=True), where="group_voxelwise")
    return _Prepared(chi[:, measured], scans, nib.Nifti1Image(inside, grid.affine), shapes, tuple(lines))


def _average_scans(scans: pd.DataFrame, values: Floats) -> tuple[pd.DataFrame, Floats]:
    """Average the scans of each participant: covariates and variables, and the rows of `values` of the same scans."""
    by_person = scans.groupby("participant_id", sort=False, observed=True)
    people = by_person.first().assign(**by_person.mean(numeric_only=True)).reset_index()
    return people, np.array([values[own.index.to_numpy(int)].mean(axis=0) for _, own in by_person])


def _contrasts(study: Study, scans: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Iterate over what is tested: its name, the column of the design and the scans with values."""
    groups = [name for name in scans["group"].dropna().unique() if name != study.reference]
    variables = [str(name) for name in scans if str(name).startswith("variable ")]
    if study.reference is not None and (scans["group"] == study.reference).any():
        for name in sorted(map(str, groups)):
            yield f"{name} vs {study.reference}", f"group {name}", scans.dropna(subset=["group"])
    for name in variables:
        yield name.removeprefix("variable "), name, scans.dropna(subset=[name])
    if not groups and not variables and scans["age"].nunique() > 1:
        yield "age", "age", scans.dropna(subset=["age"])


def _design(study: Study, people: pd.DataFrame, column: str) -> tuple[pd.DataFrame, str]:
    """Return the design of a test with the covariates of the tables, or why it cannot be done; `people` are aligned."""
    is_group = column.startswith("group ")
    tested = "group" if is_group else covariate_name(study.cohort, column.removeprefix("variable "))
    covariates = [name for name in study.covariates if name in people and name != tested]
    known = people.dropna(subset=covariates)
    terms = pd.DataFrame({"intercept": 1.0}, index=known.index)
    if is_group:
        for name in sorted({*map(str, known["group"])} - {str(study.reference)}):
            terms[f"group {name}"] = (known["group"] == name).astype(float)
    else:
        terms[column] = known[column].astype(float)
    for name in covariates:
        block = covariate_matrix(known[[name]].reset_index(drop=True))
        for place, values in enumerate(block.T):
            if np.ptp(values) > 0:
                terms[name if block.shape[1] == 1 else f"{name} {place + 1}"] = values
    if len(known) < len(people):
        return terms, f"{len(people) - len(known)} participants lack {' or '.join(covariates)}; omit it or complete it"
    if len(known) < N_PEOPLE:
        return terms, f"{len(known)} participants, at least {N_PEOPLE} are needed"
    if column not in terms or np.linalg.matrix_rank(terms) < terms.shape[1] or len(terms) < terms.shape[1] + 3:
        return terms, "confounded with the covariates, or too few participants for them; choose `covariates`"
    return terms, ""


def _name_maps(
    images: Mapping[str, nib.Nifti1Image], key: Mapping[str, Any], contrast: str, space: str, about: Mapping[str, Any]
) -> list[VoxelMap]:
    """Return the maps of a test with their names and sidecars."""
    name, resolution = parse_output_space(space)
    plain = {"seg": str(key["model"]), "space": name, **({"res": str(resolution)} if resolution else {})}
    label = re.sub("[^0-9a-zA-Z]", "", contrast.title() if " vs " not in contrast else contrast)
    extra = "".join(re.sub("[^0-9a-zA-Z]", "", str(value)) for column, value in key.items() if column != "model")
    stem = "_".join(f"{entity}-{value}" for entity, value in plain.items())
    units = {"effect": "ppm (per unit of the variable)", "t": "arbitrary", "z": "arbitrary", "logp": "-log10(p)"}
    what = {
        "effect": "Coefficient of the linear model",
        "t": "t statistic",
        "z": "z score of the t statistic",
        "logp": "Family-wise error corrected p, two-sided",
    }
    ending = f"_desc-{extra}" if extra not in ("", "na", "nana") else ""
    return [
        VoxelMap(
            f"{FOLDER}/{stem}_contrast-{label}_stat-{stat}{ending}_statmap",
            nib.Nifti1Image(np.asarray(image.dataobj, np.float32), image.affine),
            {"Description": what[stat], "Units": units[stat], **about},
        )
        for stat, image in images.items()
    ]


def _summarize(images: Mapping[str, nib.Nifti1Image], prepared: _Prepared, nuclei: Sequence[str]) -> pd.DataFrame:
    """Return one row per nucleus with its significant voxels and its peak."""
    inside = np.asarray(prepared.mask.dataobj) > 0
    maps = {name: np.asarray(image.dataobj, np.float64).reshape(inside.shape)[inside] for name, image in images.items()}
    places = nib.affines.apply_affine(prepared.mask.affine, np.argwhere(inside))
    records = []
    for name in nuclei:
        own = np.flatnonzero(prepared.shapes.get(name, np.zeros(0, bool)))
        record: dict[str, Any] = {"abbreviation": name, "n_voxels": len(own)}
        if len(own):
            peak = own[np.argmax(np.abs(maps["t"][own]))]
            p = 10 ** -maps["logp"][own]
            record |= {"n_significant": int((p < 0.05).sum()), "p_min": float(p.min())}
            record |= {"peak_t": maps["t"][peak], "peak_effect": maps["effect"][peak]}
            record |= dict(zip(("peak_x_mm", "peak_y_mm", "peak_z_mm"), places[peak].tolist(), strict=True))
            record["mean_effect"] = maps["effect"][own].mean()
        records.append(record)
    return pd.DataFrame(records)
