"""Results of the participant level: damaged tables are left out and named, scanners and quality are read."""

from pathlib import Path

import pytest

from bids_dgmseg.errors import InputError
from bids_dgmseg.io.files import sha256_of, write_json
from bids_dgmseg.study.cohort import load_cohort
from bids_dgmseg.study.results import ResultsFolder, ResultsSelection, name_scanner, read_stats

HEADER = "index\tabbreviation\tvolume_mm3\tmean_ppm\n"

RERUN = "run the participant level again with `force`"


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def break_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("gone")


def stop_before_record(path: Path) -> None:
    path.with_name("sub-02_seg-dgm16_dseg.nii.gz").touch()
    path.with_name("sub-02_seg-dgm16_qc.json").unlink()


def write(text: str):
    return lambda path: path.write_text(text)


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (write(""), f"cut short; {RERUN}"),
        (write("index\tname\n"), f"cut short; {RERUN}"),
        (write(f"{HEADER}1\tDN_L\t7"), f"cut short; {RERUN}"),
        (write(f"{HEADER}1\tDN_L\t7\t0.1"), f"cut short; {RERUN}"),
        (write(f"{HEADER}1\tDN_L\t7\t0.1\n1\tDN_L\t7\t0.1\n"), f"damaged ('DN_L' appears twice); {RERUN}"),
        (write(f"{HEADER}1\tDN_L\t7\tabc\n"), f"damaged (mean_ppm of DN_L is 'abc'); {RERUN}"),
        (write(f"{HEADER}1\tDN_L\t7\t0,12\n"), f"damaged (mean_ppm of DN_L is '0,12'); {RERUN}"),
        (write(f"{HEADER}1\tDN_L\t-inf\t0.1\n"), f"damaged (volume_mm3 of DN_L is '-inf'); {RERUN}"),
        (write("version https://git-lfs.github.com/spec/v1\n"), "content not fetched (the file is only a pointer)"),
        (break_link, "content not fetched (broken symlink)"),
        (make_folder, "cannot be read (Is a directory)"),
        (stop_before_record, "unfinished (_qc.json is missing)"),
        (lambda path: path.rename(path.with_name("sub-02_stats.tsv")), "no model (seg-) in the name; rename the file"),
    ],
)
def test_table_that_cannot_be_used_is_left_out(output, add_scan, damage, why):
    add_scan("sub-01_seg-dgm16")
    damage(add_scan("sub-02_seg-dgm16"))
    cohort = load_cohort([ResultsFolder(output, "out", None)])
    assert cohort.keys["participant_id"].tolist() == ["sub-01"]
    assert cohort.n_damaged == 1
    (warning,) = [line for line in cohort.warnings if "not checked for changes" not in line]
    assert warning.startswith("sub-02_")
    assert why in warning


def test_no_usable_results_is_an_error(output, add_scan):
    with pytest.raises(InputError, match=r"^out: no \*_stats.tsv found; run the participant level first"):
        load_cohort([ResultsFolder(output, "out", None)])
    add_scan("sub-01_seg-dgm16", text="")
    with pytest.raises(InputError, match=r"^out: no table can be used \(sub-01_seg-dgm16_stats.tsv: cut short; "):
        load_cohort([ResultsFolder(output, "out", None)])


def test_tables_with_different_columns_are_joined_in_order(tmp_path):
    narrow, wide = "abbreviation\tmean_ppm\n", "abbreviation\tmean_ppm\tnote\n"
    texts = {
        "a": f"{narrow}DN_L\t0.10\nDN_R\tn/a\n",
        "b": f"{wide}DN_L\t0.2\tnew\n",
        "damaged": f"{narrow}DN_L\t0.3x\n",
        "d": f"{narrow}DN_L\t0.4\n",
    }
    paths = [tmp_path / f"{name}_stats.tsv" for name in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        path.write_text(text)
    stats, damaged = read_stats(paths, required=["mean_ppm"])
    assert stats["file"].tolist() == [0, 0, 1, 2]
    assert stats["mean_ppm"].tolist() == ["0.10", "n/a", "0.2", "0.4"]  # as it is written
    assert stats["note"].fillna("").tolist() == ["", "", "new", ""]
    assert [path.name for path in damaged] == ["damaged_stats.tsv"]


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"InstitutionName": "Z\u00fcrich\n\tHospital ", "Manufacturer": "GE\t"}, "Z\u00fcrich Hospital GE"),
        ({"Manufacturer": ["a"], "ManufacturersModelName": "Prisma"}, "Prisma"),
        ({"Manufacturer": "Siemens", "DeviceSerialNumber": 45153}, "Siemens 45153"),
        ({"MagneticFieldStrength": "2.89"}, None),
        ({"InstitutionName": "Bern", "MagneticFieldStrength": "2.89"}, "Bern 3T"),
        ({"Manufacturer": "Siemens", "MagneticFieldStrength": [3]}, "Siemens"),
    ],
)
def test_scanner_name_uses_text_and_numbers_only(fields, name):
    assert name_scanner(fields) == name


def load_recorded(output, add_scan, scans, selection=None):
    """Load scans with records: image, size of the voxels, version and reference region of each."""
    for label, (image, size_mm, version, reference) in scans.items():
        path = add_scan(f"sub-{label}_seg-dgm16").with_name(f"sub-{label}_seg-dgm16_qc.json")
        inputs = {"map": {"file": "gone.nii.gz", "metadata": "", "sha256": image}}
        options = {"reference": reference, "masks": label == "01", **({"age": 7} if label == "02" else {})}
        made_from = {"inputs": inputs, "options": options, "weights": {}}
        record = {"input": {"voxel_size_mm": size_mm}, "made_from": {**made_from, "version": version}, "outputs": {}}
        write_json({**record, "checksum": sha256_of(record)}, path)
    return load_cohort([ResultsFolder(output, "out", None)], selection=selection).warnings


def test_copies_and_scans_that_were_made_otherwise_are_named(output, add_scan):
    fine = [1, 1, 2]
    scans = {
        "01": ("a", fine, "1", "none"),
        "02": ("b", [2, 1, 1], "1", "none"),
        "03": ("a", [1.5, 1, 1.5], "2", "none"),
        "04": ("c", fine, "1", "csf"),
    }
    others = "versions or settings: version 1 (3 scan(s)), 2 (1: sub-03); `reference` none (3 scan(s)), csf (1: sub-04)"
    assert load_recorded(output, add_scan, scans) == (
        "not checked for changes: 4 scan(s) whose inputs were not found",
        "group_stats.tsv: the same image under several names: sub-01 = sub-03; remove the wrong ones",
        f"group_stats.tsv: results were made with different {others}; run the participant level again for all",
    )
    alike = ResultsSelection(participants=("01", "02"))
    assert load_recorded(output, add_scan, scans | {"02": ("b", [1, 1, 4], "1", "none")}, alike)[1:] == (
        "group_stats.tsv: voxel sizes differ by more than a factor of 1.5: 1 x 1 x 2 mm (1), 1 x 1 x 4 mm (1); partial "
        "volume changes volumes and susceptibilities; compare within a protocol",
    )


def test_record_of_another_program_is_not_read(output, add_scan):
    path = add_scan("sub-01_seg-dgm16")
    for content in ('{"made_from": 5, "warnings": 5, "outputs": [1]}', "[1]"):
        path.with_name("sub-01_seg-dgm16_qc.json").write_text(content)
        assert load_cohort([ResultsFolder(output, "out", None)]).scans["sub"].tolist() == ["01"]
