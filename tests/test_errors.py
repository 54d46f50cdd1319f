from __future__ import annotations

import argparse
import ast
import errno
import re
from itertools import chain
from pathlib import Path

import pytest

import bids_dgmseg
from bids_dgmseg.cli import add_options, bids_app
from bids_dgmseg.cli.main import VERBS
from bids_dgmseg.errors import HangUp, InputError, run_command

PACKAGE = Path(bids_dgmseg.__file__).parent


def fail_with(error: BaseException):
    def work() -> int:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (InputError("ds: wrong;\n  fix it"), 2, "prog: error: ds: wrong; fix it\n"),
        (
            PermissionError(errno.EACCES, "Permission denied", "/data/x"),
            2,
            "prog: error: /data/x: Permission denied; check the path, its permissions and the free disk space\n",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            1,
            "prog: error: No space left on device; check the path, its permissions and the free disk space\n",
        ),
        (InputError("a\x1b[2K\0\u202eb: wrong"), 2, "prog: error: a\\x1b[2K\\x00\\u202eb: wrong\n"),
        (
            FileNotFoundError(errno.ENOENT, "No such file", "/x\x1b[2J"),
            2,
            "prog: error: /x\\x1b[2J: No such file; check the path, its permissions and the free disk space\n",
        ),
        (
            InputError("`output_dir`/x: wrong; use `output_space` or `start`"),
            2,
            "prog: error: OUTPUT_DIR/x: wrong; use --output-space or --from\n",
        ),
        (HangUp(), 129, "prog: interrupted; go on later\n"),
        (KeyboardInterrupt(), 130, "prog: interrupted; go on later\n"),
    ],
)
def test_user_errors_are_one_line_and_an_exit_code(capsys, error, code, said):
    assert run_command("prog", fail_with(error), after_interrupt="; go on later") == code
    assert capsys.readouterr().err == said


def all_options() -> set[str]:
    parser = argparse.ArgumentParser(conflict_handler="resolve")
    verbs = chain.from_iterable(verb.options for verb in VERBS.values())
    add_options(parser, (item for item in verbs if isinstance(item, list) or item.names[0].startswith("-")))
    return {word for action in (*parser._actions, *bids_app.build_parser()._actions) for word in action.option_strings}


def test_library_names_parameters_not_options():
    options, named = all_options(), set()
    assert {"--choose", "--reference", "--work-dir", "--distill"} <= options
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                if options & set(re.findall(r"--[a-z]+(?:-[a-z]+)*", node.value)):
                    named.add(path.relative_to(PACKAGE).as_posix())
    allowed = {"errors.py", "models/model_folder.py"}  # converts parameters; prints a command of dgmseg train
    allowed |= {"config.py"}  # declares the options
    assert {name for name in named if not name.startswith("cli/")} == allowed


@pytest.mark.parametrize("error", [OSError("no file"), BrokenPipeError(errno.EPIPE, "Broken pipe"), ValueError("bug")])
def test_bugs_keep_their_traceback(error):
    with pytest.raises(type(error), match=str(error).replace("[", r"\[")):
        run_command("prog", fail_with(error))
