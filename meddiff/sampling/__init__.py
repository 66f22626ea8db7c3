"""Noise schedule, solvers and the sampling loop."""

from meddiff.sampling.sampler import (
    RESOLUTION_UNIT,
    SOLVERS,
    Sampler,
    resolve_sampling,
    sample_latent,
    solver_timesteps,
)
from meddiff.sampling.schedule import NoiseSchedule

__all__ = [
    "RESOLUTION_UNIT",
    "SOLVERS",
    "NoiseSchedule",
    "Sampler",
    "resolve_sampling",
    "sample_latent",
    "solver_timesteps",
]
