"""The rule of what is up to date.

A result is current if and only if the content (SHA-256) of every input it was made from, the options that change
results, the weights and the version of the program equal what its record (``_qc.json``) says; a file is not hashed
again if its real path, size and times of change equal those in ``logs/inputs``.

Inputs are the map or the echoes of a scan with their metadata, masks, further maps, labels edited by hand, and the
images of sessions that are labelled together. The participant level redoes what is not current; the group level, which
need not have the options, compares inputs only and leaves such results out. An input that is not there, or not fetched,
is not checked. Outputs that a person has edited are kept unless the run is forced.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

import bids_dgmseg
from bids_dgmseg.bids.dataset import resolve_uri
from bids_dgmseg.bids.entities import Sidecars, split_entities, stem_of
from bids_dgmseg.errors import InputError, list_some
from bids_dgmseg.io.files import (
    NOT_FETCHED,
    is_file_or_unfetched,
    is_pointer_file,
    is_unfetched,
    read_optional_json,
    sha256,
    sha256_of,
    sidecar_path,
    to_json,
    write_json,
)
from bids_dgmseg.models.registry import Model

MAP_CHECKSUM = "Checksum"
"""Key in the sidecars of reconstructed maps: SHA-256 of the map, which a later run may have replaced."""


@dataclass(frozen=True)
class InputFile:
    """A file that results depend on."""

    path: Path
    uri: str = ""
    """BIDS URI; empty outside of datasets."""
    root: Path | None = None
    """Dataset whose sidecars apply to the file; None if its metadata do not matter."""
    sidecars: Callable[[str], Sidecars] = Sidecars
    """Sidecars of images with a suffix; cached, they are listed once."""

    @property
    def status(self) -> str:
        """Hash of real path, size and times of change, which differ if the content may differ; empty if it is gone."""
        try:
            status = self.path.stat()
        except OSError:
            return ""
        values = (str(self.path.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        return sha256_of({"status": values})[:32]

    @property
    def metadata(self) -> str | None:
        """Hash of the metadata by inheritance; None if a sidecar is not fetched."""
        if self.root is None:
            return ""
        try:
            suffix = stem_of(self.path).rpartition("_")[2]
            return sha256_of(self.sidecars(suffix).inherit(self.root, self.path))
        except InputError as error:  # the step that needs the metadata reports it
            return None if NOT_FETCHED in str(error) else "unreadable"

    def describe(self) -> dict[str, str]:
        """Return what `write_record` needs, before the file is read."""
        file = self.uri or str(self.path)
        return {"file": file, "path": str(self.path), "status": self.status, "metadata": self.metadata or ""}


@dataclass(frozen=True, kw_only=True)
class MadeFrom:
    """What the results of a scan are made from in a run."""

    inputs: Mapping[str, InputFile] = field(default_factory=dict)
    """Use of each file, such as ``reference mask`` → file."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options that change results."""
    weights: Mapping[str, str] = field(default_factory=dict)
    """Checksums of the weights by name, and of the definition of the model."""

    def describe(self) -> dict[str, Any]:
        """Return the record before the inputs are read; `write_record` adds their content."""
        inputs = {use: file.describe() for use, file in self.inputs.items()}
        return {"inputs": inputs, **self.settings}

    @property
    def settings(self) -> dict[str, Any]:
        """Options, weights and version as a record has them."""
        return {
            "options": msgspec.json.decode(msgspec.json.encode(dict(self.options))),
            "weights": dict(self.weights),
            "version": bids_dgmseg.__version__,
        }


def hash_weights(folder: Path | None, model: Model) -> Mapping[str, str]:
    """Hash the files of the user's weights, or return the checksums of the model's own.

    Raises
    ------
    InputError
        If the user's weights cannot be read.
    """
    if folder is None:
        return model.weights.files if model.weights else {}
    try:
        paths = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else [folder]
        # training/ contains what training needs, not prediction.
        used = [path for path in paths if path.relative_to(folder).parts[:1] != ("training",)]
        return {path.relative_to(folder).as_posix(): sha256(path) for path in used}
    except OSError as error:
        raise InputError(f"{folder}: the weights cannot be read ({error}); check `weights`") from error


def describe_model(model: Model) -> str:
    """Hash the definition of a model apart from its weights."""
    parts = (model.input, model.localizer, dict(model.label_numbers) or model.arch, model.postprocessing)
    return sha256_of({"model": [model.name, model.labels, model.mirrored, *map(str, parts)]})


