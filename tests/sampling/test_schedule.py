from __future__ import annotations

import pytest
import torch

from meddiff.config import ScheduleConfig
from meddiff.sampling import NoiseSchedule


@pytest.fixture(scope="module")
def schedule():
    return NoiseSchedule()


def test_every_table_is_the_reference(schedule, reference):
    wanted = reference("diffusion_schedule_1000")
    tables = dict(schedule.named_buffers())
    assert set(tables) == {"betas", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"}
    for name, table in tables.items():
        assert table.dtype == torch.float32
        torch.testing.assert_close(table, wanted[name], rtol=1e-6, atol=0, msg=name)
    signal = schedule.signal(torch.arange(-1, 1000))
    assert signal.dtype == torch.float64 and signal[0] == 1
    torch.testing.assert_close(signal[1:].float(), wanted["alphas_cumprod"], rtol=1e-6, atol=0)


def test_no_table_goes_into_a_checkpoint(schedule):
    assert schedule.state_dict() == {}


def test_noise_is_added_by_the_closed_form(schedule):
    """Ho et al. 2020, equation 4."""
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 3, 8, 2, 3, 4, generator=generator)
    t = torch.tensor([0, 400, 999])
    signal = schedule.signal(t)[:, None, None, None, None]
    wanted = signal.sqrt() * x0 + (1 - signal).sqrt() * noise
    torch.testing.assert_close(schedule.add_noise(x0, t, noise).double(), wanted, rtol=1e-6, atol=1e-6)


def test_other_lengths():
    schedule = NoiseSchedule(ScheduleConfig(timesteps=10))
    assert schedule.betas.shape == (10,) and (schedule.betas > 0).all() and schedule.betas[-1] == 0.9999
    with pytest.raises(ValueError, match="timesteps"):
        ScheduleConfig(timesteps=0)


@pytest.mark.parametrize("bias", [0.0, 1.0, 2.5])
def test_timesteps_are_drawn_with_a_density_that_grows_as_their_power(schedule, bias):
    torch.manual_seed(0)
    t = schedule.draw_timesteps(200_000, bias)
    assert t.dtype == torch.int64 and t.min() >= 0 and t.max() == schedule.timesteps - 1
    for share in (0.25, 0.5, 0.9):
        below = (t < share * schedule.timesteps).double().mean().item()
        assert below == pytest.approx(share ** (1 + bias), abs=0.005)


def test_min_snr_weights_make_the_distance_that_of_the_clean_latents():
    schedule, gamma = NoiseSchedule(), 0.25
    t = torch.tensor([0, 300, 600, 900, 999])
    weights = schedule.snr_weights(t, gamma)
    signal, noise = schedule.sqrt_alphas_cumprod[t], schedule.sqrt_one_minus_alphas_cumprod[t]
    clean = noise / signal  # what an error of 1 in the noise does to the clean latent
    few = (signal / noise).square() < gamma
    assert few.tolist() == [False, False, False, True, True]
    torch.testing.assert_close(weights, torch.where(few, torch.ones(5), 0.5 * clean))
    assert schedule.snr_weights(t, None) is None
