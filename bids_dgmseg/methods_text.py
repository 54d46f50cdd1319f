"""Texts for the methods section of a paper, with their references: of a run (logs/CITATION) and of a scan (page)."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

from bids_dgmseg.config import SHIPPED_WEIGHTS
from bids_dgmseg.models.registry import MODELS, Model
from bids_dgmseg.segmentation.engines import engine_of

REFERENCES = "references.bib"
"""File of ``data/boilerplate``: one field per line, in braces."""

_BOILERPLATE = files("bids_dgmseg").joinpath("data", "boilerplate")

_MAX_AUTHORS = 6

_SPELLING = {"python": "Python", "torch": "PyTorch", "numpy": "NumPy", "scipy": "SciPy", "nibabel": "NiBabel"}

_SENTENCES: Mapping[str, Any] = tomllib.loads(_BOILERPLATE.joinpath("sentences.toml").read_text(encoding="utf-8"))

GROUP_SENTENCES: Mapping[str, str] = _SENTENCES["group"]
"""Tables of the group level → what a methods section says of them; ``always`` comes first."""

Records = Sequence[Mapping[str, Any]]
"""Contents of ``_qc.json`` of scans."""


class Citation(NamedTuple):
    """An entry of the bibliography."""

    key: str
    text: str
    """Authors, title, journal or publisher, volume and year."""
    url: str


class MethodsText(NamedTuple):
    """Methods paragraph for one model."""

    model: str
    text: str
    """Citations are numbers in brackets."""
    references: Sequence[Citation]
    """In the order of their numbers."""


def describe_methods(runs: Sequence[tuple[str, Mapping[str, Any]]]) -> tuple[MethodsText, ...]:
    """Write one paragraph per model, version and weights, from the model and ``_qc.json`` of each scan."""
    return tuple(MethodsText(model, *_number_citations(text)) for model, text in cite_methods(runs))


def cite_methods(runs: Sequence[tuple[str, Mapping[str, Any]]]) -> list[tuple[str, str]]:
    """Write the paragraphs of `describe_methods`, each with its model, with citations as pandoc reads them."""
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for model, qc in runs:
        version = (qc.get("versions") or {}).get("bids_dgmseg")
        groups.setdefault((model, str(version), str(_setting(qc, "weights"))), []).append(qc)
    return [(model, _describe(model, records)) for (model, _, _), records in groups.items()]


def _describe(name: str, records: Records) -> str:
    model = MODELS.get(name)
    versions = {str(key): str(value) for key, value in (records[0].get("versions") or {}).items()}
    version = versions.pop("bids_dgmseg", "")
    tools = ", ".join(f"{_SPELLING.get(tool, tool)} {version}" for tool, version in versions.items())
    user_weights = _setting(records[0], "weights") not in (None, SHIPPED_WEIGHTS)
    sentences = [
        _say("segmented", program=_say("program", version=version) + (f" ({tools})" if tools else "")),
        _describe_reconstruction(records),
        _describe_regularization(records),
        _describe_reference_regions(records),
        _describe_model(model, user_weights=user_weights) if model else f"The model was {name}.",
    ]
    if mirrored := [record for record in records if _setting(record, "mirrored")]:
        sentences.append(_say("mirrored", some=_some(mirrored, records)))
    sentences.append(_say("results"))
    if together := [record for record in records if _setting(record, "longitudinal")]:
        sentences.append(_say("longitudinal", some=_some(together, records)))
    sentences += _describe_measurement(records)
    if normalized := [record for record in records if record.get("normalization")]:
        sentences.append(_say("normalized", some=_some(normalized, records)))
    return " ".join(" ".join(sentences).split())


def _say(name: str, **values: Any) -> str:
    """Return a sentence of ``sentences.toml``."""
    return str(_SENTENCES[name]).strip().format(**values)


def _describe_measurement(records: Records) -> list[str]:
    """Describe manually edited labels, further maps and excluded voxels, where there are any."""
    sentences = []
    if edited := [record for record in records if (record.get("correction") or {}).get("edited")]:
        nuclei = ", ".join(dict.fromkeys(name for record in edited for name in record["correction"]["edited"]))
        sentences.append(_say("edited", some=_some(edited, records), nuclei=nuclei))
    reports = [about for record in records for about in (record.get("maps") or {}).items()]
    measured = {str(name): str(about.get("unit") or "no unit") for name, about in reports if not about.get("problem")}
    if measured:
        shown = ", ".join(f"{name.replace('_', ' ')} ({unit})" for name, unit in measured.items())
        sentences.append(_say("maps", maps=shown))
    if any(about.get("resampled") for _, about in reports):
        sentences.append(_say("resampled"))
    if excluded := [record for record in records if record.get("excluded")]:
        sentences.append(_say("excluded", some=_some(excluded, records)))
    return sentences


def _setting(record: Mapping[str, Any], key: str) -> Any:
    """Return a setting of the run that made a scan; None in records without it."""
    return (record.get("settings") or {}).get(key)


def _some(part: Sequence[Any], records: Sequence[Any]) -> str:
    """Return how many of the scans a sentence is about, in parentheses; empty if it is about all."""
    return "" if len(part) == len(records) else f" ({len(part)} of {len(records)} scans)"


def _describe_reconstruction(records: Records) -> str:
    """Describe how maps were reconstructed; empty if none was."""
    made = [record for record in records if record.get("reconstruction")]
    if not made:
        return ""
    n_echoes = max(len(record["reconstruction"].get("EchoTime") or ()) for record in made)
    text = read_boilerplate("reconstruction.md" if n_echoes > 1 else "reconstruction_one_echo.md")
    some = "" if len(made) == len(records) else _say("some_reconstructed")
    return f"{some} {text}"


def _describe_regularization(records: Records) -> str:
    """Return the weights λ of the inversions; empty if there are none."""
    made = [record.get("reconstruction") or {} for record in records]
    weights = [sidecar["RegularizationWeight"] for sidecar in made if sidecar.get("RegularizationWeight")]
    if not weights:
        return ""
    limits = dict.fromkeys(f"{weight:.3g}" for weight in (min(weights), max(weights)))
    return _say("regularization", weights=" to ".join(limits))


def _describe_reference_regions(records: Records) -> str:
    """Describe what the maps are relative to, and the reference region if one was chosen."""
    regions = {str((record.get("input") or {}).get("reference") or "not stated") for record in records}
    sentences = [_say("regions", regions=", ".join(sorted(regions)))]
    chosen = {str(record["reference"]["region"]) for record in records if (record.get("reference") or {}).get("region")}
    if chosen:
        sentences.append(_say("referenced", regions=", ".join(sorted(chosen))))
    return " ".join(sentences)


def _describe_model(model: Model, *, user_weights: bool) -> str:
    """Describe localizer, network and weights of a model."""
    if user_weights and engine_of(model).labels_from_folder:  # and the steps
        return _say("user_nnunet", model=model.name)
    localizers = _SENTENCES["localizers"]
    located = localizers.get(model.localizer.kind, localizers["network"])
    percent, trained = 100 * model.input.native_voxel_tolerance, model.weights
    weights = _say("weights", licence=trained.licence, trained_on=trained.trained_on) if trained else ""
    keys = "; ".join(f"@{key}" for key in model.citation if key != "bids_dgmseg")
    text = _say(
        "model",
        model=model.name,
        title=model.title,
        citation=f" [{keys}]" if keys else "",
        nuclei=describe_nuclei(model),
        spacing=" × ".join(f"{size:.3g}" for size in model.input.spacing_mm),
        own_voxels=_say("own_voxels", percent=percent) if percent else "",
        weights=_say("user_weights") if user_weights else weights,
    )
    return f"{located.format(shifted=localizers['shifted'] if model.localizer.guard else '')} {text}"


def describe_nuclei(model: Model) -> str:
    """List the nuclei of a model with their abbreviations for a methods section.

    >>> from bids_dgmseg.models.registry import MODELS
    >>> describe_nuclei(MODELS["dcnnet"])
    'dentate nucleus (DN) and interposed nucleus (IN)'
    """
    names = {structure.nucleus: structure.name.partition(" ")[2] for structure in model.structures}
    *others, last = [f"{name} ({abbreviation})" for abbreviation, name in names.items()]
    return f"{', '.join(others)} and {last}" if others else last


def read_boilerplate(name: str) -> str:
    """Read a text of ``data/boilerplate``."""
    return _BOILERPLATE.joinpath(name).read_text(encoding="utf-8")


def _number_citations(text: str) -> tuple[str, list[Citation]]:
    """Replace ``[@key; @other]`` by numbers in order of appearance; unknown keys are dropped."""
    references = read_references()
    numbers: dict[str, int] = {}

    def number(match: re.Match[str]) -> str:
        keys = [key for key in re.findall(r"@(\w+)", match[0]) if key in references]
        cited = [numbers.setdefault(key, len(numbers) + 1) for key in keys]
        return f" [{', '.join(map(str, cited))}]" if cited else ""

    return re.sub(r" \[@[^]]*\]", number, text), [references[key] for key in numbers]


@cache
def read_references() -> Mapping[str, Citation]:
    """Read the shipped BibTeX file, by key."""
    references = {}
    for key, content in re.findall(r"^@\w+\{(\w+),\n(.*?)^\}", read_boilerplate(REFERENCES), re.DOTALL | re.MULTILINE):
        fields = dict(re.findall(r"^  (\w+) = \{(.*)\},?$", content, re.MULTILINE))
        fields = {name: re.sub(r"[{}]|\\(?=[&_])", "", value) for name, value in fields.items()}
        names = [_short_name(name) for name in fields["author"].split(" and ")]
        authors = ", ".join(names[:_MAX_AUTHORS]) + (" et al." if len(names) > _MAX_AUTHORS else "")
        source = [fields[name] for name in ("journal", "booktitle", "publisher", "volume", "year") if name in fields]
        url = f"https://doi.org/{fields['doi']}" if "doi" in fields else fields.get("url", "")
        text = f"{authors.removesuffix('.')}. {fields['title']}. {' '.join(source)}."
        references[key] = Citation(key, text, url)
    return references


def _short_name(name: str) -> str:
    """Return family name and initials.

    >>> [_short_name(name) for name in ("Ros, Bo-An C.", "The X developers", "others")]
    ['Ros BAC', 'The X developers', 'et al.']
    """
    family, comma, first = name.partition(", ")
    initials = "".join(part[0] for part in re.split("[ -]", first)) if comma else ""
    return "et al." if name == "others" else f"{family} {initials}".strip()
