import numpy as np
import pytest
import torch

from bids_dgmseg.segmentation.predict import merge_heads, softmax_heads

TWO = (("DN",), ("IN",))


def test_each_head_has_its_softmax():
    logits = torch.tensor([0.0, np.log(3), 0.0, -np.log(3)]).reshape(1, 4, 1, 1, 1)
    assert softmax_heads(logits, TWO).flatten().tolist() == pytest.approx([1 / 4, 3 / 4, 3 / 4, 1 / 4])
    assert softmax_heads(logits[:, :3], (("A", "B"),)).flatten().tolist() == pytest.approx([1 / 5, 3 / 5, 1 / 5])


def test_logits_are_divided_by_temperatures():
    logits = torch.tensor([0.0, 2 * np.log(3)]).reshape(1, 2, 1, 1, 1)
    probabilities = softmax_heads(logits, (("DN",),), temperatures=(1.0, 2.0))
    assert probabilities.flatten().tolist() == pytest.approx([1 / 4, 3 / 4])


def test_calibrated_low_probabilities_become_background():
    # Odds of 1 to 8 and to 400 of two nuclei against the background: 1 in 400 is less than a hundredth.
    logits = torch.tensor([0.0, -2 * np.log(8), -2 * np.log(400)]).reshape(1, 3, 1, 1, 1)
    kept = 1 / 8 / (1 + 1 / 8 + 1 / 400)
    probabilities = softmax_heads(logits, (("DN", "IN"),), temperatures=(2.0, 2.0, 2.0))
    assert probabilities.flatten().tolist() == pytest.approx([1 - kept, kept, 0])


def test_uncalibrated_low_probabilities_stay():
    logits = torch.tensor([0.0, -np.log(400)]).reshape(1, 2, 1, 1, 1)
    assert softmax_heads(logits, (("DN",),)).flatten().tolist() == pytest.approx([400 / 401, 1 / 401])


def test_temperatures_follow_the_device_of_logits():
    logits = torch.empty((1, 2, 1, 1, 1), device="meta")  # of another device than the processor's, as a GPU is
    assert softmax_heads(logits, (("DN",),), temperatures=(1.0, 2.0)).device == logits.device


@pytest.mark.parametrize(
    ("dentate", "interposed", "expected"),
    [
        # neither 0.4 * 0.2, dentate alone 0.6 * 0.2, interposed alone 0.4 * 0.8; together 0.52
        pytest.param(0.6, 0.8, [0.08 / 0.52, 0.12 / 0.52, 0.32 / 0.52], id="both likely"),
        pytest.param(0.9, 0.0, [0.1, 0.9, 0.0], id="one head is sure of background"),
        pytest.param(0.5, 0.5, [1 / 3, 1 / 3, 1 / 3], id="nothing is known"),
    ],
)
def test_two_heads_are_merged_by_hand(dentate, interposed, expected):
    heads = np.array([1 - dentate, dentate, 1 - interposed, interposed], np.float32).reshape(4, 1, 1, 1)
    assert merge_heads(heads, TWO).ravel().tolist() == pytest.approx(expected, abs=1e-6)


def test_two_certain_heads_share_the_voxel():
    heads = np.array([0, 1, 0, 1], np.float32).reshape(4, 1, 1, 1)
    assert merge_heads(heads, TWO).ravel().tolist() == pytest.approx([0, 0.5, 0.5], abs=1e-6)


def test_most_certain_head_above_half_wins():
    certain = np.random.default_rng(0).random((2, 1000)).astype(np.float32)
    heads = np.stack([1 - certain[0], certain[0], 1 - certain[1], certain[1]])[:, :, None, None]
    expected = np.where(certain.max(axis=0) > 0.5, 1 + certain.argmax(axis=0), 0)
    np.testing.assert_array_equal(merge_heads(heads, TWO).argmax(axis=0).ravel(), expected)


def test_single_head_stays_unchanged():
    heads = np.random.default_rng(0).random((4, 2, 2, 2)).astype(np.float32)
    assert merge_heads(heads, (("RN", "SN", "STN"),)) is heads
