"""The peers are what was published: with the same weights and noise they give what meddiff gives."""

from __future__ import annotations

import torch

from meddiff.config import PRESETS
from meddiff.models import BiFlowNet
from meddiff.sampling import NoiseSchedule, sample_latent, solver_timesteps


def test_the_published_loop_gives_our_latent(script, reference_weights, relative_error):
    published = script("published")
    ours = reference_weights(BiFlowNet(PRESETS["tiny"].denoiser))
    theirs = published.BiFlowNet(ours.config).eval()
    theirs.load_state_dict(ours.state_dict())
    schedule, y = NoiseSchedule(), torch.tensor([3])
    noise = torch.randn(1, 8, 8, 8, 16, generator=torch.Generator().manual_seed(0))
    timesteps = solver_timesteps(schedule, "ddim", 5)
    for channels_last in (False, True):
        got = published.sample_ddim(theirs, schedule, noise, y, timesteps, torch.float32, channels_last)
        assert relative_error(got, sample_latent(ours, schedule, noise, y, steps=5)) < 1e-4
