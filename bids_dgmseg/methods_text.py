"""Texts for the methods section of a paper, with their references: of a run (logs/CITATION) and of a scan (page)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import bids_dgmseg
from bids_dgmseg.config import SHIPPED_WEIGHTS, ReconstructionOptions, ReferenceRegion
from bids_dgmseg.models.registry import MODELS, Model
from bids_dgmseg.segmentation.engine import engine_of

_BOILERPLATE = files("bids_dgmseg").joinpath("data", "boilerplate")

_MAX_AUTHORS = 6

_SPELLING = {
    "python": "Python",
    "torch": "PyTorch",
    "numpy": "NumPy",
    "scipy": "SciPy",
    "nibabel": "NiBabel",
    "nipype": "Nipype",
}

_PROGRAM = (
    "bids_dgmseg {version} [@bids_dgmseg], a BIDS App [@bids; @bids_apps] based on Nipype [@nipype], PyBIDS [@pybids], "
    "NiBabel [@nibabel], NumPy [@numpy], SciPy [@scipy] and PyTorch [@torch]"
)

_BIBTEX_TYPES = {"article-journal": "article", "paper-conference": "inproceedings"}
"""Types of CSL-JSON and BibTeX; others are ``misc``."""


@dataclass(frozen=True)
class BibliographyEntry:
    """An entry of the bibliography."""

    key: str
    authors: str
    title: str
    source: str
    """Journal or publisher, volume and year."""
    url: str


@dataclass(frozen=True)
class MethodsText:
    """Methods paragraph for one model."""

    model: str
    text: str
    """Citations are numbers in brackets."""
    references: tuple[BibliographyEntry, ...]
    """In the order of their numbers."""


def describe_methods(runs: Sequence[tuple[str, Mapping[str, Any]]]) -> tuple[MethodsText, ...]:
    """Write one paragraph per model, version and weights, from the model and ``_qc.json`` of each scan."""
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for model, qc in runs:
        versions = qc.get("versions") or {}
        groups.setdefault((model, str(versions.get("bids_dgmseg")), str(_setting(qc, "weights"))), []).append(qc)
    return tuple(_describe(model, records) for (model, _, _), records in groups.items())


def _describe(name: str, records: Sequence[Mapping[str, Any]]) -> MethodsText:
    model = MODELS.get(name)
    versions = {str(key): str(value) for key, value in (records[0].get("versions") or {}).items()}
    version = versions.pop("bids_dgmseg", "")
    tools = ", ".join(f"{_SPELLING.get(tool, tool)} {version}" for tool, version in versions.items())
    reconstructions = [record.get("reconstruction") or {} for record in records]
    n_echoes = [len(record.get("EchoTime") or [0]) if record else 0 for record in reconstructions]
    made = [record for record in records if record.get("reconstruction")]
    used = {
        step: dict.fromkeys(_setting(one, step) for one in made) for step in ("unwrapping", "background", "inversion")
    }
    methods = {
        step: names
        for step, found in used.items()
        if (names := [one for one in found if one in RECONSTRUCTION_METHODS])
    }
    user_weights = _setting(records[0], "weights") not in (None, SHIPPED_WEIGHTS)
    sentences = [
        "Deep gray nuclei were segmented on quantitative susceptibility maps (QSM) [@qsm_consensus] with "
        + _PROGRAM.format(version=version)
        + (f" ({tools})." if tools else "."),
        " ".join(describe_reconstruction(n_echoes, **methods).split()),
        _describe_regularization(records),
        _describe_reference_regions(records),
        _describe_model(model, user_weights=user_weights) if model else f"The model was {name}.",
    ]
    if mirrored := [record for record in records if _setting(record, "mirrored")]:
        some = _some(mirrored, records)
        sentences.append(f"Probabilities were averaged over each map and its mirror image{some}.")
    sentences += [
        "Labels and probabilities were resampled to the grid of each map.",
        "The volume of each nucleus was computed by counting voxels and by summing probabilities, and its "
        "susceptibility (ppm) as mean, median, standard deviation and percentiles over valid voxels. In deep gray "
        "matter, susceptibility increases with the concentration of iron [@langkammer2012].",
    ]
    together = [record for record in records if _setting(record, "longitudinal")]
    if together:
        some = _some(together, records)
        sentences.append(
            f"The sessions of a participant were labelled together{some}: their maps were aligned rigidly in a "
            "mid-space that favours none of them [@within_subject_template], and the networks saw all on one grid. "
            "Changes of the volume of each nucleus were measured by affine registration of its neighbourhood in the "
            "aligned maps to their mean, linearized [@robust_registration], with a change of its susceptibility as a "
            "nuisance parameter."
        )
    sentences += _describe_measurement(records)
    if normalized := [record["normalization"] for record in records if record.get("normalization")]:
        ants = re.search(r"ANTs [0-9.]*", str(normalized[0].get("method")))
        warps = f"a warp by SyN of {ants[0].strip()} [@syn]" if ants else "two diffeomorphic warps (log-domain demons)"
        sentences.append(
            f"Maps and labels were taken to MNI152NLin2009cAsym [@icbm152] by an affine transform and {warps}, driven "
            "by the labels of nuclei, brain and ventricles, with nuclei of public atlases [@cit168; @allen_atlas_3d] "
            "as targets."
        )
    text = " ".join(sentence for sentence in sentences if sentence)
    return MethodsText(name, *_number_citations(text))


def _describe_measurement(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Describe manual corrections, further maps and excluded voxels, where there are any."""
    sentences = []
    edited = [list((record.get("correction") or {}).get("edited") or []) for record in records]
    if any(edited):
        nuclei = list(dict.fromkeys(name for names in edited for name in names))
        n_scans = "" if len(records) == 1 else f" in {sum(map(bool, edited))} of {len(records)} scans"
        sentences.append(f"Labels were corrected manually{n_scans} ({', '.join(nuclei)}).")
    reports = [about for record in records for about in (record.get("maps") or {}).items()]
    measured = {str(name): str(about.get("unit") or "no unit") for name, about in reports if not about.get("problem")}
    if measured:
        shown = ", ".join(f"{name.replace('_', ' ')} ({unit})" for name, unit in measured.items())
        text = f"Further maps of the same session were measured in the same labels: {shown}."
        if any(about.get("resampled") for _, about in reports):
            text += " Maps on other grids were interpolated linearly at the voxels of the labels."
        sentences.append(text)
    excluded = [record for record in records if record.get("excluded")]
    if excluded:
        n_scans = "" if len(records) == 1 else f" in {len(excluded)} of {len(records)} scans"
        sentences.append(f"Voxels in masks of lesions were left out of all measures{n_scans}.")
    return sentences


