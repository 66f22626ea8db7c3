from __future__ import annotations

import pytest
import torch

from meddiff.config import PRESETS, ScheduleConfig
from meddiff.models import BiFlowNet
from meddiff.sampling import NoiseSchedule


@pytest.fixture(scope="module")
def schedule():
    return NoiseSchedule()


def test_every_table_is_the_reference(schedule, reference):
    tables = reference("diffusion_schedule_1000")
    assert set(tables) == {name for name, _ in schedule.named_buffers()}
    for name, wanted in tables.items():
        table = getattr(schedule, name)
        assert table.dtype == torch.float32
        torch.testing.assert_close(table, wanted, rtol=1e-6, atol=0, msg=name)


def test_no_table_goes_into_a_checkpoint(schedule):
    assert schedule.state_dict() == {}


def test_posterior_is_the_reference(schedule, reference, reference_weights, relative_error):
    denoiser = reference_weights(BiFlowNet(PRESETS["tiny"].denoiser))
    z, wanted = reference("ddim10_tiny_patch1")["z"], reference("ddpm_posterior_tiny_patch1")
    for step in (0, 1, 500, 998, 999):
        t = torch.tensor([step])
        noise = denoiser(z, t, torch.tensor([1]), torch.tensor([8, 8, 16]) / 64)
        mean, log_variance = schedule.posterior(schedule.predict_x0(z, t, noise), z, t)
        assert relative_error(mean, wanted[f"mean_t{step}"]) < 1e-5
        torch.testing.assert_close(log_variance, wanted[f"log_variance_t{step}"])


def test_adding_noise_and_predicting_are_inverse(schedule):
    generator = torch.Generator().manual_seed(0)
    x0 = torch.rand(3, 8, 2, 3, 4, generator=generator) * 2 - 1
    noise = torch.randn(x0.shape, generator=generator)
    t = torch.tensor([0, 400, 800])
    torch.testing.assert_close(schedule.predict_x0(schedule.add_noise(x0, t, noise), t, noise), x0, rtol=0, atol=1e-4)


def test_prediction_is_clipped(schedule):
    x = torch.full((1, 8, 1, 1, 1), 3.0)
    assert schedule.predict_x0(x, torch.tensor([0]), torch.zeros_like(x)).unique().tolist() == [1.0]


def test_other_lengths():
    schedule = NoiseSchedule(ScheduleConfig(timesteps=10))
    assert schedule.betas.shape == (10,) and (schedule.betas > 0).all() and schedule.betas[-1] == 0.9999
    with pytest.raises(ValueError, match="timesteps"):
        ScheduleConfig(timesteps=0)


def test_a_shift_multiplies_signal_over_noise(schedule):
    shifted = NoiseSchedule(ScheduleConfig(shift=8))
    t = torch.arange(0, 999)  # the last beta of the plain schedule is clipped
    ratio, plain = (s.signal(t) / (1 - s.signal(t)) for s in (shifted, schedule))
    torch.testing.assert_close(ratio, 64 * plain, rtol=1e-9, atol=0)
    assert shifted.signal(torch.tensor(-1)) == 1 and shifted.signal(torch.tensor(999)) < 1e-4
