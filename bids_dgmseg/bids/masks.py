"""The masks that the user gives, and the reference region that a run asks for: is it to be had."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path

from bids_dgmseg.bids.names import split_entities
from bids_dgmseg.bids.scans import Scan
from bids_dgmseg.bids.segmentations import find_images, match_scans
from bids_dgmseg.config import Settings
from bids_dgmseg.errors import InputError, list_some
from bids_dgmseg.models.registry import Model

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
        raise InputError(
            f"--reference {kind}: goes with --reference-structure only where it is structure; give both "
            f"or neither, such as --reference structure --reference-structure {names[0]}"
        )
    if structure is not None and structure not in names:
        raise InputError(
            f"--reference-structure {structure}: not labelled by {model.name}; choose from {', '.join(names)}"
        )
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
    labels = {("label", label.casefold()) for label in MASK_LABELS}
    names = "no _label-CSF_mask.nii[.gz] and no _label-ventricles_mask.nii[.gz]"
    return _find_masks(settings.reference_mask, scans, labels, names=names, option="--reference-mask")


def find_brain_masks(settings: Settings, scans: Sequence[Scan]) -> dict[str, Path]:
    """Find the user's mask of the brain for each scan whose map is to be reconstructed.

    Parameters
    ----------
    settings : Settings
        ``brain_mask`` is a folder in which masks are named as in BIDS derivatives.
    scans : sequence of Scan
        The scans of the run.

    Returns
    -------
    dict
        Name of the scan → ``_desc-brain_mask`` or ``_label-brain_mask`` with the same entities; where there is none,
        one that differs in ``desc``, ``space`` or ``res``. Empty where no masks were given.

    Raises
    ------
    InputError
        If the folder holds no such mask, or not one for each scan with echoes.
    """
    echoes = [scan for scan in scans if scan.from_echoes]
    labels = {("desc", "brain"), ("label", "brain")}
    names = "no _desc-brain_mask.nii[.gz] and no _label-brain_mask.nii[.gz]"
    found = _find_masks(settings.brain_mask, echoes, labels, names=names, option="--brain-mask")
    if settings.brain_mask and (bare := [scan.name for scan in echoes if scan.name not in found]):
        raise InputError(f"{settings.brain_mask.name}: no mask of {list_some(bare)}; add it, or leave --brain-mask out")
    return found


def _find_masks(
    folder: Path | None, scans: Sequence[Scan], wanted: Collection[tuple[str, str]], *, names: str, option: str
) -> dict[str, Path]:
    """Find each scan's mask among those of which one entity is as wanted."""
    if folder is None:
        return {}
    masks: dict[str, list[Path]] = defaultdict(list)
    for path in find_images(folder, "mask", option=option):
        entities = split_entities(path.name.partition(".")[0])
        if any((key, value.casefold()) in wanted for key, value in entities.items()):
            masks[entities.get("sub", "")].append(path)
    if not masks:
        raise InputError(f"{folder.name}: {names} in it; name the masks so, or choose another {option}")
    found = {scan.name: _match(scan, masks[scan.participant], option) for scan in scans}
    return {name: mask for name, mask in found.items() if mask}


def _match(scan: Scan, masks: Sequence[Path], option: str) -> Path | None:
    named = Path(f"{scan.name}_Chimap.nii.gz")  # SEPIA's files are not named after their scan
    try:
        return match_scans([named], masks).get(named)
    except InputError as error:
        several = str(error).partition("; ")[0]
        raise InputError(f"{several}; keep one of them in the folder of {option}") from error