def _setting(record: Mapping[str, Any], key: str) -> Any:
    """Return a setting of the run that made a scan; None in records without it."""
    return (record.get("settings") or {}).get(key)


def _some(part: Sequence[Any], records: Sequence[Any]) -> str:
    """Return how many of the scans a sentence is about, in parentheses; empty if it is about all."""
    return "" if len(part) == len(records) else f" ({len(part)} of {len(records)} scans)"


def _describe_regularization(records: Sequence[Mapping[str, Any]]) -> str:
    """Return the weights λ of the inversions, and the noise that they follow; empty if there are none."""
    weighted = [record for record in records if (record.get("reconstruction") or {}).get("RegularizationWeight")]
    chosen = [record for record in weighted if _setting(record, "regularization")]
    computed = [record for record in weighted if not _setting(record, "regularization")]

    def limits(some: Sequence[Mapping[str, Any]], key: str, factor: float = 1.0) -> str:
        values = [factor * record["reconstruction"][key] for record in some]
        return " to ".join(dict.fromkeys(f"{value:.3g}" for value in (min(values), max(values))))

    sentences = []
    if computed:
        weight, noise = limits(computed, "RegularizationWeight"), limits(computed, "FieldNoise", 1000)
        some = _some(computed, weighted)
        sentences.append(
            f"The regularization weight λ was {weight}{some}, in proportion to the errors of the field ({noise} ppb)."
        )
    if chosen:
        some = _some(chosen, weighted)
        sentences.append(f"The regularization weight λ was set to {limits(chosen, 'RegularizationWeight')}{some}.")
    return " ".join(sentences)


