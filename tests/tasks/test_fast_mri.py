"""k-space lines: which are measured, what they give, and that they stay."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from meddiff.config import FastMRIConfig
from meddiff.tasks import impose, measure, reconstruct
from meddiff.tasks.fast_mri import k_space, line_mask

FOUR = FastMRIConfig()


def image(*size, seed=0):
    return torch.rand(*size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("lines", [8, 13, 64, 101])
@pytest.mark.parametrize("config", [FOUR, FastMRIConfig(8, 0.04), FastMRIConfig(1, 1.0)], ids=str)
def test_the_lines_are_as_many_as_asked_for_and_hold_the_centre(lines, config):
    mask = line_mask(lines, config, seed=3)
    assert mask.sum() == max(1, round(lines / config.acceleration))
    centre = max(1, round(lines * config.centre_fraction))
    frequencies = torch.fft.fftfreq(lines, 1 / lines).abs()
    assert mask[frequencies <= (centre - 1) // 2].all()
    assert torch.equal(mask, line_mask(lines, config, seed=3))


def test_other_seeds_measure_other_lines_everywhere():
    masks = torch.stack([line_mask(64, FOUR, seed) for seed in range(200)]).float()
    share = masks.mean(0)
    centre = share == 1
    assert centre.sum() == round(64 * FOUR.centre_fraction)
    assert share[~centre].min() > 0.05 and share[~centre].max() < 0.4  # 11 of 59: 0.19


def test_k_space_and_reconstruction_are_those_of_the_definition():
    x = image(3, 10, 12)
    measurement = measure(x, FOUR, seed=1)
    k = np.fft.fft2((x.numpy().astype(np.float64) + 1) / 2) / np.sqrt(10 * 12)
    k[..., ~measurement.sampling.numpy()] = 0
    np.testing.assert_allclose(measurement.data.numpy(), k, atol=1e-5)
    wanted = 2 * np.abs(np.fft.ifft2(k * np.sqrt(10 * 12))) - 1
    np.testing.assert_allclose(reconstruct(measurement, FOUR).numpy(), wanted.clip(-1, 1), atol=1e-5)
    assert measurement.size == (3, 10, 12)


def test_a_whole_measurement_gives_the_image_back():
    x = image(2, 9, 11)
    whole = FastMRIConfig(1, 1.0)
    measurement = measure(x, whole)
    torch.testing.assert_close(reconstruct(measurement, whole), x, rtol=0, atol=1e-5)
    torch.testing.assert_close(impose(image(2, 9, 11, seed=1), measurement, whole), x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(2, 16, 16), (1, 12, 15), (3, 7, 20), (1, 1, 8)])
def test_what_was_measured_is_in_the_k_space_of_the_result(size):
    x, other = image(*size), image(*size, seed=1)
    measurement = measure(x, FOUR, seed=2)
    result = impose(other, measurement, FOUR)
    mask = measurement.sampling
    got = k_space(result)
    assert result.dtype == torch.float32
    torch.testing.assert_close(got[..., mask], measurement.data[..., mask], rtol=0, atol=1e-5)
    opposite = mask.flip(-1).roll(1)
    torch.testing.assert_close(got[..., opposite], k_space(x)[..., opposite], rtol=0, atol=1e-5)
    neither = ~(mask | opposite)
    torch.testing.assert_close(got[..., neither], k_space(other)[..., neither], rtol=0, atol=1e-5)
    torch.testing.assert_close(impose(x, measurement, FOUR), x, rtol=0, atol=1e-5)
    assert (result - x).norm() <= (other - x).norm()


def test_another_size_is_refused():
    with pytest.raises(ValueError, match=r"size \(2, 8, 8\), got \(2, 8, 9\)"):
        impose(image(2, 8, 9), measure(image(2, 8, 8), FOUR), FOUR)


@pytest.mark.parametrize(
    "values", [{"acceleration": 0}, {"acceleration": 2.5}, {"centre_fraction": 0}, {"centre_fraction": 0.3}]
)
def test_impossible_samplings_are_refused(values):
    with pytest.raises(ValueError, match=f"FastMRIConfig: {next(iter(values))}"):
        FastMRIConfig(**values)
