"""The error that is the user's to mend, and how commands end."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterable


class InputError(Exception):
    """Something in the user's files or options is wrong: one line, ``where: what is wrong; what to do``."""


def end_well(program: str, work: Callable[[], int], *, after_interrupt: str = "") -> int:
    """Run a command; whatever the user can mend becomes one line on standard error.

    Parameters
    ----------
    program : str
        What the line begins with.
    work : callable
        Returns the exit code.
    after_interrupt : str
        What to tell of an interrupted command.

    Returns
    -------
    int
        That of `work`; 2 where files or options do not allow it, 130 where it was interrupted.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a locale that lacks a letter must not end a run
            stream.reconfigure(errors="backslashreplace")
    try:
        return work()
    except InputError as error:
        line = " ".join(str(error).split())
    except BrokenPipeError:
        raise  # a reader such as `head` has left: nobody is there to be told
    except OSError as error:
        if error.filename is None:
            raise  # not about a file: an error of the program, whose traceback is worth having
        line = f"{error.filename}: {error.strerror}; check the path, its permissions and the room on its disk"
    except KeyboardInterrupt:
        sys.stderr.write(f"{program}: interrupted{after_interrupt}\n")
        return 130
    sys.stderr.write(f"{program}: error: {line}\n")
    return 2


def list_some(names: Iterable[str], *, most: int = 5) -> str:
    """Name a few of many.

    >>> list_some(["a", "b", "c"], most=2)
    'a, b, … (3 in all)'
    """
    known = sorted(names)
    return ", ".join(known) if len(known) <= most else f"{', '.join(known[:most])}, … ({len(known)} in all)"
