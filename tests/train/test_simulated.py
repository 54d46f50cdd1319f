from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bids_dgmseg.errors import InputError
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.models.model_folder import read_model_folder, write_model_toml
from bids_dgmseg.models.registry import get_model
from bids_dgmseg.models.weights import load_weights, save_weights, segmenter_network
from bids_dgmseg.segmentation.inference import batch_to_device, mixed_precision
from bids_dgmseg.segmentation.predict import network_grid, predict
from bids_dgmseg.simulate.dataset import scanner_grid
from bids_dgmseg.simulate.sample import View, draw_sample, nuclei_labels, phantom_head
from bids_dgmseg.train import calibration, sampling, simulated
from bids_dgmseg.train.calibration import calibrate
from bids_dgmseg.train.curve import Curve
from bids_dgmseg.train.dice_loss import dice_and_cross_entropy, dice_and_focal
from bids_dgmseg.train.simulated import Slice, among_ordinary, simulated_maps, train_on_simulations
from bids_dgmseg.train.status_line import unseen

DEFAULT = get_model("default")
SMALL = replace(
    DEFAULT, arch={"features": [4, 8]}, weights=None, input=replace(DEFAULT.input, spacing_mm=(4.0, 4.0, 4.0))
)
"""For maps of 4 mm."""


@pytest.fixture(autouse=True)
def small_maps(monkeypatch):
    """Maps of 24³ voxels of 4 mm."""
    monkeypatch.setattr(simulated, "SEGMENTER_VIEW", View((24, 24, 24), 4.0, (0.0, -20.0, -7.0)))


@pytest.fixture
def drawn(monkeypatch):
    """The views of the maps that are drawn, which show nothing."""
    views = []

    def draw(heads, view, seed):
        views.append(view)
        return torch.zeros(16, 16, 16), torch.ones(16, 16, 16, dtype=torch.uint8)

    monkeypatch.setattr(sampling, "draw_sample", draw)
    return views


@pytest.fixture
def start(tmp_path):
    """A folder of weights, drawn at random, and those weights."""
    torch.manual_seed(5)
    save_weights(segmenter_network(SMALL).state_dict(), tmp_path / "start" / "segmenter.safetensors")
    return tmp_path / "start"


def learn(out, *, show=unseen, **options):
    lines: list[str] = []
    this = Slice(**{"part": "segmenter", "minutes": 5, "workers": 0, "device": "cpu", "validation_maps": 0, **options})
    outcome = train_on_simulations(SMALL, None, out, this, say=lines.append, show=show)
    return outcome, load_file(out / f"{this.part}.safetensors")


@pytest.mark.parametrize(("loss", "formula"), [("cross-entropy", dice_and_cross_entropy), ("focal", dice_and_focal)])
def test_the_loss_that_is_asked_for_is_made_small(start, tmp_path, monkeypatch, loss, formula):
    losses = []
    monkeypatch.setattr(Curve, "add", lambda curve, now: losses.append(now.loss))
    learn(tmp_path / "out", steps=1, start=start, loss=loss, seed=3)
    values, labels = among_ordinary(simulated_maps(SMALL, None, "segmenter", seed=3), SMALL)[0]
    network = load_weights(segmenter_network(SMALL), SMALL, "segmenter", start)
    with torch.no_grad(), mixed_precision(torch.device("cpu")):
        expected = float(formula(network(batch_to_device(values[None], torch.device("cpu"))), labels[None]))
    assert losses == pytest.approx([expected], rel=1e-3)


def test_a_training_starts_from_the_weights_it_is_given(start, tmp_path):
    given = load_file(start / "segmenter.safetensors")
    outcome, learned = learn(tmp_path / "out", steps=1, learning_rate=1e-9, start=start)
    assert outcome.done
    for name, values in given.items():
        torch.testing.assert_close(learned[name], values, atol=2e-3, rtol=0)  # float16 of values that hardly moved


def test_a_template_with_numbers_that_no_tissue_has_is_refused(tmp_path):
    nib.Nifti1Image(np.full((4, 4, 4), 60, np.uint8), np.eye(4)).to_filename(tmp_path / "labels.nii.gz")
    with pytest.raises(InputError, match=r"^labels\.nii\.gz: has the value 60, which is no label of a template"):
        simulated_maps(SMALL, tmp_path / "labels.nii.gz", "segmenter", seed=1)


def test_each_step_is_shown(tmp_path):
    shown: list[str] = []
    learn(tmp_path / "out", steps=2, show=shown.append)
    assert [line.partition(" min, ")[0].rpartition(", ")[0] for line in shown] == ["step 1/2", "step 2/2"]


def test_drawing_a_map_leaves_the_threads_as_they_are():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        simulated_maps(SMALL, None, "segmenter", seed=1)[0]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_trainings_of_any_seed_are_tried_on_the_same_maps(start, tmp_path):
    # Weights that hardly move: what they find in the fixed maps is all but the same after one seed's step or another's.
    tables = []
    for seed in (1, 2):
        learn(tmp_path / str(seed), steps=1, learning_rate=1e-9, start=start, seed=seed, validation_maps=2)
        tables.append((tmp_path / str(seed) / "segmenter_validation.tsv").read_text(encoding="utf-8").splitlines())
    assert tables[0][0].split("\t") == ["step", *SMALL.labels]
    assert tables[0] == tables[1]
    assert len(tables[0]) == 2


def test_a_training_that_goes_on_takes_its_checkpoint_not_the_starting_weights(start, tmp_path):
    learn(tmp_path / "out", steps=2, learning_rate=0.05)
    before = load_file(tmp_path / "out" / "segmenter.safetensors")
    _, after = learn(tmp_path / "out", steps=2, start=start)
    assert all(torch.equal(after[name], values) for name, values in before.items())


