"""Base classes of the interfaces and the node of a step, and the report that each step writes."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from nipype import Node
from nipype.interfaces.base import BaseInterfaceInputSpec, Bunch, Directory, SimpleInterface, isdefined, traits

from bids_dgmseg.config import Device
from bids_dgmseg.errors import InputError, list_some, raise_if_interrupted
from bids_dgmseg.io.files import hash_files, read_json, sha256_of, sidecar_path, write_json

if TYPE_CHECKING:
    from bids_dgmseg.image.volume import Volume
    from bids_dgmseg.models.registry import Model

_DESCRIBED = ("in_chi", "in_sessions", "in_maps", "in_correction")
"""Inputs of which the step also reads a JSON file or table of the same name."""


class FileInterface(SimpleInterface, ABC):
    """Interface with one function, ``run_step(folder) -> outputs``, that remembers the exception it raised.

    What only the function needs is imported when it runs: importing torch and matplotlib takes seconds, and the process
    that builds a workflow does not need them.
    """

    error: BaseException | None = None

    def _run_interface(self, runtime: Bunch) -> Bunch:
        # A workflow that leaves an optional input open passes "undefined" on, which replaces the default.
        defaults = self.inputs.traits(usedefault=True)
        self.inputs.reset_traits([name for name in defaults if not isdefined(getattr(self.inputs, name))])
        try:
            outputs = self.run_step(Path(runtime.cwd))
            self._results.update({name: _as_text(value) for name, value in outputs.items() if value is not None})
        except BaseException as error:
            self.error = error
            raise
        return runtime

    @abstractmethod
    def run_step(self, folder: Path) -> Mapping[str, Any]:
        """Do the work in an empty folder and return the outputs; those that are None stay undefined."""

    def path(self, name: str) -> Path | None:
        """Return the path of an input, None if it is not set."""
        value = getattr(self.inputs, name)
        return Path(value) if isdefined(value) and value else None

    def paths(self, name: str) -> list[Path]:
        """Return the paths of an input with several files."""
        values = getattr(self.inputs, name)
        return [Path(value) for value in values] if isdefined(values) else []


def _as_text(value: Any) -> Any:
    """Convert paths to text, also in lists."""
    if isinstance(value, list):
        return [_as_text(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value


class StepInputSpec(BaseInterfaceInputSpec):
    """Inputs that Nipype hashes together with the JSON files and tables of the same names next to them."""

    def get_hashval(self, hash_method: str | None = None) -> tuple[list[tuple[str, Any]], str]:
        """Hash the inputs, as Nipype does, and the files next to them."""
        inputs, value = super().get_hashval(hash_method)
        images = [Path(text) for name in _DESCRIBED for text in _texts(getattr(self, name, None))]
        beside = (sidecar_path(image).with_suffix(ending) for image in images for ending in (".json", ".tsv"))
        if not (paths := [path for path in beside if path.is_file()]):
            return inputs, value
        content = hash_files(paths)
        return [*inputs, ("sidecars", content)], sha256_of({"inputs": value, "sidecars": content})


def _texts(value: Any) -> Iterator[str]:
    """Yield the file names in the value of an input, which is a list in a MapNode."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


class NetworkInputSpec(StepInputSpec):
    """Inputs of the steps that run the networks of a model."""

    model = traits.Str("default", usedefault=True, desc="one of `bids_dgmseg.list_models`")
    weights = Directory(exists=True, desc="folder with other weights than the model's own")
    device = traits.Enum(*get_args(Device), usedefault=True, desc="device of the networks")
    n_threads = traits.Range(low=1, value=1, usedefault=True, desc="threads of the networks")


class NetworkInterface(FileInterface):
    """Interface that runs the networks of a model."""

    def choose_model(self) -> tuple[Model, list[str]]:
        """Limit the threads; return the model with the nuclei of its weights, and warnings."""
        from bids_dgmseg.models.model_folder import limit_threads
        from bids_dgmseg.models.registry import get_model
        from bids_dgmseg.segmentation.engines import choose_labels

        limit_threads(self.inputs.n_threads)
        model = get_model(self.inputs.model)
        return choose_labels(model, self.path("weights"))


class StepNode(Node):
    """Node that raises the exception of its interface; Nipype raises another one, which quotes the traceback."""

    error: BaseException | None = None

    def run(self, updatehash: bool = False) -> Any:
        """Run the interface, log its time, and keep the exception that it raises in `error`."""
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        try:
            raise_if_interrupted()
            result = super().run(updatehash=updatehash)
            took_s, cpu_s = time.perf_counter() - start_s, time.process_time() - start_cpu_s
            logging.getLogger("nipype.workflow").info("%s: %.3f s, CPU %.3f s", self.fullname, took_s, cpu_s)
            return result
        except BaseException as error:  # noqa: BLE001 - raised again below
            self.error = getattr(self.interface, "error", None) or error
            raise self.error from None


def write_report(folder: Path, *, warnings: list[str], **facts: Any) -> Path:
    """Write the report of a step: facts for the page and the QC record, and warnings without the scan's name."""
    return write_json({**facts, "warnings": warnings}, folder / "report.json")


def read_report(path: Path | str | None, *keys: str) -> dict[str, Any]:
    """Read the report of a step, empty without a path; `InputError` if it lacks a key, as that of another step."""
    report = read_json(Path(path)) if path else {}
    if path and (missing := [key for key in keys if key not in report]):
        raise InputError(f"{path}: has no {missing[0]}; pass the report of the step that the input is named after")
    return report


def read_dseg(path: Path | str, model: Model, chi: Volume | None = None) -> Volume:
    """Read the labels of a model as uint8; `InputError` for other numbers or, with a map, another grid."""
    import numpy as np

    from bids_dgmseg.image.grids import check_grid
    from bids_dgmseg.image.volume import read_labels

    dseg = read_labels(Path(path))
    numbers = [0, *(structure.index for structure in model.structures)]
    if unknown := np.unique(dseg.array[~np.isin(dseg.array, numbers)]).tolist():
        raise InputError(
            f"{Path(path).name}: label {list_some(map(str, unknown))} is not a nucleus of {model.name}; pass the "
            "labels of SegmentNuclei"
        )
    if chi:
        check_grid(path, dseg, chi)
    return dseg.with_array(dseg.array.astype(np.uint8))


def check_absolute(folder: Path | str) -> None:
    """Raise `InputError` if an output folder is relative: Nipype runs each node in another folder."""
    if not Path(folder).is_absolute():
        raise InputError(f"`out_dir` {folder}: is relative, and nodes run in other folders; pass an absolute path")
