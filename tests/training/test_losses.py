"""Losses against numbers worked out by hand, and where their gradients go."""

from __future__ import annotations

import sys

import pytest
import torch

from meddiff.training.losses import (
    adversarial_loss,
    commitment_loss,
    feature_matching_loss,
    hinge_loss,
    load_perceptual,
    noise_loss,
)


def test_commitment_pulls_the_latent_alone():
    with torch.enable_grad():
        z, rows = torch.full((1, 2, 1, 1, 1), 3.0, requires_grad=True), torch.ones(1, 2, 1, 1, 1, requires_grad=True)
        loss = commitment_loss(z, rows)
        loss.backward()
    assert loss.item() == pytest.approx(0.25 * 4)
    assert z.grad.flatten().tolist() == [0.5, 0.5] and rows.grad is None


def test_noise_at_one_scale_is_the_published_l1_distance():
    noise, estimate = torch.randn(2, 2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    assert noise_loss(estimate, noise) == torch.nn.functional.l1_loss(estimate, noise)
    assert noise_loss(estimate.half(), noise).dtype == torch.float32


def test_noise_at_several_scales_weighs_what_is_wrong_over_a_region():
    noise = torch.zeros(1, 1, 4, 4, 2)
    alternating = torch.tensor([1.0, -1.0]).expand(1, 1, 4, 4, 2)
    for scales in (1, 2, 3, 9):
        assert noise_loss(alternating, noise, scales) == 1  # averages to nothing
        assert noise_loss(noise + 0.5, noise, scales) == 0.5 * scales
    halves = torch.cat([torch.full((1, 1, 3, 4, 2), 2.0), torch.zeros(1, 1, 2, 4, 2)], dim=2)  # 5 planes → 3 → 2 → 1
    by_hand = 2 * 3 / 5, (2 + 1 + 0) / 3, (1.5 + 0) / 2, 0.75
    assert noise_loss(halves, torch.zeros_like(halves), 4).item() == pytest.approx(sum(by_hand))
    with torch.enable_grad():
        estimate = torch.zeros(1, 1, 2, 2, 2, requires_grad=True)
        noise_loss(estimate, torch.ones(1, 1, 2, 2, 2), 2).backward()
    assert torch.allclose(estimate.grad, torch.full_like(estimate, -2 / 8))


def test_noise_of_each_sample_has_its_weight():
    noise = torch.zeros(2, 1, 4, 4, 2)
    estimate = torch.stack([noise[0] + 1, noise[1] - 3])
    assert noise_loss(estimate, noise, 2, torch.tensor([0.5, 2.0])) == 2 * (0.5 * 1 + 2 * 3) / 2


def test_hinge_and_adversarial():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.5])
    assert hinge_loss(real, fake).item() == pytest.approx(0.25 + 0.75)
    assert adversarial_loss(fake).item() == pytest.approx(1.25)


def test_feature_matching_is_the_mean_over_layers_and_keeps_the_real_ones_fixed():
    with torch.enable_grad():
        real = [torch.zeros(2, requires_grad=True), torch.zeros(3, requires_grad=True)]
        fake = [torch.tensor([1.0, 3.0], requires_grad=True), torch.full((3,), 4.0, requires_grad=True)]
        loss = feature_matching_loss(real, fake)
        loss.backward()
    assert loss.item() == pytest.approx((2 + 4) / 2)
    assert all(r.grad is None for r in real) and all(f.grad is not None for f in fake)


def test_losses_are_float32_under_autocast():
    z = torch.randn(1, 2, 2, 2, 2).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        losses = [commitment_loss(z, z + 1), hinge_loss(z, z), adversarial_loss(z), feature_matching_loss([z], [z])]
    assert all(loss.dtype == torch.float32 for loss in losses)


def test_no_perceptual_loss_is_none():
    assert load_perceptual("none") is None


def test_missing_packages_turn_the_perceptual_loss_off_with_a_warning(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.warns(UserWarning, match="without the perceptual loss: lpips"):
        assert load_perceptual("lpips") is None


def test_a_missing_weights_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.pth"):
        load_perceptual("medicalnet", str(tmp_path / "gone.pth"))
