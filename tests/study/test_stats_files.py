"""Reading many ``_stats.tsv`` at once."""

import pytest

from bids_dgmseg.study.stats_files import read_stats


@pytest.mark.parametrize("files_at_once", [1, 2, 1000])
def test_parts_are_joined_in_the_order_of_files(tmp_path, monkeypatch, files_at_once):
    monkeypatch.setattr("bids_dgmseg.study.stats_files._FILES_AT_ONCE", files_at_once)
    wide, narrow = "abbreviation\tmean_ppm\tnote", "abbreviation\tmean_ppm"
    texts = {
        "a": f"{narrow}\nDN_L\t0.10\nDN_R\tn/a\n",
        "b": f"{wide}\nDN_L\t0.2\tnew\n",
        "damaged": f"{narrow}\nDN_L\t0.3x\n",
        "d": f"{narrow}\nDN_L\t0.4\n",
        "short": f"{wide}\nDN_L\t0.5\n",
        "f": f"{wide}\nDN_L\t0.6\tlast\n",
    }
    paths = [tmp_path / f"{name}_stats.tsv" for name in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        path.write_text(text)
    stats, damaged = read_stats(paths, numbers=["mean_ppm"], required=["mean_ppm"])
    assert stats["file"].tolist() == [0, 0, 1, 2, 3]
    assert stats["mean_ppm"].tolist() == ["0.10", "n/a", "0.2", "0.4", "0.6"]  # as it is written
    assert stats["note"].fillna("").tolist() == ["", "", "new", "", "last"]
    problems = {path.name: error.problem for path, error in damaged.items()}
    assert problems == {
        "damaged_stats.tsv": "damaged (mean_ppm of DN_L is '0.3x')",
        "short_stats.tsv": "cut short",
    }


@pytest.mark.parametrize("value", ["inf", "-Infinity", "1e999", "True", "NaN", "1,5", "null"])
def test_values_that_are_not_finite_numbers_are_damaged(tmp_path, value):
    path = tmp_path / "a_stats.tsv"
    path.write_text(f"abbreviation\tmean_ppm\nDN_L\t{value}\n")
    stats, damaged = read_stats([path], numbers=["mean_ppm"], required=["mean_ppm"])
    assert stats.empty
    assert damaged[path].problem == f"damaged (mean_ppm of DN_L is {value!r})"
