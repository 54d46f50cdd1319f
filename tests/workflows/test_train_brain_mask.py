from dataclasses import replace

import pytest
import torch
import train_brain_mask
from safetensors.torch import load_file
from whole_head import SPACING_MM, draw_magnitude, prepare_whole_head

from bids_dgmseg.lab.simulate.sample import phantom_labels
from bids_dgmseg.models.model_folder import segmenter_network
from bids_dgmseg.models.registry import BRAIN_MASK

pytestmark = pytest.mark.slow

SEEDS = range(6)


@pytest.fixture(scope="module")
def head():
    return prepare_whole_head(phantom_labels())


@pytest.fixture(scope="module")
def drawn(head):
    return [draw_magnitude(head, torch.Generator().manual_seed(seed)) for seed in SEEDS]


def test_same_seed_gives_the_same_image(head, drawn):
    for first, second in zip(drawn[1], draw_magnitude(head, torch.Generator().manual_seed(1)), strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert not torch.equal(drawn[0][0], drawn[1][0])


def test_brain_has_a_plausible_volume_and_signal_around_it(head, drawn):
    *_, fraction, _, _ = head.maps
    phantom_mm3 = float(fraction.sum()) * 2.0**3  # its voxels have 2 mm
    volumes = [float(brain.sum()) * SPACING_MM**3 / phantom_mm3 for _, brain in drawn]
    # Heads have 0.78 to 1.06 times its size, with up to 6 % more or less per axis; deformations change little.
    assert max(volumes) < 1.06**6 * 1.1
    assert sum(volume > 0.78**3 * 0.94**3 * 0.9 for volume in volumes) >= 4  # the field of view cuts the others
    outside = [
        float(((magnitude > 0.2 * magnitude[brain > 0].median()) & (brain == 0)).sum()) for magnitude, brain in drawn
    ]
    assert sum(volume * SPACING_MM**3 > 200e3 for volume in outside) >= 4  # scalp, face and neck


def test_brain_is_only_labelled_where_there_is_an_image(drawn):
    for magnitude, brain in drawn:
        shown = [(magnitude > 0).amax(dim=axes) for axes in ((1, 2), (0, 2), (0, 1))]
        labelled = [(brain > 0).amax(dim=axes) for axes in ((1, 2), (0, 2), (0, 1))]
        assert all((have | ~want).all() for have, want in zip(shown, labelled, strict=True))


def test_brain_mask_is_learned_from_magnitudes(tmp_path, monkeypatch):
    def draw(head, generator):
        brain = torch.zeros(16, 16, 16, dtype=torch.uint8)
        x, y, z = torch.randint(1, 7, (3,), generator=generator).tolist()
        brain[x : x + 8, y : y + 8, z : z + 8] = 1
        return 500 * brain + 100 * torch.rand(brain.shape, generator=generator), brain

    monkeypatch.setattr(train_brain_mask, "prepare_whole_head", lambda template: None)
    monkeypatch.setattr(train_brain_mask, "phantom_labels", lambda: None)
    monkeypatch.setattr(train_brain_mask, "draw_magnitude", draw)
    small = replace(BRAIN_MASK, arch={"features": [4, 8]}, weights=None)
    monkeypatch.setattr(train_brain_mask, "BRAIN_MASK", small)
    assert train_brain_mask.main([str(tmp_path), "--steps", "100", "--workers", "0"]) == 0
    weights = load_file(tmp_path / "brain-mask.safetensors")
    assert weights.keys() == segmenter_network(small).state_dict().keys()
    last = (tmp_path / "brain-mask" / "curve.tsv").read_text().splitlines()[-1]
    assert float(last.split("\t")[3]) > 0.7
