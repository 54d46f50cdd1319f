"""Numbers of the nuclei in the label images of an output folder: those of this program, or those of FreeSurfer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from bids_dgmseg.bids.segmentations import read_label_table
from bids_dgmseg.config import LabelIds
from bids_dgmseg.io.files import atomic_write, copy_file, write_text
from bids_dgmseg.models.structures import ALL_STRUCTURES, Structure

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from bids_dgmseg.image.volume import Volume


def renumber(structures: Sequence[Structure], label_ids: LabelIds) -> list[Structure]:
    """Return nuclei with the numbers that they have in files.

    >>> renumber([ALL_STRUCTURES.named("CN_R")], "freesurfer")[0].index
    50
    """
    return [replace(one, index=one.freesurfer) if label_ids == "freesurfer" else one for one in structures]


def write_dseg(source: Path, path: Path, label_ids: LabelIds) -> Path:
    """Write labels of structures.tsv with the numbers that they have in files."""
    if label_ids == "dgmseg":
        return copy_file(source, path)
    import numpy as np

    from bids_dgmseg.io.nifti import load_image

    image = load_image(source)
    numbers = {one.index: one.freesurfer for one in ALL_STRUCTURES}
    renumbered = type(image)(_exchange(np.asanyarray(image.dataobj), numbers).astype(np.int16), None, image.header)
    renumbered.set_data_dtype(np.int16)  # the largest number does not fit in 8 bits
    with atomic_write(path) as temporary:
        renumbered.to_filename(temporary)
    return path


def write_stats(source: Path, path: Path, label_ids: LabelIds) -> Path:
    """Write the table of the measures; its column ``index`` has the numbers of the labels in files."""
    if label_ids == "dgmseg":
        return copy_file(source, path)
    header, *rows = (line.split("\t") for line in source.read_text(encoding="utf-8").splitlines())
    place, numbers = header.index("index"), {str(one.index): str(one.freesurfer) for one in ALL_STRUCTURES}
    for row in rows:
        row[place] = numbers.get(row[place], row[place])
    return write_text("\n".join("\t".join(row) for row in (header, *rows)), path)


def read_nuclei(dseg: Path) -> Volume:
    """Read a label image of an output folder in the numbers of structures.tsv, whatever numbers it has.

    Raises
    ------
    InputError
        If the image or its label table cannot be read.
    """
    import numpy as np

    from bids_dgmseg.image.volume import read_labels

    known = {one.abbreviation: one.index for one in ALL_STRUCTURES}
    table = read_label_table(dseg).abbreviations
    labels = read_labels(dseg)
    numbers = {number: known[name] for number, name in table.items() if name in known}
    return labels.with_array(_exchange(labels.array, numbers).astype(np.uint8))


def _exchange(labels: NDArray[np.integer], numbers: Mapping[int, int]) -> NDArray[np.int32]:
    """Exchange numbers of labels; those not listed become 0."""
    import numpy as np

    exchanged = np.zeros(labels.shape, np.int32, order="F")
    for number, other in numbers.items():
        exchanged[labels == number] = other
    return exchanged
