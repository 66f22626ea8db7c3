"""Whole jobs: from volumes and conditions to volumes."""

from meddiff.pipelines.control import Condition, TrainedControl, generate_controlled
from meddiff.pipelines.generate import Outcome, generate_volumes
from meddiff.pipelines.jobs import VolumeJob, jobs_from_count, jobs_from_list
from meddiff.pipelines.latents import EncodedVolume
from meddiff.pipelines.model import MedDiffusion

__all__ = [
    "Condition",
    "EncodedVolume",
    "MedDiffusion",
    "Outcome",
    "TrainedControl",
    "VolumeJob",
    "generate_controlled",
    "generate_volumes",
    "jobs_from_count",
    "jobs_from_list",
]
