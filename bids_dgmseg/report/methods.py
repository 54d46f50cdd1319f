"""The paragraph for a paper's methods section, from what was run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files

from bids_dgmseg.models import MODELS, Model
from bids_dgmseg.report.numbers import say_size
from bids_dgmseg.report.results import Result


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
    sentences: tuple[str, ...]
    references: tuple[Reference, ...]

    @property
    def text(self) -> str:
        """The paragraph."""
        return " ".join(self.sentences)


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
    cited = read_references((*(model.citation if model else ()), "gorgolewski2017", "gorgolewski2011", "paszke2019"))
    sentences = [_say_program(first), _say_input(results)]
    sentences += _say_model(model, own_weights=_own_weights(first)) if model else [f"The model was {first.model}."]
    sentences += [
        "Labels and probabilities were carried back to the grid of each map.",
        "Volumes were measured by counting voxels and by summing probabilities; susceptibility is given in ppm as "
        "mean, median, standard deviation and percentiles over the measured voxels of each nucleus.",
    ]
    return Methods(first.model, tuple(sentences), cited)


def _say_program(result: Result) -> str:
    versions = {str(key): str(value) for key, value in (result.quality.get("versions") or {}).items()}
    program = versions.pop("bids_dgmseg", "")
    tools = ", ".join(f"{'Python' if name == 'python' else name} {version}" for name, version in versions.items())
    beside = f" ({tools})" if tools else ""
    return f"Deep grey and cerebellar nuclei were segmented on susceptibility maps with bids_dgmseg {program}{beside}."


def _say_input(results: Sequence[Result]) -> str:
    inputs: list[Mapping[str, object]] = [result.quality.get("input") or {} for result in results]
    references = sorted({str(given["reference"]) for given in inputs if given.get("reference")})
    known = [reference for reference in references if reference != "not stated"]
    if len(known) == 1 and known == references:
        return f"Susceptibility is relative to the reference of the maps ({known[0]})."
    if known:
        return f"Susceptibility is relative to each map's own reference ({', '.join(references)})."
    return "Susceptibility is relative to each map's own reference, which their sidecars do not state."


def _say_model(model: Model, *, own_weights: bool) -> list[str]:
    nuclei = dict.fromkeys(structure.nucleus for structure in model.structures)
    sentences = [_say_localizer(model)]
    sentences.append(
        f"Within it the model {model.name} ({_lower(model.title)}) labelled {', '.join(nuclei)}, left and right, "
        f"at {say_size(model.input.spacing_mm)}."
    )
    if own_weights:
        sentences.append("Its weights were given by the user in place of those that ship with it.")
    elif model.weights:
        sentences.append(f"Its weights were trained on {model.weights.trained_on} (licence {model.weights.licence}).")
    return sentences


def _say_localizer(model: Model) -> str:
    if model.localizer.kind == "centre":
        return "The region of the nuclei was taken around the middle of the brain."
    at = f" at {say_size(model.localizer.input.spacing_mm)}" if model.localizer.input else ""
    return f"The region of the nuclei was found by a network that sees the whole head{at}."


def _own_weights(result: Result) -> bool:
    return (result.quality.get("settings") or {}).get("weights") not in (None, "", "None", "n/a")


def _lower(title: str) -> str:
    return title[:1].lower() + title[1:]


def read_references(keys: Sequence[str]) -> tuple[Reference, ...]:
    """Look keys up in ``data/boilerplate/references.bib``, passing over those it does not have."""
    path = files("bids_dgmseg").joinpath("data", "boilerplate", "references.bib")
    if not path.is_file():
        return ()
    known = parse_bibtex(path.read_text(encoding="utf-8"))
    return tuple(known[key] for key in dict.fromkeys(keys) if key in known)


def parse_bibtex(text: str) -> dict[str, Reference]:
    r"""Read a plain bibliography: entries that start a line, one ``field = {value}`` a line.

    >>> parse_bibtex("@article{a2020,\n  author = {Ann A and Bob B},\n  title = {On {MRI}},\n  year = {2020}\n}")
    {'a2020': Reference(key='a2020', authors='Ann A, Bob B', title='On MRI', source='2020', url='')}
    """
    references = {}
    for entry in re.split(r"^@", text, flags=re.MULTILINE)[1:]:
        head = re.match(r"\w+\s*\{\s*([^,\s]+)\s*,", entry)
        if head:
            found = re.findall(r"^\s*(\w+)\s*=\s*[{\"](.*?)[}\"]\s*,?\s*}?\s*$", entry, flags=re.MULTILINE)
            references[head[1]] = _reference(head[1], {name.lower(): _plain(value) for name, value in found})
    return references


def _reference(key: str, entry: Mapping[str, str]) -> Reference:
    names = entry.get("author", "").split(" and ")
    authors = ", ".join(names[:6]) + (", et al." if len(names) > 6 else "")
    place = entry.get("journal") or entry.get("booktitle") or entry.get("publisher") or ""
    url = f"https://doi.org/{entry['doi']}" if "doi" in entry else entry.get("url", "")
    source = " ".join(part for part in (place, entry.get("volume", ""), entry.get("year", "")) if part)
    return Reference(key, authors, entry.get("title", key), source, url)


def _plain(value: str) -> str:
    """Take BibTeX's braces away."""
    return re.sub(r"\s+", " ", value.replace("{", "").replace("}", "")).strip()
