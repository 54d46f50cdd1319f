"""Soak test: disturb runs of the app at random moments, then compare the results with those of undisturbed runs.

    python benchmarks/soak.py [--runs N] [--minutes M] [--seed S] [--folder DIR]

Small maps of the phantom are labelled with its true labels, so that a run takes seconds. Each round disturbs one to
three runs, each by one of

- SIGKILL to the run, or to all of its processes,
- a limit on the size of files, on which writing fails as on a full disk,
- a map that is replaced while the run reads it,
- a second run on the same output at the same time.

Then one run is left alone. It must succeed; afterwards every file of each scan equals that of an undisturbed run on the
same map, and no temporary file, run folder or process is left. Prints a line per round with its seed: the first round
of `--seed S --runs 1` repeats the round with seed S. The exit code is 1 if anything differed. For Linux. Two busy cores
do a disturbed run in 8 s, the runs in between included: 200 take less than half an hour.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np

from bids_dgmseg.arguments import positive_int
from bids_dgmseg.image.grids import Box, world_grid
from bids_dgmseg.phantom.head import PHANTOM

_ROOT = Path(__file__).parents[1]
_HEAD = Box((-75, -110, -80), (75, 74, 80))
_SPACING_MM = (3.5, 3.5, 3.5)
_SCANS = ("sub-01", "sub-02")
_FACTORS = (1.0, 1.2)
"""Each scan has a map per factor of its values, of which one is in the dataset at a time."""
_DISTURBANCES = ("kill", "full disk", "changed map", "second run")
_FILE_SIZES = (300, 3_000, 30_000, 300_000)
"""Bytes that a file can have on a full disk."""
_PATIENCE_S = 60.0
_MARK = "BIDS_DGMSEG_SOAK"
_CHILD = """
import sys
import tests.worker_models
del sys.modules["bids_dgmseg.report.mosaic"]  # the page needs its other names
from bids_dgmseg.report import mosaic
from tests.pixel import write_pixel
mosaic.draw_mosaic = write_pixel  # as in the other processes
from bids_dgmseg.cli.bids_app import main
from bids_dgmseg.run.environment import WORKER_MODULES
WORKER_MODULES.append("tests.worker_models")
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the rounds and print what they found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=positive_int, default=200, help="disturbed runs at least (default: 200)")
    parser.add_argument("--minutes", type=positive_int, default=60, help="end after this time (default: 60)")
    parser.add_argument("--seed", type=int, help="of the first round (default: random)")
    parser.add_argument("--folder", type=Path, help="empty folder that is kept (default: a temporary one)")
    args = parser.parse_args(argv)
    seed = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed
    with contextlib.ExitStack() as stack:
        folder = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-")))
        return _soak(folder.resolve(), n_runs=args.runs, end_s=time.monotonic() + 60 * args.minutes, seed=seed)


def _soak(folder: Path, *, n_runs: int, end_s: float, seed: int) -> int:
    study = _Study.create(folder)
    seconds = study.make_expected()
    print(f"undisturbed run: {seconds:.1f} s; first seed {seed}", flush=True)
    lines: list[str] = []
    counts: Counter[str] = Counter()
    start_s = time.monotonic()
    while counts.total() < n_runs and time.monotonic() < end_s:
        rng = random.Random(seed)
        kinds = [rng.choice(_DISTURBANCES) for _ in range(rng.randint(1, 3))]
        codes = [study.disturb(kind, rng, within_s=seconds) for kind in kinds]
        problems = study.recover()
        counts.update(kinds)
        told = ", ".join(f"{kind} ({'/'.join(map(str, code))})" for kind, code in zip(kinds, codes, strict=True))
        print(f"{seed}: {told}: {'; '.join(problems) or 'as undisturbed'}", flush=True)
        lines += [f"seed {seed}: {problem}" for problem in problems]
        seed += 1
    minutes = (time.monotonic() - start_s) / 60
    told = ", ".join(f"{n} x {kind}" for kind, n in counts.most_common())
    print(f"{counts.total()} disturbed runs in {minutes:.0f} min: {told}")
    print("\n".join(lines) or "every result equals that of an undisturbed run, and nothing is left over")
    return 1 if lines else 0