def _describe_reference_regions(records: Sequence[Mapping[str, Any]]) -> str:
    """Describe what the maps are relative to, and the reference region if one was chosen."""
    inputs: list[Mapping[str, Any]] = [record.get("input") or {} for record in records]
    references = sorted({str(record["reference"]) for record in inputs if record.get("reference")})
    known = [reference for reference in references if reference != "not stated"]
    text = "Susceptibility is relative to the reference region of each map, which is not stated in its sidecar."
    if len(known) == 1 and known == references:
        text = f"Susceptibility is relative to the reference region of the maps ({known[0]})."
    elif known:
        text = f"Susceptibility is relative to the reference region of each map ({', '.join(references)})."
    chosen: list[Mapping[str, Any]] = [record.get("reference") or {} for record in records]
    if regions := sorted({str(record["region"]) for record in chosen if record.get("region")}):
        text += (
            f" Referenced values are relative to the mean of a reference region in the same map ({', '.join(regions)})."
        )
    return text


def _describe_model(model: Model, *, user_weights: bool) -> str:
    """Describe localizer, network and weights of a model."""
    localizer = model.localizer
    if user_weights and engine_of(model).labels_from_folder:  # and the steps
        return f"Labels were predicted by a user-provided nnU-Net [@nnunet], run as model {model.name}."
    shifted = ", and shifted if it excluded nuclei found by a network in the whole head" if localizer.guard else ""
    if localizer.kind == "centre":
        located = f"The region of interest was centred on the brain{shifted}."
    elif localizer.kind == "atlas":
        located = (
            "The region of interest was propagated by affine registration from the atlas with the highest mutual "
            f"information after rigid registration{shifted}."
        )
    else:
        spacing = f" at {_format_spacing(localizer.input.spacing_mm)}" if localizer.input else ""
        located = f"The region of interest was localized by a network in the whole head{spacing}."
    # as within a sentence; names such as DCN-Net and DeepQSMSeg keep their capitals
    first = model.title.split()[0].rstrip(":")
    title = model.title if first[1:] != first[1:].lower() else model.title[:1].lower() + model.title[1:]
    keys = _model_keys(model)
    share = model.input.native_voxel_tolerance
    own_voxels = f", or at the voxel size of the map where it differs by at most {100 * share:.3g} %" if share else ""
    text = (
        f"{located} Within it, the model {model.name} ({title}){f' [{keys}]' if keys else ''} labelled the "
        f"{describe_nuclei(model)} in both hemispheres at {_format_spacing(model.input.spacing_mm)}{own_voxels}."
    )
    return f"{text} {describe_weights(model, shipped=not user_weights)}".strip()


def _format_spacing(spacing_mm: Sequence[float]) -> str:
    return f"{' × '.join(f'{size:.3g}' for size in spacing_mm)} mm"


def describe_nuclei(model: Model) -> str:
    """List the nuclei of a model with their abbreviations for a methods section.

    >>> from bids_dgmseg.models.registry import MODELS
    >>> describe_nuclei(MODELS["dcnnet"])
    'dentate nucleus (DN) and interposed nucleus (IN)'
    """
    names = {structure.nucleus: structure.name.partition(" ")[2] for structure in model.structures}
    *others, last = [f"{name} ({abbreviation})" for abbreviation, name in names.items()]
    return f"{', '.join(others)} and {last}" if others else last


