"""Noise schedule, solvers and the sampling loop."""

from meddiff.sampling.sampler import SOLVERS, Sampler, sample_latent, solver_timesteps
from meddiff.sampling.schedule import NoiseSchedule

__all__ = ["SOLVERS", "NoiseSchedule", "Sampler", "sample_latent", "solver_timesteps"]