@dataclass
class _Study:
    """A dataset, its output, and what undisturbed runs make of each map."""

    folder: Path
    factors: dict[str, float]
    """Scan → factor of the map that is in the dataset."""
    maps: dict[tuple[str, float], bytes]
    expected: dict[tuple[str, float], dict[str, bytes]] = field(default_factory=dict)
    """Scan and factor → path and content of each file."""

    @classmethod
    def create(cls, folder: Path) -> _Study:
        for name in ("ds", "tmp", "work"):
            (folder / name).mkdir(parents=True)
        (folder / "child.py").write_text(_CHILD, encoding="utf-8")
        (folder / "ds" / "dataset_description.json").write_text('{"Name": "Soak", "BIDSVersion": "1.10.0"}')
        maps = {}
        for number, scan in enumerate(_SCANS):
            chi = PHANTOM.chi(world_grid(_HEAD, _SPACING_MM), seed=number)
            for factor in _FACTORS:
                path = folder / "tmp" / "map.nii.gz"
                nib.Nifti1Image(chi.array * np.float32(factor), chi.affine).to_filename(path)
                maps[scan, factor] = path.read_bytes()
                path.unlink()
        study = cls(folder, {}, maps)
        for scan in _SCANS:
            anat = folder / "ds" / scan / "anat"
            anat.mkdir(parents=True)
            (anat / f"{scan}_Chimap.json").write_text('{"Units": "ppm"}')
            study.set_map(scan, _FACTORS[0])
        return study

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def set_map(self, scan: str, factor: float) -> None:
        """Replace the map of a scan, as a program that writes carefully does."""
        path = self.folder / "ds" / scan / "anat" / f"{scan}_Chimap.nii.gz"
        (temporary := self.folder / "new.nii.gz").write_bytes(self.maps[scan, factor])
        temporary.replace(path)
        self.factors[scan] = factor

    def start(self, *options: str, file_bytes: int | None = None) -> subprocess.Popen[bytes]:
        """Start a run as a session of its own, so that all of its processes can be killed."""
        arguments = [str(self.folder / "ds"), str(self.out), "participant", "-w", str(self.folder / "work")]
        arguments += ["--model", "oracle", "--no-viewer", "--skip-bids-validation", "--omp-nthreads", "1", *options]
        search_path = os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])
        environment = {
            **os.environ,
            "PYTHONPATH": search_path,
            "TMPDIR": str(self.folder / "tmp"),
            _MARK: str(self.out),
        }

        def limit() -> None:
            if file_bytes:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing fails instead
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))

        with (self.folder / "log.txt").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, str(self.folder / "child.py"), *arguments],
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=limit,
            )

    def disturb(self, kind: str, rng: random.Random, *, within_s: float) -> list[int]:
        """Start a run and disturb it; return the exit codes."""
        moment_s = rng.uniform(0, within_s)
        options = ["--nprocs", str(rng.choice((1, 1, 2))), *rng.choice(([], [], ["--force"]))]
        if kind == "full disk":
            return [self.start(*options, file_bytes=rng.choice(_FILE_SIZES)).wait()]
        processes = [self.start(*options)]
        with contextlib.suppress(subprocess.TimeoutExpired):
            processes[0].wait(moment_s)
        if kind == "kill":
            _kill(processes[0], rng)
        elif kind == "changed map":
            scan = rng.choice(_SCANS)
            self.set_map(scan, next(factor for factor in _FACTORS if factor != self.factors[scan]))
        else:
            processes.append(self.start(*options))
            if rng.random() < 0.5:
                time.sleep(rng.uniform(0, within_s))
                _kill(rng.choice(processes), rng)
        return [process.wait() for process in processes]

    def make_expected(self) -> float:
        """Run undisturbed on each map, record the files, and return the longest time of a run in seconds."""
        seconds = []
        for factor in _FACTORS:
            for scan in _SCANS:
                self.set_map(scan, factor)
            start = time.monotonic()
            if code := self.start("--nprocs", "1").wait():
                raise SystemExit(f"the undisturbed run failed ({code}); see {self.folder / 'log.txt'}")
            seconds.append(time.monotonic() - start)
            self.expected |= {(scan, factor): self.files_of(scan) for scan in _SCANS}
            shutil.rmtree(self.out)
        for scan in _SCANS:
            self.set_map(scan, _FACTORS[0])
        return max(seconds)

    def files_of(self, scan: str) -> dict[str, bytes]:
        """Return the content of each result of a scan."""
        paths = [self.out / f"{scan}.html", *(self.out / scan).rglob("*"), *(self.out / "figures").glob(f"{scan}_*")]
        return {str(path.relative_to(self.out)): path.read_bytes() for path in paths if path.is_file()}

    def recover(self) -> list[str]:
        """Run undisturbed and return what is not as it should be."""
        problems = []
        if code := self.start("--nprocs", "1").wait():
            log = (self.folder / "log.txt").read_text(encoding="utf-8", errors="replace")
            problems.append(f"exit code {code} ({log.strip().splitlines()[-1]})")
        for scan, factor in self.factors.items():
            files, expected = self.files_of(scan), self.expected[scan, factor]
            names = sorted(name for name in files.keys() | expected.keys() if files.get(name) != expected.get(name))
            problems += [f"{len(names)} files differ or are extra, such as {names[0]}"] if names else []
        problems += [f"left over: {path}" for path in self._find_leftovers()]
        problems += [f"still running: {process}" for process in self._find_processes()]
        return problems

    def _find_leftovers(self) -> Iterator[str]:
        for root in (self.out, self.folder / "work", self.folder / "tmp"):
            for path in root.rglob("*"):
                hidden = path.name.startswith(".") and path.name != ".bidsignore"
                is_socket = path.name.startswith("pymp-")  # of multiprocessing, which SIGKILL leaves in TMPDIR
                if hidden or (root != self.out and path.parent == root and not is_socket):
                    yield str(path.relative_to(self.folder))

    def _find_processes(self) -> list[str]:
        """List the processes that runs have left; those that are loading libraries end when they have."""
        mark = f"{_MARK}={self.out}".encode()
        end_s = time.monotonic() + _PATIENCE_S
        while True:
            alive = []
            for path in Path("/proc").glob("[0-9]*/environ"):
                with contextlib.suppress(OSError):
                    if mark in path.read_bytes():
                        command = path.with_name("cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                        alive.append(f"{path.parent.name} ({command[:200]})")
            if not alive or time.monotonic() > end_s:
                return alive
            time.sleep(0.1)


def _kill(process: subprocess.Popen[bytes], rng: random.Random) -> None:
    """Kill a run, with or without its other processes."""
    with contextlib.suppress(ProcessLookupError):
        rng.choice((os.kill, os.killpg))(process.pid, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
