"""Labels as conditions, and tissues by their brightness."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from meddiff.config import PRESETS, FastMRIConfig, MasksConfig
from meddiff.models import PatchVolumeAutoencoder
from meddiff.tasks import is_measured, network_input, one_hot, paint
from meddiff.tasks.masks import classify

TISSUES = MasksConfig()


def test_one_channel_for_each_tissue():
    labels = torch.randint(0, 4, (3, 4, 5), generator=torch.Generator().manual_seed(0))
    hot = one_hot(labels.to(torch.uint8), TISSUES)
    assert hot.shape == (4, 3, 4, 5) and hot.dtype == torch.float32
    assert torch.equal(hot.argmax(0), labels) and torch.equal(hot.sum(0), torch.ones(3, 4, 5))


@pytest.mark.parametrize(
    "labels, found",
    [
        (torch.full((2, 2, 2), 4), r"\[4, 4\]"),
        (torch.full((2, 2, 2), -1), r"\[-1, -1\]"),
        (torch.zeros(2, 2, 2), "float32"),
        (torch.zeros(0, 2, 2, dtype=torch.int64), "none"),
    ],
)
def test_labels_that_are_no_tissues_are_refused(labels, found):
    with pytest.raises(ValueError, match=rf"integers in \[0, 4\) \(background, csf, .*got .*{found}"):
        one_hot(labels, TISSUES)


MEANS = dataclasses.replace(TISSUES, means=(-1.0, -0.4, 0.6, 0.2))  # the third tissue is the brightest


@pytest.mark.parametrize("contrast, brightness", [(1.0, 0.0), (0.6, 0.0), (1.3, 0.1), (0.8, -0.2)])
def test_tissues_are_told_apart_whatever_the_contrast(contrast, brightness):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (8, 9, 10), generator=generator)
    x = torch.tensor(MEANS.means)[labels] * contrast + brightness
    x += 0.04 * torch.randn(x.shape, generator=generator)
    x[labels == 0] = -1
    assert torch.equal(classify(x, MEANS), labels)


def test_means_that_stay_are_halfway_between_the_thresholds():
    x = torch.tensor([-1.2, -0.71, -0.69, -0.2, 0.0, 0.39, 0.41, 3.0])
    found = classify(x.view(2, 2, 2), MEANS).flatten()
    assert found.tolist() == [0, 0, 1, 1, 3, 3, 3, 2]
    means = [x[found == tissue].mean() for tissue in (1, 3, 2)]
    for tissue, here, there in zip((1, 3), means, means[1:]):
        assert x[found == tissue].max() <= (here + there) / 2 < x[x > x[found == tissue].max()].min()


def test_a_tissue_that_no_voxel_is_nearest_to_keeps_its_mean():
    assert classify(torch.full((1, 1, 2), -0.3), MEANS).flatten().tolist() == [1, 1]
    assert classify(torch.tensor([[[-1.0, 0.55]]]), MEANS).flatten().tolist() == [0, 2]


def test_the_darkest_tissue_ends_where_it_did_in_training():
    config = dataclasses.replace(TISSUES, means=(-1.0, -0.5, 0.25, 0.75))
    x = torch.tensor([-1.0, -0.75, -0.7499, -0.5, 0.3]).view(1, 1, 5)
    assert classify(x, config).flatten().tolist() == [0, 0, 1, 1, 2]


def test_images_and_means_that_say_nothing_are_refused():
    with pytest.raises(ValueError, match="means of the tissues are not known"):
        classify(torch.zeros(1, 1, 1), TISSUES)
    with pytest.raises(ValueError, match="the image is not finite"):
        classify(torch.tensor([[[0.1, float("nan")]]]), MEANS)


@pytest.mark.parametrize("values", [{"tissues": ("a",)}, {"tissues": ("a", "a")}, {"means": (1.0,)}])
def test_impossible_tissues_are_refused(values):
    with pytest.raises(ValueError, match="MasksConfig"):
        MasksConfig(**values)


def test_what_the_network_takes():
    autoencoder = PatchVolumeAutoencoder(PRESETS["tiny"].autoencoder).eval()
    image = torch.rand(24, 16, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latent = network_input(image, FastMRIConfig(), "latent", autoencoder)
    codes = autoencoder.codebook.embeddings
    wanted = 2 * (autoencoder.encode(image[None, None]) - codes.min()) / (codes.max() - codes.min()) - 1
    assert latent.shape == (1, 8, 3, 2, 1)
    torch.testing.assert_close(latent, wanted[..., :3, :2, :1], rtol=1e-4, atol=1e-5)
    assert torch.equal(network_input(image, FastMRIConfig(), "convolutional", autoencoder)[0, 0], image)
    labels = torch.randint(0, 4, (8, 8, 8))
    assert torch.equal(network_input(labels, TISSUES, "convolutional", autoencoder)[0], one_hot(labels, TISSUES))
    painted = paint(labels, TISSUES)
    torch.testing.assert_close(painted.unique(), torch.tensor([-1, -1 / 3, 1 / 3, 1]))
    assert (
        all(painted[labels == tissue].unique().numel() == 1 for tissue in range(4)) and painted[labels == 3].min() == 1
    )
    of_mask, of_image = (
        network_input(x, t, "latent", autoencoder) for x, t in ((labels, TISSUES), (painted, FastMRIConfig()))
    )
    assert torch.equal(of_mask, of_image)
    assert is_measured(FastMRIConfig()) and not is_measured(TISSUES)
