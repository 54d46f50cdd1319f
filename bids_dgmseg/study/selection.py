"""Which of the scans that were measured a study is made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from bids_dgmseg.errors import InputError
from bids_dgmseg.stats.frames import name_some


@dataclass(frozen=True)
class Choice:
    """Labels of those that are wanted; empty means all."""

    participants: tuple[str, ...] = ()
    """Without ``sub-``."""
    sessions: tuple[str, ...] = ()
    """Without ``ses-``."""
    models: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.participants or self.sessions or self.models)

    def keeps(self, entities: Mapping[str, str]) -> bool:
        """Tell whether a scan with these entities is wanted."""
        return all(not wanted or entities.get(key) in wanted for key, _, _, wanted in self._parts())

    def check(self, scans: Iterable[Mapping[str, str]], *, where: str) -> None:
        """Refuse a label that no scan has, and a choice that no scan meets.

        Parameters
        ----------
        scans : iterable of mapping
            Entities of each scan.
        where : str
            What the scans lie in, for the messages.

        Raises
        ------
        InputError
            If there is one; the message lists the labels there are.
        """
        known = list(scans)
        for key, prefix, option, wanted in self._parts():
            there = {entities[key] for entities in known if key in entities}
            if absent := [label for label in wanted if label not in there]:
                some = name_some(sorted(there), prefix) or "none"
                raise InputError(f"{where}: no results of {prefix}{absent[0]}; check {option} (there are {some})")
        if not any(map(self.keeps, known)):
            options = ", ".join(option for _, _, option, wanted in self._parts() if wanted)
            raise InputError(f"{where}: no scan meets all of {options}; check them")

    def describe(self) -> dict[str, list[str]]:
        """Say it in the data dictionaries: option → labels."""
        return {option.removeprefix("--"): list(wanted) for _, _, option, wanted in self._parts() if wanted}

    def _parts(self) -> Sequence[tuple[str, str, str, tuple[str, ...]]]:
        """List entity, prefix of its labels, option and labels."""
        return (
            ("sub", "sub-", "--participant-label", self.participants),
            ("ses", "ses-", "--session-label", self.sessions),
            ("seg", "", "--model", self.models),
        )
