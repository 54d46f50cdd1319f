"""Names of sites and groups under a plot: short, each of its own, in the order of their numbers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile

_UPRIGHT = 60
"""Characters that fit side by side below a panel."""

_TURNED = 22

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
"""Characters that no font draws."""

_BREAK = re.compile(r"[\s_/.,:;-]")


@dataclass(frozen=True)
class LevelNames:
    """What stands below the violins of a panel."""

    shown: tuple[str, ...]
    turned: bool
    """Whether they are too long to stand side by side."""
    key: str
    """What they stand for, such as ``1: Bern, Prisma; 2: Bern, Skyra``; empty where they are the names themselves."""


def name_levels(levels: Sequence[str]) -> LevelNames:
    """Shorten names so that no two are alike: by what all begin and end with, then in their middle, else to numbers.

    Control characters are shown by their codes.

    Parameters
    ----------
    levels : sequence of str
        Different names.

    Examples
    --------
    >>> name_levels(["Site A", "Site B"]).shown
    ('Site A', 'Site B')
    >>> name_levels([f"University Hospital {place}" for place in ("Bern", "Graz", "Vaud")]).shown
    ('Bern', 'Graz', 'Vaud')
    """
    levels = [_CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", level) for level in levels]
    upright = max(4, _UPRIGHT // max(len(levels), 1))
    if max(map(len, levels), default=0) <= upright:
        return LevelNames(tuple(levels), turned=False, key="")
    start = _common_start(levels)
    rest = [level[start:] for level in levels]
    end = _common_start([name[::-1] for name in rest])
    bare = [name[: len(name) - end] for name in rest]
    turned = max(map(len, bare)) > upright
    shown = [_shorten(name, _TURNED) for name in bare] if turned else bare
    if len(set(shown)) < len(shown):
        shown, turned = [str(number) for number in range(1, len(levels) + 1)], False
    if shown == bare:
        common = [f"“{part.strip()}”" for part in (levels[0][:start], rest[0][len(bare[0]) :]) if part.strip()]
        return LevelNames(tuple(shown), turned, f"Names without {' and '.join(common)}" if common else "")
    pairs = [f"{name}: {level}" for name, level in zip(shown, levels, strict=True) if name != level]
    return LevelNames(tuple(shown), turned, "; ".join(pairs))


def in_order(levels: Iterable[str]) -> list[str]:
    """Sort names by their text and by the numbers in it.

    >>> in_order(["Site 10", "Site 9", "2", "10"])
    ['2', '10', 'Site 9', 'Site 10']
    """

    def key(level: str) -> list[tuple[bool, int, str]]:
        parts = re.findall(r"\d+|\D+", level)
        return [(not part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]

    return sorted(levels, key=key)


def _common_start(names: Sequence[str]) -> int:
    """Count the characters all names begin with, up to the end of a word; no name is left empty."""
    alike = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    common = "".join(letters[0] for letters in alike)
    words = [found.end() for found in _BREAK.finditer(common) if found.end() < min(map(len, names))]
    return words[-1] if words and len(names) > 1 else 0


def _shorten(name: str, longest: int) -> str:
    """Take out the middle.

    >>> _shorten("abcdefgh", 5)
    'ab…gh'
    """
    if len(name) <= longest:
        return name
    end = (longest - 1) // 2
    return f"{name[: longest - 1 - end]}…{name[-end:]}"
