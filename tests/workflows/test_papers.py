"""Tables of the papers: the frame on ready folders of labels, whose scores are known."""

import importlib
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from bids_dgmseg.lab.train.recipe import RECIPES
from tests.conftest import start_dataset, write_map
from tests.lab.train.recipe_trainings import phantom

PAPERS = Path(__file__).parents[2] / "workflows" / "papers"
NUMBERS = {"DN_L": 1, "DN_R": 2, "IN_L": 3, "IN_R": 4}


@pytest.fixture(scope="module")
def tables():
    sys.path[:0] = [str(PAPERS), str(PAPERS.parent)]
    yield importlib.import_module("tables")
    sys.path[:] = [path for path in sys.path if path not in (str(PAPERS), str(PAPERS.parent))]


def write_labels(root, scan, cut=0, *, without=()):
    """Write a block of 4 x 4 x 4 voxels per nucleus, of which `cut` slices are missing on the left."""
    start_dataset(root, DatasetType="derivative")
    array = np.zeros(phantom().shape, np.uint8)
    for name, number in NUMBERS.items():
        if name not in without:
            height = 4 - (cut if name.endswith("_L") else 0)
            array[10 * number - 5 : 10 * number - 1, 20:24, 20 : 20 + height] = number
    folder = root / scan / "anat"
    folder.mkdir(parents=True, exist_ok=True)
    nib.Nifti1Image(array, phantom().affine).to_filename(folder / f"{scan}_seg-x_dseg.nii.gz")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("papers") / "ds"
    start_dataset(root)
    cuts = {"one": [1, 1, 1, 2], "two": [1, 2, 2, 3]}
    for number in range(4):
        scan = f"sub-{number + 1:02d}"
        write_map(root, scan, phantom())
        write_labels(root / "derivatives" / "manual", scan)
        for name, cut in cuts.items():
            write_labels(root.with_name(name), scan, cut[number], without=("IN_L", "IN_R") if name == "two" else ())
    return root


def run(tables, monkeypatch, dataset, out, *options, make=None):
    """Run a small paper on the dataset, and return what is missing."""
    script = out.with_name("paper.py")
    script.with_suffix(".toml").write_text(
        'nuclei = ["DN", "IN"]\nmeasures = ["dice", "volume_mm3"]\n[quick]\n'
        '[tables."Table 1"]\nrows = { one = "First", two = "Second", suit = "SUIT" }\ntest = "t"\nagainst = "one"\n'
    )
    labels = [f"{name}={dataset.with_name(name)}" for name in ("one", "two")]
    monkeypatch.setattr(sys, "argv", [str(script), str(dataset), str(out), "--labels-of", *labels, *options])
    code = tables.run("", make or (lambda study: tables.write_tables(study, study.compare())))
    return code, (out / "missing.txt").read_text() if code == 0 else ""


def test_tables_have_the_means_of_both_sides_and_the_papers_test(tables, dataset, tmp_path, monkeypatch):
    code, missing = run(tables, monkeypatch, dataset, tmp_path / "out")
    assert code == 0
    assert missing == "Table 1: no row SUIT (its labels: --labels-of suit=FOLDER)\n"
    table: Any = pd.read_csv(tmp_path / "out" / "table_1.tsv", sep="\t").set_index(["method", "nucleus", "measure"])
    # A side that lacks c of 4 slices has Dice 2 (4 - c) / (8 - c); the other side has 1.
    one, two = (np.array([(1 + 2 * (4 - c) / (8 - c)) / 2 for c in cuts]) for cuts in ([1, 1, 1, 2], [1, 2, 2, 3]))
    for name, values in (("First", one), ("Second", two)):
        row = table.loc[(name, "DN", "dice")]
        assert row[["n", "mean", "sd"]].tolist() == pytest.approx([4, values.mean(), values.std(ddof=1)], abs=1e-5)
    assert table.loc[("Second", "DN", "dice"), "p"] == pytest.approx(stats.ttest_rel(one, two).pvalue, rel=1e-4)
    assert table.loc[("Second", "IN", "dice"), "mean"] == 0
    voxels = np.array([(64 + 16 * (4 - c)) / 2 for c in (1, 1, 1, 2)])
    voxel_mm3 = np.prod(nib.affines.voxel_sizes(phantom().affine))
    assert table.loc[("First", "IN", "volume_mm3"), "mean"] == pytest.approx(voxels.mean() * voxel_mm3, rel=1e-5)
    page = (tmp_path / "out" / "index.html").read_text()
    assert f"{one.mean():.3f} ± {one.std(ddof=1):.3f}" in page
    assert f"{64 * voxel_mm3:.0f} ± 0" in page
    assert (tmp_path / "out" / "table_1.png").stat().st_size > 10_000


