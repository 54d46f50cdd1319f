import pytest
import torch

from bids_dgmseg.train.temperatures import fit_temperatures, pick_voxels


def draw(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw the class of each voxel with the probabilities that the logits stand for."""
    return torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]


def test_a_network_that_is_right_as_often_as_it_says_keeps_its_temperature():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((60_000, 3), generator=generator) * 2
    fitted = fit_temperatures(logits[None], draw(logits, generator))
    torch.testing.assert_close(fitted, torch.ones(3), atol=0.04, rtol=0)


def test_a_network_that_is_too_sure_is_cooled_by_as_much():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn((60_000, 3), generator=generator) * 2
    labels = draw(logits, generator)
    torch.testing.assert_close(fit_temperatures(2.5 * logits[None], labels), torch.full((3,), 2.5), atol=0.1, rtol=0)


def test_each_class_has_its_own_temperature():
    generator = torch.Generator().manual_seed(2)
    true_logits, temperatures = torch.randn((100_000, 3), generator=generator) * 2, torch.tensor([1.0, 3.0, 0.5])
    fitted = fit_temperatures((true_logits * temperatures)[None], draw(true_logits, generator))
    torch.testing.assert_close(fitted, temperatures, atol=0.12, rtol=0)


def test_voxels_are_picked_where_the_map_has_doubts_or_the_truth_a_nucleus():
    logits = torch.zeros(1, 2, 4, 1, 1)
    logits[0, 0, :, 0, 0] = torch.tensor([9.0, 9.0, 0.0, 0.0])  # surely background, but the second is not
    labels = torch.tensor([0, 1, 0, 1]).view(4, 1, 1)
    picked, classes = pick_voxels(logits, labels, n_voxels=10, generator=torch.Generator().manual_seed(0))
    assert sorted(zip(picked[0, :, 0].tolist(), classes.tolist(), strict=True)) == [(0.0, 0), (0.0, 1), (9.0, 1)]


@pytest.mark.parametrize("n_voxels", [1, 5])
def test_no_more_voxels_are_picked_than_asked_for(n_voxels):
    picked, classes = pick_voxels(
        torch.zeros(2, 3, 4, 4, 4), torch.zeros(4, 4, 4), n_voxels=n_voxels, generator=torch.Generator().manual_seed(0)
    )
    assert picked.shape == (2, n_voxels, 3)
    assert classes.shape == (n_voxels,)


def test_temperatures_of_a_network_that_knows_nothing_end_somewhere():
    generator = torch.Generator().manual_seed(3)
    logits, labels = torch.randn((5000, 3), generator=generator), torch.randint(3, (5000,), generator=generator)
    assert float(fit_temperatures(logits[None], labels).max()) == 100


def test_classes_that_share_a_temperature_get_the_one_that_suits_both():
    generator = torch.Generator().manual_seed(4)
    true_logits = torch.randn((100_000, 3), generator=generator) * 2
    labels = draw(true_logits, generator)
    fitted = fit_temperatures((true_logits * torch.tensor([1.0, 2.0, 4.0]))[None], labels, [[1, 2]])
    assert fitted[1] == fitted[2]
    assert 2 < float(fitted[1]) < 4


def test_the_mean_of_two_passes_is_made_right_not_each_of_them():
    generator = torch.Generator().manual_seed(6)
    passes = torch.randn((2, 100_000, 3), generator=generator) * 2
    labels = torch.multinomial(passes.softmax(dim=2).mean(dim=0), 1, generator=generator)[:, 0]
    torch.testing.assert_close(fit_temperatures(2 * passes, labels), torch.full((3,), 2.0), atol=0.1, rtol=0)
