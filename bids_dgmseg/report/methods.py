"""The methods paragraph of a paper, written from what was run."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bids_dgmseg.bids.output_dataset import (
    RECONSTRUCTION_METHODS,
    describe_nuclei,
    describe_reconstruction,
    describe_weights,
    read_boilerplate,
)
from bids_dgmseg.config import SHIPPED_WEIGHTS
from bids_dgmseg.models.registry import MODELS, Model
from bids_dgmseg.report.html import format_size, format_value

_MAX_AUTHORS = 6

_SPELLING = {
    "python": "Python",
    "torch": "PyTorch",
    "numpy": "NumPy",
    "scipy": "SciPy",
    "nibabel": "NiBabel",
    "nipype": "Nipype",
}

_ACCENTS = {"'": "\u0301", "`": "\u0300", "^": "\u0302", '"': "\u0308", "~": "\u0303"}  # combining


@dataclass(frozen=True)
class BibEntry:
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
    references: tuple[BibEntry, ...]
    """In the order of their numbers."""


def describe_methods(runs: Sequence[tuple[str, Mapping[str, Any]]]) -> tuple[MethodsText, ...]:
    """Write one paragraph per model, version and weights, from the model and ``_qc.json`` of each scan."""
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for model, qc in runs:
        settings, versions = qc.get("settings") or {}, qc.get("versions") or {}
        groups.setdefault((model, str(versions.get("bids_dgmseg")), str(settings.get("weights"))), []).append(qc)
    return tuple(_describe(model, records) for (model, _, _), records in groups.items())


def _describe(name: str, records: Sequence[Mapping[str, Any]]) -> MethodsText:
    model, settings = MODELS.get(name), records[0].get("settings") or {}
    versions = {str(key): str(value) for key, value in (records[0].get("versions") or {}).items()}
    program = versions.pop("bids_dgmseg", "")
    tools = ", ".join(f"{_SPELLING.get(tool, tool)} {version}" for tool, version in versions.items())
    reconstructions = [record.get("reconstruction") or {} for record in records]
    n_echoes = [len(record.get("EchoTime") or [0]) if record else 0 for record in reconstructions]
    methods = {
        step: settings[step]
        for step in ("unwrapping", "background", "inversion")
        if settings.get(step) in RECONSTRUCTION_METHODS
    }
    user_weights = settings.get("weights") not in (None, SHIPPED_WEIGHTS)
    sentences = [
        "Deep gray nuclei were segmented on quantitative susceptibility maps (QSM) [@qsm_consensus] with "
        f"bids_dgmseg {program} [@bids_dgmseg], a BIDS App [@bids; @bids_apps] based on Nipype [@nipype], PyBIDS "
        "[@pybids], NiBabel [@nibabel], NumPy [@numpy], SciPy [@scipy] and PyTorch [@torch]"
        + (f" ({tools})." if tools else "."),
        " ".join(describe_reconstruction(n_echoes, **methods).split()),
        _describe_regularization(reconstructions),
        _describe_reference_regions(records),
        _describe_model(model, user_weights=user_weights) if model else f"The model was {name}.",
    ]
    if settings.get("mirrored"):
        checkpoints = ", and over two checkpoints if available" if settings.get("ensemble") else ""
        sentences.append(f"Probabilities were averaged over each map and its mirror image{checkpoints}.")
    sentences += [
        "Labels and probabilities were resampled to the grid of each map.",
        "The volume of each nucleus was computed by counting voxels and by summing probabilities, and its "
        "susceptibility (ppm) as mean, median, standard deviation and percentiles over valid voxels. In deep gray "
        "matter, susceptibility increases with the concentration of iron [@langkammer2012].",
    ]
    text = " ".join(sentence for sentence in sentences if sentence)
    bibliography = parse_bibtex(read_boilerplate("references.bib"))
    return MethodsText(name, *_number_citations(text, bibliography))


def _describe_regularization(reconstructions: Sequence[Mapping[str, Any]]) -> str:
    """Return the weights λ of the inversions, and the noise that they follow; empty if there are none."""
    given = [
        (one["RegularizationWeight"], 1000 * one["FieldNoise"])
        for one in reconstructions
        if one.get("RegularizationWeight")
    ]
    if not given:
        return ""
    weight, noise = (
        " to ".join(dict.fromkeys(format_value(float(value)) for value in (min(values), max(values))))
        for values in zip(*given, strict=True)
    )
    return f"The regularization weight λ was {weight}, in proportion to the noise of the field ({noise} ppb)."


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
    if user_weights and localizer.kind == "nnunet":  # its nuclei and steps are those of the user's folder
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
        spacing = f" at {format_size(localizer.input.spacing_mm)}" if localizer.input else ""
        located = f"The region of interest was localized by a network in the whole head{spacing}."
    # as within a sentence; names such as DCN-Net and DeepQSMSeg keep their capitals
    first = model.title.split()[0].rstrip(":")
    title = model.title if first[1:] != first[1:].lower() else model.title[:1].lower() + model.title[1:]
    cited = "; ".join(f"@{key}" for key in model.citation if key != "bids_dgmseg")
    share = model.input.native_voxel_tolerance
    own_voxels = f", or at the voxel size of the map where it differs by at most {100 * share:.0f} %" if share else ""
    text = (
        f"{located} Within it, the model {model.name} ({title}){f' [{cited}]' if cited else ''} labelled the "
        f"{describe_nuclei(model)} in both hemispheres at {format_size(model.input.spacing_mm)}{own_voxels}."
    )
    return f"{text} {describe_weights(model, shipped=not user_weights)}".strip()


def _number_citations(text: str, known: Mapping[str, BibEntry]) -> tuple[str, tuple[BibEntry, ...]]:
    """Replace ``[@key; @other]`` by numbers in order of appearance; unknown keys are dropped."""
    numbers: dict[str, int] = {}

    def number(match: re.Match[str]) -> str:
        keys = [key for key in re.findall(r"@(\w+)", match[0]) if key in known]
        cited = [numbers.setdefault(key, len(numbers) + 1) for key in keys]
        return f" [{', '.join(map(str, cited))}]" if cited else ""

    return re.sub(r" \[@[^]]*\]", number, text), tuple(known[key] for key in numbers)


def parse_bibtex(text: str) -> dict[str, BibEntry]:
    r"""Parse a plain bibliography: entries start a line, and each line has one ``field = {value}``.

    >>> parse_bibtex("@article{a2020,\n  author = {Lee, Ann and Ros, Bo},\n  title = {On {MRI}},\n  year = {2020}\n}")
    {'a2020': BibEntry(key='a2020', authors='Lee A, Ros B', title='On MRI', source='2020', url='')}
    """
    entries = {}
    for block in re.split(r"^@", text, flags=re.MULTILINE)[1:]:
        if not (head := re.match(r"\w+\s*\{\s*([^,\s]+)\s*,", block)):
            continue
        found = re.findall(r"^\s*(\w+)\s*=\s*[{\"]?(.*?)[}\"]?\s*,?\s*}?\s*$", block, flags=re.MULTILINE)
        fields = {name.lower(): value for name, value in found}
        names = [_short_name(name) for name in fields.get("author", "").split(" and ")]
        authors = ", ".join(names[:_MAX_AUTHORS]) + (" et al." if len(names) > _MAX_AUTHORS else "")
        authors = authors.replace(", et al.", " et al.").removesuffix(".")
        entry = {name: _plain_text(value) for name, value in fields.items()}
        publisher = entry.get("journal") or entry.get("booktitle") or entry.get("publisher") or ""
        source = " ".join(part for part in (publisher, entry.get("volume", ""), entry.get("year", "")) if part)
        url = f"https://doi.org/{entry['doi']}" if "doi" in entry else entry.get("url", "")
        entries[head[1]] = BibEntry(head[1], authors, entry.get("title", head[1]), source, url)
    return entries


def _short_name(name: str) -> str:
    r"""Return family name and initials; as in BibTeX, braces protect a name and lowercase starts a family name.

    >>> [_short_name(name) for name in ("Ros, Bo A.", "Bo A. Ros", "Alejandro de la Vega", "{The X developers}")]
    ['Ros BA', 'Ros BA', 'de la Vega A', 'The X developers']
    """
    if name == "others":
        return "et al."
    if name.startswith("{") and not name.startswith("{\\"):
        return _plain_text(name)
    family, comma, given = _plain_text(name).partition(", ")
    if not comma:
        words = family.split()
        start = next((index for index, word in enumerate(words) if word[0].islower()), len(words) - 1)
        family, given = " ".join(words[start:]), " ".join(words[:start])
    initials = "".join(part[0] for part in re.split(r"[ -]", given) if part)
    return f"{family} {initials}".strip()


def _plain_text(value: str) -> str:
    """Remove BibTeX's braces and escapes."""
    bare = value.replace("{", "").replace("}", "").replace("\\_", "_").replace("\\&", "&")
    accented = re.sub(r"\\([\"'`^~])(\w)", lambda match: match[2] + _ACCENTS[match[1]], bare)
    return unicodedata.normalize("NFC", re.sub(r"\s+", " ", accented)).strip()
