"""Base classes: an interface with one function from files to files, and a node that keeps its exception."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nipype import Node
from nipype.interfaces.base import BaseInterfaceInputSpec, Bunch, SimpleInterface, isdefined

from bids_dgmseg.errors import InputError, list_some, raise_if_interrupted
from bids_dgmseg.io.files import hash_files, sha256_of

if TYPE_CHECKING:
    from bids_dgmseg.image.volume import Volume
    from bids_dgmseg.models.registry import Model


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
            self._results.update(self.run_step(Path(runtime.cwd)))
        except BaseException as error:
            self.error = error
            raise
        return runtime

    @abstractmethod
    def run_step(self, folder: Path) -> Mapping[str, Any]:
        """Do the work in an empty folder and return the outputs."""


class HashedSidecarsInputSpec(BaseInterfaceInputSpec):
    """Inputs next to which the step reads further files, so that Nipype runs it again if these have changed."""

    def sidecars(self) -> Sequence[Path]:
        """Return the further files that the step reads."""
        raise NotImplementedError

    def get_hashval(self, hash_method: str | None = None) -> tuple[list[tuple[str, Any]], str]:
        """Hash the inputs, as Nipype does, and the further files."""
        inputs, value = super().get_hashval(hash_method)
        if not (paths := [path for path in self.sidecars() if path.is_file()]):
            return inputs, value
        content = hash_files(paths)
        return [*inputs, ("sidecars", content)], sha256_of({"inputs": value, "sidecars": content})


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


def check_absolute(folder: Path | str) -> None:
    """Raise `InputError` if an output folder is relative: Nipype runs each node in another folder."""
    if not Path(folder).is_absolute():
        raise InputError(f"`out_dir` {folder}: is relative, and nodes run in other folders; pass an absolute path")


def find_model(name: str, labels: Sequence[str]) -> Model:
    """Return a model of the registry, with other nuclei if any are stated."""
    from dataclasses import replace

    from bids_dgmseg.models.registry import get_model

    model = get_model(name)
    return replace(model, labels=tuple(labels)) if labels else model


def read_dseg(path: str, model: Model) -> Volume:
    """Read the labels of a model as uint8; `InputError` if a number is not that of one of its nuclei."""
    import numpy as np

    from bids_dgmseg.image.volume import read_labels

    dseg = read_labels(Path(path))
    known = [0, *(one.index for one in model.structures)]
    if unknown := np.unique(dseg.array[~np.isin(dseg.array, known)]).tolist():
        raise InputError(
            f"{Path(path).name}: label {list_some(map(str, unknown))} is not a nucleus of {model.name}; pass "
            "labels with the numbers of this program, and their `model` and `labels`"
        )
    return dseg.with_array(dseg.array.astype(np.uint8))


def path_or_none(value: Any) -> Path | None:
    """Return the path of a file trait, None if it is not set."""
    return Path(value) if value else None
