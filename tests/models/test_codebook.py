"""The codebook in training: initial codes, moving averages, restart, and that nothing else alters it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from meddiff.kernels.vq_fused import code_statistics
from meddiff.models import PatchVolumeAutoencoder
from meddiff.models.codebook import Codebook


def latent(*values: list[float]) -> Tensor:
    """Tokens [n][C] → [1, C, n, 1, 1]."""
    return torch.tensor(values).T[None, :, :, None, None]


def test_initial_codes_are_tokens_of_the_batch():
    torch.manual_seed(0)
    codebook, z = Codebook(8, 4), torch.randn(2, 4, 2, 3, 2)
    assert not codebook.initialised
    codebook.initialise(z)
    tokens = {tuple(token) for token in z.movedim(1, -1).flatten(0, -2).tolist()}
    assert len({tuple(code) for code in codebook.embeddings.tolist()} & tokens) == 8
    assert codebook.initialised and torch.equal(codebook.z_avg, codebook.embeddings) and codebook.N.eq(1).all()


def test_too_few_tokens_repeat_with_noise():
    torch.manual_seed(0)
    codebook, z = Codebook(64, 4), torch.zeros(1, 4, 1, 1, 2)
    codebook.initialise(z)
    assert len(codebook.embeddings.unique(dim=0)) == 64
    assert codebook.embeddings.std().item() == pytest.approx(0.01 / math.sqrt(4), rel=0.2)


def test_update_is_the_moving_average():
    codebook = Codebook(2, 2)
    codebook.initialise(latent([0.0, 0.0], [4.0, 4.0]))
    order = codebook.embeddings[:, 0].argsort()
    codebook.embeddings.copy_(codebook.embeddings[order]), codebook.z_avg.copy_(codebook.z_avg[order])
    codebook.N.fill_(10), codebook.z_avg.mul_(10)
    z = latent([1.0, 0.0], [1.0, 2.0], [5.0, 3.0])
    perplexity = codebook.update(z, code_statistics(z, torch.tensor([0, 0, 1]).view(1, 3, 1, 1), 2))

    n = torch.tensor([0.99 * 10 + 0.01 * 2, 0.99 * 10 + 0.01])
    z_avg = torch.tensor([[0.02, 0.02], [0.99 * 40 + 0.05, 0.99 * 40 + 0.03]])
    weights = (n + 1e-7) / (n.sum() + 2e-7) * n.sum()
    torch.testing.assert_close(codebook.N, n)
    torch.testing.assert_close(codebook.z_avg, z_avg)
    torch.testing.assert_close(codebook.embeddings, z_avg / weights[:, None])
    assert perplexity.item() == pytest.approx(math.exp(-(2 / 3) * math.log(2 / 3) - (1 / 3) * math.log(1 / 3)))


def test_an_unused_code_becomes_a_token_of_the_batch():
    codebook = Codebook(3, 2)
    codebook.initialise(latent([0.0, 0.0], [1.0, 1.0], [2.0, 2.0]))
    codebook.N.copy_(torch.tensor([5.0, 5.0, 0.5]))
    z = latent([7.0, 8.0], [7.0, 8.0])
    codebook.update(z, code_statistics(z, torch.tensor([0, 1]).view(1, 2, 1, 1), 3))
    assert codebook.embeddings[2].tolist() == [7.0, 8.0]
    assert [7.0, 8.0] not in codebook.embeddings[:2].tolist()


def test_the_threshold_of_use_can_be_lower():
    codebook = Codebook(3, 2)
    codebook.initialise(latent([0.0, 0.0], [1.0, 1.0], [2.0, 2.0]), least_use=0.25)
    assert codebook.N.tolist() == [0.25] * 3
    codebook.N.copy_(torch.tensor([0.5, 0.5, 0.1]))
    codebook.z_avg.copy_(codebook.embeddings * codebook.N[:, None])
    before = codebook.embeddings.clone()
    z = latent([7.0, 8.0])
    codebook.update(z, torch.zeros(3, 3), least_use=0.25)  # nothing was used
    torch.testing.assert_close(codebook.embeddings[:2], before[:2], rtol=1e-5, atol=1e-5)
    assert codebook.embeddings[2].tolist() == [7.0, 8.0]


def test_modes_and_forward_passes_leave_the_codes_alone(tiny_autoencoder_config):
    autoencoder = PatchVolumeAutoencoder(tiny_autoencoder_config)
    x = torch.rand(1, 1, 16, 16, 16) * 2 - 1
    autoencoder.codebook.initialise(autoencoder.encode(x))
    before = {key: value.clone() for key, value in autoencoder.codebook.state_dict().items()}
    for mode in (True, False, True):
        autoencoder.train(mode)(x)
    assert all(torch.equal(before[key], value) for key, value in autoencoder.codebook.state_dict().items())
    restored = PatchVolumeAutoencoder(tiny_autoencoder_config)
    restored.load_state_dict(autoencoder.state_dict())
    assert restored.codebook.initialised