def test_calibration_is_noted_in_the_folder_and_read_from_it(start):
    lines: list[str] = []
    own = replace(SMALL, input=replace(SMALL.input, patch_mm=(64.0, 72.0, 80.0)))
    write_model_toml(own, start, about={"temperatures": [9.0] * 17})
    temperatures = calibrate(SMALL, None, start, n_maps=1, seed=1, device="cpu", say=lines.append)
    assert len(lines) == 16 + 8
    assert lines[0].startswith("DN_L ")
    assert lines[16].startswith("DN ")
    trained = read_model_folder(SMALL, start)
    assert trained.temperatures == pytest.approx(temperatures.tolist(), abs=1e-4)
    assert trained.input == own.input


def test_calibration_changes_nothing_of_the_weights_but_the_last_biases(start):
    before = load_file(start / "segmenter.safetensors")
    calibrate(SMALL, None, start, n_maps=1, seed=1, device="cpu", say=lambda line: None)
    after = load_file(start / "segmenter.safetensors")
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["heads.0.bias"]
    moved = (after["heads.0.bias"] - before["heads.0.bias"]).float()
    shifts = moved / torch.tensor(read_model_folder(SMALL, start).temperatures)
    torch.testing.assert_close(shifts[1::2], shifts[2::2], atol=0.02, rtol=0)  # left and right; float16
    assert abs(float(shifts[0])) < 1e-6


def test_a_calibration_that_is_stopped_leaves_the_folder_as_it_was(start, monkeypatch):
    write_model_toml(SMALL, start, about={"temperatures": [9.0] * 17})
    before = {path.name: path.read_bytes() for path in start.iterdir()}
    rounds: list[int] = []

    def stop_in_the_second_round(*args):
        if rounds:
            raise KeyboardInterrupt
        rounds.append(1)
        return torch.full((17,), 0.5)

    monkeypatch.setattr(calibration, "fit_shifts", stop_in_the_second_round)
    with pytest.raises(KeyboardInterrupt):
        calibrate(SMALL, None, start, n_maps=1, seed=1, device="cpu", say=print)
    assert {path.name: path.read_bytes() for path in start.iterdir()} == before


def test_calibration_is_for_the_network_that_learns_from_simulated_maps(tmp_path):
    other = replace(SMALL, network="bids_dgmseg.networks.dcn_net:DCNNet", arch={})
    with pytest.raises(InputError, match="DCNNet is not trained on simulated maps; give a folder of dgm16"):
        calibrate(other, None, tmp_path, n_maps=1, seed=1, device="cpu", say=print)


def test_the_segmenter_learns_from_ordinary_maps_too(start, tmp_path, drawn):
    learn(tmp_path / "out", steps=6, start=start)
    assert [view.values.mixture == 0 for view in drawn] == [True, False, False, True, False, False]
    # 95 × 120 × 105 mm in voxels of 4 mm; 3 voxels more in z, half of them below.
    assert [view.shape for view in drawn[:2]] == [(24, 30, 27), (24, 24, 24)]
    assert [view.cut_mm for view in drawn[:2]] == [(23.0, 14.0), (17.0, 8.0)]


def test_the_localizer_learns_from_maps_of_all_kinds_alone(tmp_path, drawn):
    learn(tmp_path / "out", steps=2, part="localizer")
    assert [view.values.mixture == 0 for view in drawn] == [False, False]


def test_an_untrained_network_is_found_too_sure_or_not_sure_enough(start):
    temperatures = calibrate(SMALL, None, start, n_maps=1, seed=1, device="cpu", say=lambda line: None)
    assert not torch.allclose(temperatures, torch.ones(17), atol=0.05)


def test_calibration_needs_weights(tmp_path):
    with pytest.raises(InputError, match=r"no weights in .*; pass --weights FOLDER or choose another --model"):
        calibrate(SMALL, None, tmp_path, n_maps=1, seed=1, device="cpu", say=print)


def test_calibration_sees_of_a_head_what_the_whole_map_would_give_in_use(start):
    (head,) = calibration._draw_heads(SMALL, phantom_head(), start, n_maps=1, seed=1, device="cpu")
    view = calibration._ordinary_head(4.0)
    values, labels = draw_sample([(phantom_head(), 1.0)], view, calibration._FIRST_HEAD + calibration._HEADS_A_SEED)
    whole = predict(Volume(values.numpy(), scanner_grid(view).affine), head.box, SMALL, weights=start)
    part = predict(head.chi, head.box, SMALL, weights=start)
    np.testing.assert_allclose(part.probabilities, whole.probabilities, atol=1e-5)
    assert torch.equal(head.labels[part.slices], nuclei_labels(labels)[whole.slices])

    shown, classes = calibration._show(head, SMALL)
    first = np.linalg.inv(head.chi.affine) @ network_grid(head.chi, head.box, SMALL).affine[:, 3]
    places = zip(part.slices, first[:3].round().astype(int), strict=True)
    seen = tuple(slice(along.start - n, along.stop - n) for along, n in places)
    assert torch.equal(classes[seen], head.labels[part.slices])
    network = load_weights(segmenter_network(SMALL), SMALL, "segmenter", start)
    passes = calibration._see(network, shown, SMALL, "cpu")
    given = passes.softmax(dim=1).mean(dim=0)[:, *seen].numpy()
    measured = part.probabilities[0] < 1  # nothing is labelled where the map shows nothing
    assert measured.mean() > 0.5
    np.testing.assert_allclose(given[:, measured], part.probabilities[:, measured], atol=0.02)