def describe_weights(model: Model, *, shipped: bool) -> str:
    """Return a sentence for a methods section on the training of a model; empty if it is unknown."""
    if not shipped:
        return "Its weights were provided by the user."
    if not model.weights:
        return ""
    return (
        f"Its weights (licence {model.weights.licence}) were trained on {model.weights.trained_on} based on public "
        "atlases [@allen_atlas_3d; @cit168; @icbm152]."
    )


def read_boilerplate(name: str) -> str:
    """Read a text of ``data/boilerplate``."""
    return _BOILERPLATE.joinpath(name).read_text(encoding="utf-8")


RECONSTRUCTION_METHODS = {
    "region-growing": "spatially by region growing [@romeo]",
    "laplacian": "by its Laplacian [@laplacian_unwrapping]",
    "auto": "projection onto dipole fields [@pdf] if several echoes and a brain mask were available, otherwise with "
    "V-SHARP [@sharp; @v_sharp]",
    "pdf": "projection onto dipole fields [@pdf]",
    "vsharp": "V-SHARP [@sharp; @v_sharp]",
    "star": "two-level total variation [@star_qsm] with a lower cost at the edges of the magnitude",
    "medi": "morphology-enabled dipole inversion [@medi; @medi0]",
    "ilsqr": "least squares from which streaks were removed [@ilsqr]",
}
"""Methods of unwrapping, background field removal and dipole inversion, with citations."""


def describe_reconstruction(
    n_echoes: Sequence[int],
    *,
    background: str | Sequence[str] = "auto",
    inversion: str | Sequence[str] = "star",
    unwrapping: str | Sequence[str] = "region-growing",
) -> str:
    """Return sentences for a methods section on how maps were reconstructed, ending in a newline.

    Parameters
    ----------
    n_echoes : sequence of int
        Number of echoes per map; 0 for maps that were not reconstructed. Without any reconstruction the text is empty.
    background, inversion, unwrapping : str, or sequence of str if they differ between scans
        Keys of `RECONSTRUCTION_METHODS`.
    """
    if not any(n_echoes):
        return ""
    some = "" if all(n_echoes) else "For some scans, susceptibility maps were provided; the others were reconstructed. "
    text = read_boilerplate("reconstruction.md" if max(n_echoes) > 1 else "reconstruction_one_echo.md")
    steps = {"background": background, "inversion": inversion, "unwrapping": unwrapping}
    methods = {step: [names] if isinstance(names, str) else list(names) for step, names in steps.items()}
    ways = dict.fromkeys("in the same way" if name == "laplacian" else "temporally" for name in methods["unwrapping"])
    used = {step: " or ".join(RECONSTRUCTION_METHODS[name] for name in names) for step, names in methods.items()}
    return some + text.format(others=" or ".join(ways), **used)


def describe_run(
    model: Model,
    *,
    reference: ReferenceRegion,
    shipped_weights: bool,
    n_echoes: Sequence[int],
    reconstruction: ReconstructionOptions,
) -> str:
    """Return the text of ``logs/CITATION.md``, with citations as pandoc reads them.

    Parameters
    ----------
    model, reference, reconstruction
        Those of the run.
    shipped_weights : bool
        Whether the weights in the package are used, not those of the user.
    n_echoes : sequence of int
        As in `describe_reconstruction`.
    """
    sentences = describe_reconstruction(
        n_echoes,
        background=reconstruction.background,
        inversion=reconstruction.inversion,
        unwrapping=reconstruction.unwrapping,
    )
    region = {
        "none": "",
        "whole-brain": "whole brain",
        "csf": f"cerebrospinal fluid{', masked by the user' if reference.masks else ''}",
        "structure": str(reference.structure),
    }[reference.kind]
    referenced = f"; referenced values are relative to the mean of a reference region in the same map ({region})"
    keys = _model_keys(model)
    return read_boilerplate("citation.md").format(
        program=_PROGRAM.format(version=bids_dgmseg.__version__),
        model=model.name,
        title=model.title,
        nuclei=describe_nuclei(model),
        model_citation=f" [{keys}]" if keys else "",
        weights=describe_weights(model, shipped=shipped_weights),
        referenced=referenced if region else "",
        reconstruction=sentences + "\n" if sentences else "",
    )