def test_volumes_are_tested_against_the_reference_and_families_corrected(tables):
    rng = np.random.default_rng(1)
    rows = [
        {"method": method, "nucleus": nucleus, "scan": scan, "measure": measure, "value": rng.normal(shift)}
        for method, shift in (("a", 0), ("b", 1), (tables.TRUTH, 0.5))
        for nucleus in ("DN", "IN")
        for scan in range(9)
        for measure in ("dice", "volume_mm3")
        if method != tables.TRUTH or measure == "volume_mm3"
    ]
    values = pd.DataFrame(rows)

    def column(method, measure):
        return values.query("method == @method and measure == @measure and nucleus == 'DN'")["value"].to_numpy()

    table = tables.summarize(values, ["a", "b"], test="wilcoxon", against="a").set_index(
        ["method", "nucleus", "measure"]
    )
    expected = 2 * stats.wilcoxon(column("a", "dice"), column("b", "dice")).pvalue
    assert table.loc[("b", "DN", "dice"), "p"] == pytest.approx(min(expected, 1))
    volumes = [column(name, "volume_mm3") for name in ("a", "b", tables.TRUTH)]
    tukey = stats.tukey_hsd(*volumes).pvalue
    table = tables.summarize(values, ["a", "b"], test="previous", against="").set_index(
        ["method", "nucleus", "measure"]
    )
    assert table.loc[[("a", "DN", "volume_mm3"), ("b", "DN", "volume_mm3")], "p"].tolist() == pytest.approx(
        tukey[:2, 2]
    )
    assert np.isnan(table.loc[("a", "DN", "dice"), "p"])


def test_what_cannot_be_made_is_named(tables, dataset, tmp_path, monkeypatch, capsys):
    def make(study):
        with study.attempt("Fig. 9"):
            study.train("broken", "dcnnet", options=["--folds", 9])

    code, missing = run(tables, monkeypatch, dataset, tmp_path / "out", make=make)
    assert (code, missing) == (0, "Fig. 9: training failed, for the reason above; run the same command again\n")
    assert "only 4 labelled participants" in capsys.readouterr().err
    assert run(tables, monkeypatch, dataset, tmp_path / "two", "--labels-of", "suit=nowhere")[0] == 2
    assert "--labels-of suit=nowhere: no such folder" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(PAPERS.glob("*.toml")), ids=lambda path: path.stem)
def test_papers_name_recipes_and_rows_that_exist(path, tables):
    paper = tables.tomllib.loads(path.read_text(encoding="utf-8"))
    recipes = {name for names in paper.get("trainings", {}).values() for name in names}
    assert recipes <= {file.stem for file in RECIPES.glob("*.toml")}
    text = path.with_suffix(".py").read_text(encoding="utf-8")
    rows = {row for table in paper["tables"].values() for row in table["rows"]} - set(paper.get("trainings", {}))
    unknown = {row for row in rows if row.rpartition("-")[2] not in text}
    assert unknown <= {"deeplab-9", "cenet-9"}  # labels of other programs
    assert all(measure in tables.MEASURES for measure in paper["measures"])
