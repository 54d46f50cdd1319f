"""User-facing errors and exit codes."""

from __future__ import annotations

import errno
import io
import re
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn

OK, FAILED, INVALID, HUNG_UP, INTERRUPTED = 0, 1, 2, 129, 130
"""Exit codes: all done; some scans failed; options or files do not allow the command; terminal closed; interrupted."""

FULL_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Errors of writes on a full disk, beyond the quota or the largest size of a file."""

DISK_ADVICE = "check the path, its permissions and the free disk space"


_OPTIONS = {
    "accept_implausible": "--accept-implausible-maps",
    "filter_file": "--bids-filter-file",
    "output_dir": "OUTPUT_DIR",
    "reference_mask": "--reference-masks",
    "start": "--from",
}
"""Parameters whose option or argument on the command line has another name."""


class InputError(Exception):
    """A problem in the user's files or options, in one printable line: ``where: what is wrong; what to do``.

    Messages name parameters of Python in backquotes, which `as_options` converts for the command line.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(" ".join(message.split())))


def printable(text: str) -> str:
    r"""Escape control and formatting characters, which would act on a terminal or reorder what it shows.

    Names of files and values in sidecars and tables can contain them.

    >>> print(printable("a\x1b[2K\u202eb\n"))
    a\x1b[2K\u202eb\n
    """
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def as_options(text: str) -> str:
    """Replace parameters of Python in backquotes by options of the command line.

    >>> as_options("`reference_masks` has no effect; omit it or use `model` nnunet2step")
    '--reference-masks has no effect; omit it or use --model nnunet2step'
    """
    return re.sub("`([a-z][a-z0-9_]*)`", lambda name: _OPTIONS.get(name[1], f"--{name[1].replace('_', '-')}"), text)


def for_terminal(text: str) -> str:
    """Return a message as the command line prints it: with its options, and `printable`."""
    return printable(as_options(text))


class HangUp(KeyboardInterrupt):
    """The terminal was closed (SIGHUP)."""


_interrupts: list[type[KeyboardInterrupt]] = []
"""Those that signals have raised since `forget_interrupts`."""


def forget_interrupts() -> None:
    """Forget interrupts of an earlier command."""
    _interrupts.clear()


def interrupt(kind: type[KeyboardInterrupt] = KeyboardInterrupt) -> NoReturn:
    """Raise the exception of a signal, and remember it for `raise_if_interrupted`."""
    _interrupts.append(kind)
    raise kind


def raise_if_interrupted() -> None:
    """Raise the exception of an earlier signal again.

    An exception that a signal handler raises can be lost: within ``__del__``, a callback of C code, some imports or a
    library's bare ``except``. Slurm and Docker send one signal only.
    """
    if _interrupts:
        raise _interrupts[0]


def run_command(program: str, command: Callable[[], int], *, after_interrupt: str = "") -> int:
    """Run a command and print errors that the user can correct as one line on standard error.

    Parameters
    ----------
    program : str
        Name that the line begins with.
    command : callable
        Returns the exit code.
    after_interrupt : str
        Text appended to "interrupted".

    Returns
    -------
    int
        The exit code of `command`, `INVALID` after an `InputError` or an OSError about a file, `FAILED` if the disk is
        full, `HUNG_UP` or `INTERRUPTED`.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a character that the locale lacks must not end a run
            stream.reconfigure(errors="backslashreplace")
    try:
        code = command()
        raise_if_interrupted()
        return code
    except InputError as error:
        code, message = INVALID, str(error)
    except BrokenPipeError:
        raise  # the reader, such as `head`, has ended: nobody would see a message
    except OSError as error:
        if error.filename is None and error.errno not in FULL_ERRORS:
            raise  # not about a file, so a bug: keep the traceback
        where = f"{error.filename}: " if error.filename else ""  # what a library writes names no file
        code, message = FAILED if error.errno in FULL_ERRORS else INVALID, f"{where}{error.strerror}; {DISK_ADVICE}"
    except KeyboardInterrupt as signalled:
        sys.stderr.write(f"{program}: interrupted{after_interrupt}\n")
        return HUNG_UP if isinstance(signalled, HangUp) else INTERRUPTED
    sys.stderr.write(f"{program}: error: {for_terminal(message)}\n")
    return code


def list_some(names: Iterable[str], *, most: int = 5) -> str:
    """Return names as a comma-separated list, shortened if there are many.

    >>> list_some(["a", "b", "c"], most=2)
    'a, b, … (3 in all)'
    """
    listed = sorted(names)
    return ", ".join(listed) if len(listed) <= most else f"{', '.join(listed[:most])}, … ({len(listed)} in all)"
