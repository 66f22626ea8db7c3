"""Noise schedule, solvers and the sampling loop."""

from meddiff.sampling.sampler import SOLVERS, Sampler, resolve_order, sample_latent, solver_timesteps
from meddiff.sampling.schedule import NoiseSchedule

__all__ = ["SOLVERS", "NoiseSchedule", "Sampler", "resolve_order", "sample_latent", "solver_timesteps"]