def write_record(
    path: Path, content: Mapping[str, Any], made_from: Mapping[str, Any], checksums: Mapping[str, str], output_dir: Path
) -> Path:
    """Write ``_qc.json`` with what the results were made from.

    Parameters
    ----------
    path : path
    content : mapping
        Other content.
    made_from : mapping
        `MadeFrom.describe`, from before the inputs were read.
    checksums : mapping of str to str
        Files written, relative to the output folder → SHA-256, or empty if only their existence counts.
    output_dir : path

    Raises
    ------
    InputError
        If an input has changed since.
    """
    inputs, statuses = {}, {}
    for use, about in made_from.get("inputs", {}).items():
        file = Path(about["path"])
        checksum, statuses[use] = sha256(file), about["status"]
        if InputFile(file).status != about["status"]:
            raise InputError(f"{file.name}: changed while the scan was processed; run the same command again")
        inputs[use] = {"file": about["file"], "metadata": about["metadata"], "sha256": checksum}
    record = {**content, "made_from": {**made_from, "inputs": inputs}, "outputs": dict(checksums)}
    write_json(statuses, _status_path(output_dir, path))
    return write_json({**record, "checksum": sha256_of(to_json(record))}, path)


def _status_path(output_dir: Path, record: Path) -> Path:
    """Return the path of the status of the inputs, which is no part of a result: it differs between computers."""
    return output_dir / "logs" / "inputs" / record.name.replace("_qc.json", ".json")


class _Input(msgspec.Struct):
    """Record of an input."""

    file: str
    metadata: str
    sha256: str

    def difference(self, file: InputFile, status: Any) -> str:
        """Return what differs of a file; its content is read unless its status is the recorded one."""
        if file.status != status and sha256(file.path) != self.sha256:
            return "content"
        return "metadata" if file.metadata not in (None, self.metadata) else ""


class _MadeFrom(msgspec.Struct):
    """Record of what results were made from."""

    inputs: dict[str, _Input]
    options: dict[str, Any]
    weights: dict[str, str]
    version: str


class Record(msgspec.Struct):
    """Part of ``_qc.json`` that the rule needs."""

    made_from: _MadeFrom
    outputs: dict[str, str]

    @property
    def images(self) -> str:
        """Checksums of the map or the echoes."""
        inputs = self.made_from.inputs.items()
        return " ".join(sorted(entry.sha256 for use, entry in inputs if use == "map" or use.startswith("echo ")))


def _to_record(content: Mapping[str, Any]) -> Record | None:
    """Return what results were made from; None if ``_qc.json`` does not say it, or is of another program."""
    try:
        return msgspec.convert(content, Record)
    except msgspec.ValidationError:
        return None


def read_checksums(record: Path) -> tuple[str, Mapping[str, str]]:
    """Return the SHA-256 of the map that results were made from, empty if unknown, and of each of their files."""
    if (recorded := _to_record(read_optional_json(record))) is None:
        return "", {}
    maps = [entry.sha256 for use, entry in recorded.made_from.inputs.items() if use == "map"]
    maps += [checksum for name, checksum in recorded.outputs.items() if name.endswith("_Chimap.nii.gz")]
    return next(iter(maps), ""), recorded.outputs


@dataclass(frozen=True)
class Verdict:
    """Whether a result is current."""

    reason: str = ""
    """Why it is not; empty if it is."""
    edited: tuple[Path, ...] = ()
    """Outputs that a person has edited."""
    is_unchecked: bool = False
    """Whether an input is not there."""
    matches: bool | None = None
    """Whether the first input that is there, as a rule the map, equals its record."""
    record: Record | None = field(default=None, compare=False)
    """What the result was made from; None if unknown."""


