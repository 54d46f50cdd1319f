"""The reference region that a run asks for: is it to be had, and where are the masks that the user gives."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from bids_dgmseg.bids.dataset import Scan
from bids_dgmseg.bids.names import split_entities
from bids_dgmseg.bids.segmentations import find_images, match_scans
from bids_dgmseg.errors import InputError
from bids_dgmseg.models import Model
from bids_dgmseg.settings import Settings

MASK_LABELS = ("CSF", "ventricles")
"""Values of ``label-`` that a mask of cerebrospinal fluid has, in any case."""


def check_reference(settings: Settings, model: Model) -> None:
    """Refuse options of the reference that do not go together, or that the model cannot serve.

    Raises
    ------
    InputError
        If a structure is missing, superfluous or unknown to the model, a mask is given for another reference than
        CSF, or the model labels no ventricles and there are no masks.
    """
    kind, structure = settings.reference, settings.reference_structure
    names = [*dict.fromkeys(one.nucleus for one in model.structures), *model.labels]
    if (kind == "structure") != (structure is not None):
        raise InputError(f"--reference {kind}: goes with --reference-structure only where it is structure; give both "
                         f"or neither, such as --reference structure --reference-structure {names[0]}")  # fmt: skip
    if structure is not None and structure not in names:
        raise InputError(f"--reference-structure {structure}: not labelled by {model.name}; choose from "
                         f"{', '.join(names)}")  # fmt: skip
    if settings.reference_mask and kind != "csf":
        raise InputError(f"--reference-mask: is for --reference csf, not {kind}; give --reference csf with it")
    if kind == "csf" and not settings.reference_mask and "ventricles" not in model.localizer.labels:
        raise InputError(f"--reference csf: {model.name} labels no ventricles; give masks with --reference-mask")


def find_reference_masks(settings: Settings, scans: Sequence[Scan]) -> dict[str, Path]:
    """Find the user's mask of each scan.

    Parameters
    ----------
    settings : Settings
        ``reference_mask`` is a folder in which masks are named as in BIDS derivatives.
    scans : sequence of Scan
        The scans of the run.

    Returns
    -------
    dict
        Name of the scan → ``_label-CSF_mask`` or ``_label-ventricles_mask`` with the same entities; where there is
        none, one that differs in ``desc``, ``space`` or ``res``. Empty where no masks were given.

    Raises
    ------
    InputError
        If the folder holds no such mask, or several for one scan.
    """
    folder = settings.reference_mask
    if folder is None:
        return {}
    labels = {label.casefold() for label in MASK_LABELS}
    masks: dict[str, list[Path]] = defaultdict(list)
    for path in find_images(folder, "mask"):
        entities = split_entities(path.name.partition(".")[0])
        if entities.get("label", "").casefold() in labels:
            masks[entities.get("sub", "")].append(path)
    if not masks:
        raise InputError(f"{folder.name}: no _label-CSF_mask.nii[.gz] and no _label-ventricles_mask.nii[.gz] in it; "
                         "name the masks so, or choose another --reference-mask")  # fmt: skip
    found = {scan.name: _match(scan, masks[scan.participant]) for scan in scans}
    return {name: mask for name, mask in found.items() if mask}


def _match(scan: Scan, masks: Sequence[Path]) -> Path | None:
    named = Path(f"{scan.name}_Chimap.nii.gz")  # SEPIA's files are not named after their scan
    try:
        return match_scans([named], masks).get(named)
    except InputError as error:
        several = str(error).partition("; ")[0]
        raise InputError(f"{several}; keep one of them in the folder of --reference-mask") from error