def _model_keys(model: Model) -> str:
    return "; ".join(f"@{key}" for key in model.citation if key != "bids_dgmseg")


def _number_citations(text: str) -> tuple[str, tuple[BibliographyEntry, ...]]:
    """Replace ``[@key; @other]`` by numbers in order of appearance; unknown keys are dropped."""
    references = {entry["id"]: _read_reference(entry) for entry in read_bibliography()}
    numbers: dict[str, int] = {}

    def number(match: re.Match[str]) -> str:
        keys = [key for key in re.findall(r"@(\w+)", match[0]) if key in references]
        cited = [numbers.setdefault(key, len(numbers) + 1) for key in keys]
        return f" [{', '.join(map(str, cited))}]" if cited else ""

    return re.sub(r" \[@[^]]*\]", number, text), tuple(references[key] for key in numbers)


@cache
def read_bibliography() -> tuple[Mapping[str, Any], ...]:
    """Read the references, entries of CSL-JSON."""
    return tuple(json.loads(read_boilerplate("references.json")))


def _read_reference(entry: Mapping[str, Any]) -> BibliographyEntry:
    names = [_short_name(name) for name in entry["author"]]
    authors = ", ".join(names[:_MAX_AUTHORS]) + (" et al." if len(names) > _MAX_AUTHORS else "")
    publisher = entry.get("container-title") or entry.get("publisher")
    source = " ".join(str(part) for part in (publisher, entry.get("volume"), _year(entry)) if part)
    url = f"https://doi.org/{entry['DOI']}" if "DOI" in entry else entry.get("URL", "")
    return BibliographyEntry(
        entry["id"], authors.replace(", et al.", " et al.").removesuffix("."), entry["title"], source, url
    )


def _short_name(name: Mapping[str, str]) -> str:
    """Return family name and initials.

    >>> [_short_name(name) for name in ({"family": "Ros", "given": "Bo-An C."}, {"literal": "The X developers"})]
    ['Ros BAC', 'The X developers']
    """
    if "literal" in name:
        return name["literal"] if name["literal"] != "others" else "et al."
    return f"{name['family']} {''.join(part[0] for part in re.split('[ -]', name['given']))}"


def _year(entry: Mapping[str, Any]) -> str:
    return str(entry["issued"]["date-parts"][0][0]) if "issued" in entry else ""


def format_bibtex(entries: Sequence[Mapping[str, Any]]) -> str:
    """Format entries of CSL-JSON as BibTeX."""
    return "\n".join(_format_entry(entry) for entry in entries)


def _format_entry(entry: Mapping[str, Any]) -> str:
    kind = _BIBTEX_TYPES.get(entry["type"], "misc")
    names = [
        f"{name['family']}, {name['given']}" if "family" in name else f"{{{name['literal']}}}"
        for name in entry["author"]
    ]
    values = {
        "author": " and ".join("others" if name == "{others}" else name for name in names),
        "title": f"{{{entry['title']}}}",  # braces keep its case
        "booktitle" if kind == "inproceedings" else "journal": entry.get("container-title"),
        **{key: entry.get(key) for key in ("publisher", "volume")},
        "number": entry.get("issue"),
        "pages": entry.get("page", "").replace("–", "--"),
        "year": _year(entry),
        "note": entry.get("note"),
    }
    fields = {key: re.sub("([&_])", r"\\\1", value) for key, value in values.items() if value}
    fields |= {key.lower(): entry[key] for key in ("DOI", "URL") if key in entry}
    lines = ",\n".join(f"  {key} = {{{value}}}" for key, value in fields.items())
    return f"@{kind}{{{entry['id']},\n{lines}\n}}\n"