def judge(
    output_dir: Path, record: Path, find: Callable[[str, str], InputFile | None], now: MadeFrom | None = None
) -> Verdict:
    """Return whether a result is current.

    Parameters
    ----------
    output_dir : path
        Dataset of the results.
    record : path
        Its ``_qc.json``.
    find : callable
        Returns the input file for a use and the recorded BIDS URI or path, None if there is none.
    now : MadeFrom, optional
        What the result would be made from in this run; by default only recorded inputs are compared.
    """
    content = read_optional_json(record)
    if (recorded := _to_record(content)) is None:
        return Verdict("there is no record of what it was made from" if now else "", is_unchecked=True)
    verdict = partial(Verdict, record=recorded)
    outputs = {output_dir / name: checksum for name, checksum in recorded.outputs.items() if checksum}
    edited = [path for path, checksum in outputs.items() if _is_edited(path, checksum)]
    if content.pop("checksum", None) != sha256_of(content):
        edited.append(record)
    if edited:
        return verdict(f"{list_some(path.name for path in edited)}: edited since the run", tuple(edited))
    if replaced := [path.name for path, checksum in outputs.items() if _replacement(path) not in ("", checksum)]:
        return verdict(f"{replaced[0]} was reconstructed again by another run")
    if now and (reason := _compare_settings(output_dir, recorded, now)):
        return verdict(reason)
    is_unchecked, matches, statuses = False, None, read_optional_json(_status_path(output_dir, record))
    for use, entry in recorded.made_from.inputs.items():
        file = find(use, entry.file)
        if file is None or is_unfetched(file.path) or not file.path.is_file():
            is_unchecked = True
        elif (what := entry.difference(file, statuses.get(use))) == "content":
            return verdict(f"{file.path.name} ({use}) has changed", matches=bool(matches))
        elif what:
            return verdict(f"the metadata of {file.path.name} ({use}) has changed", matches=True)
        else:
            matches = True
    return verdict(is_unchecked=is_unchecked, matches=matches)


def _compare_settings(output_dir: Path, recorded: Record, now: MadeFrom) -> str:
    """Return how options, weights, version or the set of inputs differ, or which output is missing."""
    before, after = recorded.made_from, now.settings
    if missing := [name for name in recorded.outputs if not _is_whole(output_dir / name)]:
        return f"{Path(missing[0]).name} is missing"
    if before.version != after["version"]:
        return f"made by version {before.version}, this is {after['version']}"
    if before.weights != after["weights"]:
        return "the weights or the definition of the model have changed"
    if changed := sorted(before.inputs.keys() ^ now.inputs.keys()):  # some options depend on them
        return f"{changed[0]} is {'new' if changed[0] in now.inputs else 'not used any more'}"
    options = after["options"]
    if changed := [key for key in before.options | options if before.options.get(key) != options.get(key)]:
        return f"`{changed[0]}` was {before.options.get(changed[0])}, now {options.get(changed[0])}"
    return ""


def _is_whole(path: Path) -> bool:
    """Return whether a file is there and not empty; one that is not fetched counts."""
    return is_unfetched(path) or (path.is_file() and path.stat().st_size > 0)


def _is_edited(path: Path, checksum: str) -> bool:
    """Return whether a person has changed a file; one that is empty or not fetched does not count."""
    if not path.is_file() or not path.stat().st_size or is_pointer_file(path):
        return False
    return sha256(path) not in (checksum, _replacement(path))


def _replacement(path: Path) -> str:
    """Return the checksum in the sidecar of a reconstructed map; empty for other files."""
    return str(read_optional_json(sidecar_path(path)).get(MAP_CHECKSUM, ""))


def judge_stored(
    output_dir: Path,
    record: Path,
    roots: Mapping[str, list[Path]],
    sidecars: Callable[[str], Sidecars] = Sidecars,
    sessions: Collection[str] = (),
) -> Verdict:
    """Return whether a result is current as far as datasets show (`bids_dgmseg.bids.dataset.dataset_roots`).

    Sessions that are labelled together must be all that the dataset has, or all of the selected `sessions`.
    """

    def find(use: str, file: str) -> InputFile | None:
        if not file.startswith("bids:"):
            return InputFile(Path(file)) if is_file_or_unfetched(Path(file)) else None
        located = resolve_uri(file, roots)
        return InputFile(located[1], file, located[0], sidecars) if located else None

    verdict = judge(output_dir, record, find)
    inputs = verdict.record.made_from.inputs if verdict.record else {}
    if verdict.reason or not any(use.startswith("sub-") for use in inputs):
        return verdict
    use, first = next(iter(inputs.items()))
    file, label = find(use, first.file), split_entities(Path(first.file).name).get("ses")
    if file and file.root and label:
        pattern = file.path.relative_to(file.root).as_posix().replace(f"ses-{label}", "ses-*")
        names = {path.name for path in file.root.glob(pattern)} - {Path(entry.file).name for entry in inputs.values()}
        labels = {split_entities(name).get("ses", "") for name in names}
        if added := labels & {*sessions} if sessions else labels:
            reason = f"ses-{min(added)} is not among the sessions that were labelled together"
            return replace(verdict, reason=reason, is_unchecked=False, matches=True)
    return verdict
