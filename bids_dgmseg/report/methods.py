"""The paragraph for a paper's methods section, from what was run."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bids_dgmseg.bids.citation import read_boilerplate, say_reconstruction
from bids_dgmseg.config import SHIPPED_WEIGHTS
from bids_dgmseg.models.registry import MODELS, Model
from bids_dgmseg.report.formatting import say_size
from bids_dgmseg.report.results import Result

_MOST_AUTHORS = 6

_SPELLED = {"python": "Python", "torch": "PyTorch", "numpy": "NumPy", "scipy": "SciPy", "nibabel": "NiBabel"}

_ACCENTS = {"'": "\u0301", "`": "\u0300", "^": "\u0302", '"': "\u0308", "~": "\u0303"}  # combining


@dataclass(frozen=True)
class Reference:
    """An entry of the bibliography."""

    key: str
    authors: str
    title: str
    source: str
    """Journal or publisher, and year."""
    url: str


@dataclass(frozen=True)
class Methods:
    """Text about one model as it was run on some scans of a page."""

    model: str
    text: str
    """Citations are numbers in brackets."""
    references: tuple[Reference, ...]
    """In the order of their numbers."""


def write_methods(results: Sequence[Result]) -> tuple[Methods, ...]:
    """Write a paragraph for each model and version on a page."""
    groups: dict[tuple[str, str, str], list[Result]] = {}
    for result in results:
        settings, versions = result.quality.get("settings") or {}, result.quality.get("versions") or {}
        key = (result.model, str(versions.get("bids_dgmseg")), str(settings.get("weights")))
        groups.setdefault(key, []).append(result)
    return tuple(_describe(group) for group in groups.values())


def _describe(results: Sequence[Result]) -> Methods:
    first = results[0]
    model = MODELS.get(first.model)
    sentences = [_say_program(first), *_say_reconstruction(results), _say_input(results), *_say_reference(results)]
    sentences += _say_model(model, own_weights=_own_weights(first)) if model else [f"The model was {first.model}."]
    settings = first.quality.get("settings") or {}
    if settings.get("mirrored"):
        more = ", and over two checkpoints where the weights have them" if settings.get("ensemble") else ""
        sentences.append(f"Probabilities were averaged over each map and its mirror image{more}.")
    sentences += [
        "Labels and probabilities were carried back to the grid of each map.",
        "Volumes were measured by counting voxels and by summing probabilities; susceptibility is given in ppm as "
        "mean, median, standard deviation and percentiles over the measured voxels of each nucleus; in deep grey "
        "matter it grows with the concentration of iron [@langkammer2012].",
    ]
    return Methods(first.model, *_number_citations(" ".join(sentences), read_bibliography()))


def _say_program(result: Result) -> str:
    versions = {str(key): str(value) for key, value in (result.quality.get("versions") or {}).items()}
    program = versions.pop("bids_dgmseg", "")
    tools = ", ".join(f"{_SPELLED.get(name, name)} {version}" for name, version in versions.items())
    return (
        "Deep nuclei of the brain were segmented on quantitative susceptibility maps [@qsm_consensus] with "
        f"bids_dgmseg {program} [@bids_dgmseg], a BIDS App [@bids; @bids_apps] built on Nipype [@nipype], PyBIDS "
        "[@pybids], NiBabel [@nibabel], NumPy [@numpy], SciPy [@scipy] and PyTorch [@torch]"
        + (f" ({tools})." if tools else ".")
    )


def _say_reconstruction(results: Sequence[Result]) -> list[str]:
    """Say how maps came about that were made of echoes; nothing where all were given."""
    made = [result.quality.get("reconstruction") or {} for result in results]
    text = say_reconstruction([len(given.get("EchoTime") or [0]) if given else 0 for given in made])
    return [" ".join(text.split())] if text else []


def _say_input(results: Sequence[Result]) -> str:
    inputs: list[Mapping[str, object]] = [result.quality.get("input") or {} for result in results]
    references = sorted({str(given["reference"]) for given in inputs if given.get("reference")})
    known = [reference for reference in references if reference != "not stated"]
    if len(known) == 1 and known == references:
        return f"Susceptibility is relative to the reference of the maps ({known[0]})."
    if known:
        return f"Susceptibility is relative to each map's own reference ({', '.join(references)})."
    return "Susceptibility is relative to each map's own reference, which their sidecars do not state."


def _say_reference(results: Sequence[Result]) -> list[str]:
    """Say what referenced susceptibilities are relative to; nothing where there are none."""
    found = [result.quality.get("reference") or {} for result in results]
    regions = sorted({str(reference["region"]) for reference in found if reference.get("region")})
    if not regions:
        return []
    return [f"Values named referenced are relative to the mean of a region of the same map ({', '.join(regions)})."]


def _say_model(model: Model, *, own_weights: bool) -> list[str]:
    nuclei = dict.fromkeys(structure.nucleus for structure in model.structures)
    others = [f"@{key}" for key in model.citation if key != "bids_dgmseg"]
    cited = f" [{'; '.join(others)}]" if others else ""
    sentences = [
        _say_localizer(model),
        f"Within it the model {model.name} ({_lower(model.title)}){cited} labelled {', '.join(nuclei)}, left and "
        f"right, at {say_size(model.input.spacing_mm)}{_say_own_voxels(model)}.",
    ]
    if own_weights:
        sentences.append("Its weights were given by the user in place of those that ship with it.")
    elif model.weights:
        sentences.append(f"Its weights were trained on {model.weights.trained_on} (licence {model.weights.licence}).")
    return sentences


def _say_own_voxels(model: Model) -> str:
    share = model.input.native_voxel_tolerance
    return f" or on the map's own voxels where these differ from it by at most {share:.0%}" if share else ""


def _say_localizer(model: Model) -> str:
    moved = ", moved where it would have cut a nucleus that a network saw in the whole head"
    guarded = moved if model.localizer.guard else ""
    if model.localizer.kind == "centre":
        return f"The region was taken around the middle of the brain{guarded}."
    if model.localizer.kind == "atlas":
        return (
            "The region of the nuclei was carried over from a labelled reference map, the one of largest mutual "
            f"information after rigid registration, by an affine registration{guarded}."
        )
    at = f" at {say_size(model.localizer.input.spacing_mm)}" if model.localizer.input else ""
    return f"The region of the nuclei was found by a network that sees the whole head{at}."


def _own_weights(result: Result) -> bool:
    return (result.quality.get("settings") or {}).get("weights") not in (None, SHIPPED_WEIGHTS)


def _lower(title: str) -> str:
    """Begin a title as within a sentence; names such as DCN-Net and DeepQSMSeg keep their capitals."""
    first = title.split()[0].rstrip(":")
    return title if first[1:] != first[1:].lower() else title[:1].lower() + title[1:]


def _number_citations(text: str, known: Mapping[str, Reference]) -> tuple[str, tuple[Reference, ...]]:
    """Turn ``[@key; @other]`` into numbers in the order in which they come; unknown keys fall away."""
    numbers: dict[str, int] = {}

    def number(found: re.Match[str]) -> str:
        keys = [key for key in re.findall(r"@(\w+)", found[0]) if key in known]
        cited = [numbers.setdefault(key, len(numbers) + 1) for key in keys]
        return f" [{', '.join(map(str, cited))}]" if cited else ""

    return re.sub(r" \[@[^]]*\]", number, text), tuple(known[key] for key in numbers)


def read_bibliography() -> dict[str, Reference]:
    """Read ``data/boilerplate/references.bib``."""
    return parse_bibtex(read_boilerplate("references.bib"))


def parse_bibtex(text: str) -> dict[str, Reference]:
    r"""Read a plain bibliography: entries that start a line, one ``field = {value}`` a line.

    >>> parse_bibtex("@article{a2020,\n  author = {Lee, Ann and Ros, Bo},\n  title = {On {MRI}},\n  year = {2020}\n}")
    {'a2020': Reference(key='a2020', authors='Lee A, Ros B', title='On MRI', source='2020', url='')}
    """
    references = {}
    for entry in re.split(r"^@", text, flags=re.MULTILINE)[1:]:
        head = re.match(r"\w+\s*\{\s*([^,\s]+)\s*,", entry)
        if head:
            found = re.findall(r"^\s*(\w+)\s*=\s*[{\"]?(.*?)[}\"]?\s*,?\s*}?\s*$", entry, flags=re.MULTILINE)
            references[head[1]] = _reference(head[1], {name.lower(): value for name, value in found})
    return references


def _reference(key: str, fields: Mapping[str, str]) -> Reference:
    names = [_short_name(name) for name in fields.get("author", "").split(" and ")]
    entry = {name: _plain(value) for name, value in fields.items()}
    authors = ", ".join(names[:_MOST_AUTHORS]) + (" et al." if len(names) > _MOST_AUTHORS else "")
    place = entry.get("journal") or entry.get("booktitle") or entry.get("publisher") or ""
    url = f"https://doi.org/{entry['doi']}" if "doi" in entry else entry.get("url", "")
    source = " ".join(part for part in (place, entry.get("volume", ""), entry.get("year", "")) if part)
    authors = authors.replace(", et al.", " et al.").removesuffix(".")
    return Reference(key, authors, entry.get("title", key), source, url)


def _short_name(name: str) -> str:
    r"""Family name and initials; braces keep a name whole, small letters begin a family name, as in BibTeX.

    >>> [_short_name(name) for name in ("Ros, Bo A.", "Bo A. Ros", "Alejandro de la Vega", "{The X developers}")]
    ['Ros BA', 'Ros BA', 'de la Vega A', 'The X developers']
    """
    if name == "others":
        return "et al."
    if name.startswith("{") and not name.startswith("{\\"):
        return _plain(name)
    family, comma, given = _plain(name).partition(", ")
    if not comma:
        words = family.split()
        start = next((place for place, word in enumerate(words) if word[0].islower()), len(words) - 1)
        family, given = " ".join(words[start:]), " ".join(words[:start])
    initials = "".join(part[0] for part in re.split(r"[ -]", given) if part)
    return f"{family} {initials}".strip()


def _plain(value: str) -> str:
    """Take BibTeX's braces and escapes away."""
    bare = value.replace("{", "").replace("}", "").replace("\\_", "_").replace("\\&", "&")
    spelled = re.sub(r"\\([\"'`^~])(\w)", lambda found: found[2] + _ACCENTS[found[1]], bare)
    return unicodedata.normalize("NFC", re.sub(r"\s+", " ", spelled)).strip()
