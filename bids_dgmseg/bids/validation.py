"""What the BIDS validator says of the input; it warns and never stops a run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

from bids_dgmseg.bids.description import DATASET_DESCRIPTION
from bids_dgmseg.config import Settings

TIME_LIMIT_S = 60


def summarize_validation(settings: Settings) -> str | None:
    """Run ``bids-validator-deno`` on the input and put its errors in one line.

    Returns
    -------
    str or None
        None if there are no errors, or the validator is not installed, fails or takes longer than a minute.
    """
    validator = shutil.which("bids-validator-deno", path=search_path())
    if validator is None or not (settings.bids_dir / DATASET_DESCRIPTION).is_file():
        return None
    # By itself its cache goes to HOME, which may be read-only.
    environment = {**os.environ, "DENO_DIR": str(settings.work_dir / "deno"), "DENO_NO_UPDATE_CHECK": "1"}
    command = [validator, str(settings.bids_dir), "--ignoreWarnings", "--ignoreNiftiHeaders", "--format", "json"]
    try:
        run = subprocess.run(
            command, env=environment, capture_output=True, timeout=TIME_LIMIT_S, check=False, stdin=subprocess.DEVNULL
        )
        issues = json.loads(run.stdout)["issues"]["issues"]
        codes = Counter(str(issue["code"]) for issue in issues if issue["severity"] == "error")
    except (OSError, subprocess.TimeoutExpired, ValueError, KeyError, TypeError):
        return None
    if not codes:
        return None
    said = ", ".join(f"{code} ({number})" for code, number in codes.most_common(4))
    return (
        f"{settings.bids_dir.name}: the BIDS validator reports {said}; the run goes on "
        "(--skip-bids-validation leaves the check out)"
    )


def search_path() -> str:
    """List where the validator is looked for: beside Python, then on the PATH."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
